"""Kedro hooks: they call the checks of `planning` before a run, and show one line instead of a traceback after it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from logging import FileHandler
from pathlib import Path
from typing import Any

import click
from kedro.framework.hooks import hook_impl

from dpdmd_pipeline.planning import files, options
from dpdmd_pipeline.planning.judging import option
from dpdmd_pipeline.planning.launcher import VARIABLES, Launcher, launches_of, rendezvous_of
from dpdmd_pipeline.planning.messages import error_line, run_arguments
from dpdmd_pipeline.screen import screen
from dpdmd_pipeline.wording import one_line

log = logging.getLogger(__name__)


class ConfigHooks:
    """Refuse a run that cannot succeed before anything is loaded, and a downloaded teacher that cannot be read."""

    _check_download: Callable[[], list[str]] = list  # no lines
    _meeting: Any = None  # of several machines

    @hook_impl(tryfirst=True)
    def after_context_created(self, context) -> None:
        from kedro.validation import ParameterValidationError

        with _one_line():
            local_rank = Launcher.of(os.environ).local_rank
        if local_rank:
            log.info("this process ends: the launcher's first one on this machine starts others for the GPUs")
            raise SystemExit(0)
        loader = context.config_loader
        _refuse([options.unknown_environment(Path(loader.conf_source), context.env)])
        with _one_line("the configuration cannot be read: ", Exception):  # whatever YAML and OmegaConf raise
            lines = [options.shared_folder(loader)]
            _ = loader["catalog"], loader["parameters"]
        with _one_line("", ValueError, ParameterValidationError):
            _refuse([*lines, *options.refused_options(loader, options.requested_pipelines())])
            _ = context.params

    @hook_impl(tryfirst=True)
    def before_pipeline_run(self, run_params, pipeline, catalog) -> None:
        _handle_sigterm_like_control_c()
        project, arguments = Path(run_params["project_path"]), _arguments(run_params)
        if arguments and "run_arguments" in catalog:
            catalog.get("run_arguments").save(arguments)
        only_missing = run_params.get("only_missing_outputs")
        with _one_line():
            missing = [] if only_missing else [*files.missing_inputs(pipeline, catalog, project, arguments)]
            _refuse([*missing, *files.unwritable_folders(pipeline, catalog, project)])
        from dpdmd_pipeline.planning.checks import refuse_run
        from dpdmd_pipeline.planning.teacher import unreadable_teacher

        lines, launches = refuse_run(pipeline, catalog, arguments), launches_of(pipeline, catalog)
        self._meet_machines(launches, lines)
        self._check_download = partial(unreadable_teacher, pipeline, catalog, is_downloaded=True)

    def _meet_machines(self, launches: dict[str, Any], lines: list[str]) -> None:
        """Wait for the run's other machines, to lead or to help, or tell them why this one refuses the run."""
        with _one_line():
            several = rendezvous_of(launches)
            if lines and several:
                from dpdmd_pipeline.training.machines import refuse

                refuse(*several, "; ".join(lines))
            _refuse([*lines, Launcher.of(os.environ).refused(launches)])
            for name in VARIABLES:
                os.environ.pop(name, None)
            if several:
                from dpdmd_pipeline.training.launch import meet_or_help

                self._meeting = meet_or_help(*several)

    @hook_impl(tryfirst=True)
    def after_pipeline_run(self) -> None:
        if self._meeting:
            self._meeting.end()

    @hook_impl
    def on_pipeline_error(self) -> None:
        if self._meeting:
            self._meeting.leave()

    @hook_impl
    def after_dataset_loaded(self, dataset_name) -> None:
        if dataset_name == "teacher":  # a node's first load has downloaded the weights
            _refuse(self._check_download())
            self._check_download = list


class IncompleteError(click.ClickException):
    """Everything was written, but some requested metrics could not be measured, and `evaluate.strict` is set."""

    exit_code = 3  # the same as of `dpdmd-pipeline score`


