"""Run the package as `dpdmd-pipeline` and `python -m dpdmd_pipeline`."""

import importlib
import sys
from pathlib import Path
from typing import Any

from dpdmd_pipeline.commands import COMMANDS
from dpdmd_pipeline.commands.output import flush
from dpdmd_pipeline.planning.options import nearest
from dpdmd_pipeline.wording import printable


def main(*args, **kwargs) -> Any:
    """Run a command of `commands/`, else Kedro's `run` with all arguments."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--"
    if first in COMMANDS:
        return _run_command(first, sys.argv[2:])
    if not first.startswith("-"):
        sys.exit(_unknown(first))

    from kedro.framework.cli.utils import find_run_command
    from kedro.framework.project import configure_project

    package_name = Path(__file__).parent.name
    configure_project(package_name)

    interactive = hasattr(sys, "ps1")
    kwargs["standalone_mode"] = not interactive

    run = find_run_command(package_name)
    run.epilog = _commands_help()
    return run(*args, **kwargs)


def _unknown(name: str) -> str:
    """Error message for a first word that is not a command; `run` takes only options."""
    return f"Error: no command {name!r}{nearest(name, COMMANDS)}; use {', '.join(COMMANDS)}, or options for `kedro run`"


def _commands_help() -> str:
    """List of the commands for the end of the help; click does not wrap lines after its mark."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(["\b", "Other commands, each with its own --help:", *lines])


def _run_command(name: str, arguments: list[str]) -> None:
    """Run one command; errors that the user can correct become one line."""
    for stream in (sys.stdout, sys.stderr):  # file names may contain characters that the terminal cannot encode
        stream.reconfigure(errors="backslashreplace")
    try:
        importlib.import_module(f"dpdmd_pipeline.commands.{name.replace('-', '_')}").main(arguments)
    except BrokenPipeError:  # argparse before Python 3.11.4 reports that the reader of a long help has gone
        flush()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {printable(str(error))}")  # names in files may contain terminal commands
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
