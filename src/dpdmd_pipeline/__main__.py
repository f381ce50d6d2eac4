"""Run the package as `dpdmd-pipeline` and `python -m dpdmd_pipeline`."""

import sys
from pathlib import Path
from typing import Any

import typer

from dpdmd_pipeline.commands.arena import EPILOG, arena
from dpdmd_pipeline.commands.comfy_install import comfy_install
from dpdmd_pipeline.commands.doctor import doctor
from dpdmd_pipeline.commands.sample import sample
from dpdmd_pipeline.commands.score import ScoreCommand, score
from dpdmd_pipeline.planning.options import nearest
from dpdmd_pipeline.wording import printable

HELP = "DP-DMD: distil a text-to-image model into four steps and keep a different picture for every seed."
OWN = ("--help", "--install-completion", "--show-completion")  # other options belong to `run`

app = typer.Typer(name="dpdmd-pipeline", help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(doctor)
app.command()(sample)
app.command(cls=ScoreCommand)(score)
app.command(epilog=EPILOG)(arena)
app.command()(comfy_install)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Run the pipeline, as `kedro run` does."""
    _run_kedro(context.args)


def main(*args, **kwargs) -> Any:
    """Run a command, or Kedro's `run` if there are only options; errors that the user can correct become one line."""
    arguments = sys.argv[1:] or ["--help"]
    names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    if arguments[0].startswith("-") and not arguments[0].startswith(OWN):
        return _run_kedro(arguments, *args, **kwargs)
    if not arguments[0].startswith("-") and arguments[0] not in names:
        sys.exit(f"Error: no command {arguments[0]!r}{nearest(arguments[0], names)}; use {', '.join(names)}")
    for stream in (sys.stdout, sys.stderr):  # file names may contain characters that the terminal cannot encode
        stream.reconfigure(errors="backslashreplace")
    try:
        return app(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {printable(str(error))}")  # names in files may contain terminal commands


def _run_kedro(arguments: list[str], *args, **kwargs) -> Any:
    from kedro.framework.cli.utils import find_run_command
    from kedro.framework.project import configure_project

    package_name = Path(__file__).parent.name
    configure_project(package_name)
    kwargs["standalone_mode"] = not hasattr(sys, "ps1")  # not where Python is interactive
    return find_run_command(package_name)(arguments, *args, prog_name="dpdmd-pipeline run", **kwargs)


if __name__ == "__main__":
    main()