class ReportHooks:
    """Name what to open and the gaps of the evaluation at the end of a run; gaps are an error if `evaluate.strict`."""

    @hook_impl
    def after_pipeline_run(self, run_params, pipeline, catalog) -> None:
        project = Path(run_params["project_path"])
        for name in sorted(pipeline.all_outputs() & {"export", "grid_samples", "report_html", "report_md", "samples"}):
            screen.at_end(files.label(name, catalog, project))
        if "metrics" in pipeline.all_outputs() and (gaps := _gaps(catalog.get("metrics").load())):
            line = f"{gaps}: {files.label('metrics', catalog, project)} says why; all the rest is done"
            if option(catalog, "evaluate", "strict"):
                raise IncompleteError(line)
            screen.at_end(line)


class ErrorHooks:
    """Turn errors that a user can mend into one line; the traceback goes to the log file."""

    def __init__(self) -> None:
        self._node = self._dataset = ""
        for name in ("kedro.pipeline.node", "kedro.runner.sequential_runner", "kedro.runner.thread_runner"):
            logging.getLogger(name).addFilter(_lower_level_of_mendable)

    @hook_impl
    def before_node_run(self, node) -> None:
        self._node, self._dataset = node.name, ""  # its inputs are loaded

    @hook_impl
    def before_dataset_loaded(self, dataset_name) -> None:
        self._dataset = dataset_name

    @hook_impl
    def before_dataset_saved(self, dataset_name) -> None:
        self._dataset = dataset_name

    @hook_impl
    def on_pipeline_error(self, error, run_params, catalog) -> None:
        if isinstance(error, click.ClickException):
            return
        log.debug("the run failed", exc_info=error)
        project = Path(run_params["project_path"])
        dataset = files.label(self._dataset, catalog, project) if self._dataset else f"a file of {self._node}"
        if line := error_line(error, dataset, _arguments(run_params)):
            raise click.ClickException(line) from error


def prepare_log_files() -> None:
    """Make the folders of the log files; log to the screen only if that fails."""
    for name in (None, "kedro"):
        logger = logging.getLogger(name)
        for handler in [h for h in logger.handlers if isinstance(h, FileHandler)]:
            path = Path(handler.baseFilename)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as error:
                logger.removeHandler(handler)
                log.debug("no log file %s: %s", path, error)


def _arguments(run_params: dict[str, Any]) -> str:
    return run_arguments(run_params["env"], (run_params.get("runtime_params") or {}).get("run"))


@contextmanager
def _one_line(beginning: str = "", *kinds: type[Exception]) -> Iterator[None]:
    """Show errors of these kinds, or else of values and files, in one line without a traceback."""
    kinds = kinds or (ValueError, OSError)
    try:
        yield
    except kinds as error:
        raise click.ClickException(beginning + one_line(error)) from error


def _refuse(lines: Iterable[str | None]) -> None:
    """End the run with these lines, if there are any."""
    lines = [line for line in lines if line]
    if len(lines) > 1:
        lines = [f"{len(lines)} things are wrong:", *lines]
    if lines:
        raise click.ClickException("\n  ".join(lines))


def _handle_sigterm_like_control_c() -> None:
    """Run the cleanup of Ctrl-C also when a scheduler stops the job."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there are signals handled
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _gaps(metrics: dict[str, Any]) -> str:
    """Short text on metrics and pictures that the evaluation could not measure; empty if it measured all."""
    models = [entry for entry in metrics.values() if isinstance(entry, dict)]
    missing = sorted({name for entry in models for name in entry.get("missing", {})})
    faults = sum(count for entry in models for count in entry.get("faults", {}).values())
    gaps = {f"not measured: {', '.join(missing)}": missing, f"{faults} pictures or prompts left out of figures": faults}
    return "; ".join(text for text, count in gaps.items() if count)


def _lower_level_of_mendable(record: logging.LogRecord) -> bool:
    """Send Kedro's own words on an error that gets one line, and its hint at --from-nodes, to the log file only."""
    error = sys.exc_info()[1]
    if error is not None and error_line(error):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return True
