"""Kedro's command `run`, for which a wrong name or value of an option is one line instead of a traceback."""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path
from typing import Any

import click
import kedro.runner
from kedro.framework.cli.project import run as kedro_run

from dpdmd_pipeline.screen import screen
from dpdmd_pipeline.wording import one_line, short

PACKAGE = Path(__file__).parent
RUNNERS = Path(kedro.runner.__file__).parent
FILE_HINT = (
    "lists, and values with a comma, go into a file: `kedro run --config FILE` with run: {params: {NAME: VALUE}}"
)
SHOWN = 200  # characters of an argument or a library's message
log = logging.getLogger(__name__)


class RunCommand(click.Command):
    """`kedro run` with a screen; refusals are one line, faults in a node or this package keep their traceback."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        """Read the options."""
        values = ", ".join(repr(short(arg, SHOWN)) for arg in args if "=" in arg) or "an option"
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except (click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException as error:
            if "`params`" in error.message:
                raise click.ClickException(
                    f"{short(one_line(error.message), 2 * SHOWN).rstrip('.')}; {FILE_HINT}"
                ) from error
            if isinstance(error, click.UsageError):
                raise
            raise click.ClickException(one_line(error.message)) from error
        except Exception as error:  # whatever the YAML and OmegaConf libraries raise
            reason = f"{type(error).__name__}, {short(one_line(error), SHOWN)}"
            raise click.ClickException(f"{values} cannot be read ({reason}); {FILE_HINT}") from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the pipelines."""
        is_verbose = ctx.params.pop("verbose")
        pipelines = ", ".join(ctx.params.get("pipelines") or [ctx.params.get("pipeline") or "distill"])
        environment = ctx.params.get("env") or os.environ.get("KEDRO_ENV", "base")
        title = f"{pipelines} in environment {environment}; all details are in logs/dpdmd.log"
        try:
            with screen.open(title, is_verbose):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if not _is_kedros_own(error):
                raise
            log.debug("the run was refused", exc_info=error)
            raise click.ClickException(one_line(error)) from error


def _is_kedros_own(error: BaseException) -> bool:
    """True if Kedro refused the run by itself, before a node: no frame is of a runner or of this package's own code."""
    paths = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = (path.is_relative_to(PACKAGE) and path not in (Path(__file__), PACKAGE / "screen.py") for path in paths)
    return not any(ours) and not any(path.is_relative_to(RUNNERS) for path in paths)


VERBOSE = click.Option(["--verbose", "-v"], is_flag=True, help="Show every line of the log instead of one per stage.")
run = RunCommand("run", params=[*kedro_run.params, VERBOSE], callback=kedro_run.callback, help=kedro_run.help)


@click.group()
def cli() -> None:
    """Commands of this project that replace Kedro's."""


cli.add_command(run)
