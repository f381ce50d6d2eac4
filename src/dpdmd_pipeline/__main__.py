"""Makes the package executable as `dpdmd-pipeline` and `python -m dpdmd_pipeline`."""

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

from dpdmd_pipeline.commands import COMMANDS


def main(*args, **kwargs) -> Any:
    """Run a command of `commands/`, or else Kedro's `run` with the arguments as they are."""
    asked = sys.argv[1] if len(sys.argv) > 1 else "--"
    if asked in COMMANDS:
        return _command(asked, sys.argv[2:])
    if not asked.startswith("-"):
        sys.exit(_unknown(asked))

    from kedro.framework.cli.utils import find_run_command
    from kedro.framework.project import configure_project

    package_name = Path(__file__).parent.name
    configure_project(package_name)

    interactive = hasattr(sys, "ps1")
    kwargs["standalone_mode"] = not interactive

    run = find_run_command(package_name)
    run.epilog = _listed_commands()
    return run(*args, **kwargs)


def _unknown(name: str) -> str:
    """What to say of a first word that is none of the commands; `run` takes options only."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"Error: no command {name!r}: {meant}there are {', '.join(COMMANDS)}; options alone are those of `kedro run`"


def _listed_commands() -> str:
    """The end of the help; click leaves the lines after its mark as they are."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(["\b", "Other commands, each with a --help of its own:", *lines])


def _command(name: str, arguments: list[str]) -> None:
    """Run one command; what its user can mend is told in one line."""
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")
    try:
        importlib.import_module(f"dpdmd_pipeline.commands.{name.replace('-', '_')}").main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
