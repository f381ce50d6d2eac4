"""Makes the package executable as `dpdmd-pipeline` and `python -m dpdmd_pipeline`."""

import importlib
import sys
from pathlib import Path
from typing import Any

from dpdmd_pipeline.commands import COMMANDS


def main(*args, **kwargs) -> Any:
    """Run a command of `commands/`, or else Kedro's `run` with the arguments as they are."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        return _command(sys.argv[1], sys.argv[2:])

    from kedro.framework.cli.utils import find_run_command
    from kedro.framework.project import configure_project

    package_name = Path(__file__).parent.name
    configure_project(package_name)

    interactive = hasattr(sys, "ps1")
    kwargs["standalone_mode"] = not interactive

    run = find_run_command(package_name)
    return run(*args, **kwargs)


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
