"""What a user sees when something is wrong: the thing, its value and the remedy, not a traceback."""

from __future__ import annotations

import copy
import difflib
import errno
import importlib
import logging
import os
import pkgutil
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from logging import FileHandler
from pathlib import Path
from typing import Any

import click
from kedro.framework.hooks import hook_impl

from dpdmd_pipeline.wording import one_line

log = logging.getLogger(__name__)

RUNTIME_PATHS = ("raw_prompts", "raw_eval_prompts", "teacher_model")  # --params that the catalog reads; no node does
DISK_WORDS = {
    "No space left on device": errno.ENOSPC,
    "PytorchStreamWriter failed writing": errno.ENOSPC,
    "unexpected pos": errno.ENOSPC,  # torch.save, its file shorter than what it wrote
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
}
PLAIN = {None, "base", "local"}  # environments that a command need not name
AGAIN = "then run the same command again: finished work is kept"


class ConfigHooks:
    """Refuses a run that cannot go well before anything is loaded."""

    @hook_impl(tryfirst=True)
    def after_context_created(self, context) -> None:
        _refuse_many_processes()
        _refuse_unknown_environment(Path(context.config_loader.conf_source), context.env)
        try:
            parameters = context.config_loader["parameters"]
            known = _groups_of_base(context.config_loader)
        except Exception as error:  # whatever the YAML and OmegaConf libraries raise
            raise click.ClickException(f"the configuration cannot be read: {one_line(error)}") from error
        _refuse([*_unknown_groups(parameters, known), *_wrong_options(parameters, _requested_pipelines())])
        _refuse_what_kedro_refuses(context)

    @hook_impl(tryfirst=True)
    def before_pipeline_run(self, run_params, pipeline, catalog) -> None:
        _end_on_sigterm_as_on_control_c()
        project, env = Path(run_params["project_path"]), run_params["env"]
        if env not in PLAIN and "environment" in catalog:
            catalog.get("environment").save(env)
        missing = [] if run_params.get("only_missing_outputs") else _missing_inputs(pipeline, catalog, project)
        _refuse([*missing, *_unwritable_outputs(pipeline, catalog, project)], env)
        from dpdmd_pipeline.pipelines.evaluate.preflight import refuse_prompts
        from dpdmd_pipeline.pipelines.train.preflight import refuse_run

        _refuse(refuse_prompts(pipeline, catalog), env)
        _refuse(refuse_run(pipeline, catalog), env)


class IncompleteError(click.ClickException):
    """Everything was written, but not everything that was asked for could be measured."""

    exit_code = 3  # as of `python -m dpdmd_pipeline score`


class ReportHooks:
    """Ends a run with where its report lies, and with an exit code that says whether all was measured."""

    @hook_impl
    def after_pipeline_run(self, run_params, pipeline, catalog) -> None:
        project = Path(run_params["project_path"])
        for name in sorted(pipeline.all_outputs() & {"report_html", "report_md"}):
            click.echo(_described(name, catalog, project))
        if "metrics" in pipeline.all_outputs() and (gaps := _unmeasured(catalog.get("metrics").load())):
            raise IncompleteError(f"{gaps}: {_described('metrics', catalog, project)} says why; all the rest is done")


class ErrorHooks:
    """Turns the errors a user can mend into one line; the traceback goes to the log file."""

    def __init__(self) -> None:
        self._node = self._dataset = ""
        for name in ("kedro.pipeline.node", "kedro.runner.sequential_runner", "kedro.runner.thread_runner"):
            logging.getLogger(name).addFilter(_quiet_where_one_line_follows)

    @hook_impl
    def before_node_run(self, node) -> None:
        self._node = node.name

    @hook_impl
    def before_dataset_loaded(self, dataset_name) -> None:
        self._dataset = dataset_name

    @hook_impl
    def before_dataset_saved(self, dataset_name) -> None:
        self._dataset = dataset_name

    @hook_impl
    def after_dataset_loaded(self) -> None:
        self._dataset = ""

    @hook_impl
    def after_dataset_saved(self) -> None:
        self._dataset = ""

    @hook_impl
    def on_pipeline_error(self, error, run_params, catalog) -> None:
        if isinstance(error, click.ClickException):
            return
        log.debug("the run failed", exc_info=error)
        line = error_line(error, self._place(catalog, Path(run_params["project_path"])))
        if line:
            raise click.ClickException(in_environment(line, run_params["env"])) from error

    def _place(self, catalog, project: Path) -> str:
        return _described(self._dataset, catalog, project) if self._dataset else f"a file of {self._node}"


def _unmeasured(metrics: dict[str, Any]) -> str:
    """What the evaluation could not measure, in a few words; empty if it measured all."""
    models = [found for found in metrics.values() if isinstance(found, dict)]
    missing = sorted({name for found in models for name in found.get("missing", {})})
    left_out = sum(count for found in models for count in found.get("faults", {}).values())
    lines = [f"not measured: {', '.join(missing)}"] if missing else []
    return "; ".join([*lines, *([f"{left_out} pictures or prompts left out of figures"] if left_out else [])])


def prepare_log_files() -> None:
    """Make the folders of the log files; where that is not possible, log to the screen only."""
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


# ---- options


def in_environment(line: str, env: str | None) -> str:
    """The line, whose commands run in the environment of this run: what wrote it does not know that there are any."""
    if env in PLAIN:
        return line
    return line.replace("kedro run --pipelines", f"kedro run --env {shlex.quote(env)} --pipelines")


def _refuse(lines: Iterable[str], env: str | None = None) -> None:
    lines = [in_environment(line, env) for line in lines]
    if len(lines) == 1:
        raise click.ClickException(lines[0])
    if lines:
        raise click.ClickException("\n  ".join([f"{len(lines)} things are wrong:", *lines]))


def _end_on_sigterm_as_on_control_c() -> None:
    """What must be put in order at the end of a run is so too when a scheduler ends it."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there are signals handled
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _refuse_many_processes() -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise click.ClickException(
            f"WORLD_SIZE = {world_size}: every process would run the whole line; start one `kedro run`, without "
            "torchrun or accelerate launch: training starts its own processes"
        )


def _refuse_unknown_environment(conf: Path, env: str | None) -> None:
    if not env or not conf.is_dir() or (conf / env).is_dir():  # conf may be an archive, which Kedro opens
        return
    known = sorted(path.name for path in conf.iterdir() if path.is_dir() and not path.name.startswith("."))
    near = _nearest(env, known)
    raise click.ClickException(f"no environment {env!r} in {conf.name}/{near or ':'} choose one of {', '.join(known)}")


def _requested_pipelines() -> dict[str, Any]:
    """The pipelines of this run: Kedro loads no others.

    Raises:
        click.ClickException: if there is none of that name. Faults inside a pipeline's module stay what they are.
    """
    from kedro.framework.project import pipelines

    try:
        return dict(pipelines)
    except ImportError as error:
        asked = re.search(r"'(.+)\.pipelines\.(.+)' module", str(error))
        if error.__cause__ is not None or not asked:
            raise
        rooms = pkgutil.iter_modules(importlib.import_module(f"{asked[1]}.pipelines").__path__)
        names = ", ".join(room.name for room in rooms if room.ispkg)
        raise click.ClickException(f"no pipeline {asked[2]!r}: choose one of {names}") from error


def _groups_of_base(loader) -> set[str]:
    """Names of the parameter groups in conf/base; other environments and --params may only fill these."""
    base = copy.copy(loader)
    base.env, base.runtime_params = base.base_env, {}
    return set(base["parameters"])


def _unknown_groups(parameters: dict[str, Any], known: set[str]) -> Iterator[str]:
    groups = ", ".join(sorted(known))
    for name in sorted(set(parameters) - known - set(RUNTIME_PATHS)):
        yield f"{name}: unknown parameter group{_nearest(name, known, f'; the groups are {groups}')}"


def _wrong_options(parameters: dict[str, Any], pipelines: dict[str, Any]) -> Iterator[str]:
    """One line for each option that its pydantic model refuses."""
    from kedro.validation.type_extractor import TypeExtractor
    from pydantic import BaseModel, ValidationError

    for group, model in sorted(TypeExtractor(pipelines).extract_types_from_pipelines().items()):
        if group not in parameters or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        try:
            model.model_validate(parameters[group])
        except ValidationError as error:
            yield from (_option_line(group, model, fault) for fault in error.errors(include_url=False))


def _option_line(group: str, model: type, fault: dict[str, Any]) -> str:
    """`train.learning_rate = -1: must be greater than 0`."""
    path = ".".join([group, *map(str, fault["loc"])])
    if fault["type"] == "missing":
        return f"{path}: missing"
    if fault["type"] == "extra_forbidden":
        known = _fields(model, fault["loc"][:-1])
        near = _nearest(str(fault["loc"][-1]), known, f"; there are {', '.join(known)}" if known else "")
        return f"{path} = {_short(fault['input'])}: unknown option{near}"
    reason = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    reason = one_line(re.sub(r"^Input should (be|have) ", r"must \1 ", reason))
    return f"{path}: {reason}" if isinstance(fault["input"], dict) else f"{path} = {_short(fault['input'])}: {reason}"


def _fields(model: Any, loc: tuple[Any, ...]) -> list[str]:
    """Names of the options at `loc` inside a model; none where the way leads through something else."""
    for name in loc:
        field = getattr(model, "model_fields", {}).get(name)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def _nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else otherwise


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_what_kedro_refuses(context) -> None:
    from kedro.validation import ParameterValidationError

    try:
        _ = context.params
    except ParameterValidationError as error:
        raise click.ClickException(one_line(error)) from error


# ---- inputs and outputs


def _missing_inputs(pipeline, catalog, project: Path) -> Iterator[str]:
    missing = [name for name in sorted(pipeline.inputs()) if not _is_there(name, catalog)]
    makers = _makers() if any(not name.startswith("params:") for name in missing) else {}
    for name in missing:
        if name.startswith("params:"):
            group = name.removeprefix("params:")
            yield f"{group}: no such parameter group: write it into conf/base/parameters_{group}.yml"
        elif name in makers:
            yield f"missing {_described(name, catalog, project)}: run `kedro run --pipelines {makers[name]}` first"
        else:
            yield f"missing {_described(name, catalog, project)}: put it there, or name another in conf or --params"


def _is_there(name: str, catalog) -> bool:
    if name not in catalog:
        return False
    # of the first the stage knows which it needs, of the second that there may be none; it says so
    if name in RUNTIME_PATHS or getattr(catalog.get(name), "optional", False):
        return True
    try:
        return name.startswith("params:") or name == "parameters" or catalog.exists(name)
    except Exception as error:
        line = error_line(error, name)
        if line is None:
            raise
        raise click.ClickException(line) from error


def _makers() -> dict[str, str]:
    """For each dataset, the stage that makes it; loads all pipelines."""
    from kedro.framework.project import pipelines

    pipelines.set_requested(None)
    stages = sorted(pipelines.items(), key=lambda item: -len(item[1].nodes))
    return {dataset: name for name, stage in stages for dataset in stage.all_outputs() if name != "__default__"}


def _unwritable_outputs(pipeline, catalog, project: Path) -> Iterator[str]:
    folders = set()
    for name in pipeline.all_outputs():
        path = _filepath(name, catalog)
        if path is not None:
            folders.add(next(folder for folder in path.parents if folder.exists()))
    for folder in sorted(folders):
        if not os.access(folder, os.W_OK):
            yield f"{_relative(folder, project)} is not writable: change its permissions or its disk, {AGAIN}"


def _described(name: str, catalog, project: Path) -> str:
    path = _filepath(name, catalog)
    return f"{name} ({_relative(path, project)})" if path else name


def _filepath(name: str, catalog) -> Path | None:
    path = getattr(catalog.get(name), "_filepath", None) if name in catalog else None
    return Path(path) if path else None


def _relative(path: Path, project: Path) -> Path:
    return path.relative_to(project) if path.is_relative_to(project) else path


# ---- errors while running


def error_line(error: BaseException, place: str = "") -> str | None:
    """What to tell a user; None for what only a programmer can mend.

    A user can mend what the disk refuses, what a dataset cannot read, and what this package refuses by itself.

    Args:
        error: as it left a node or a dataset; Kedro's wrapping is taken off.
        place: the dataset being read or written, for errors that do not name a file.
    """
    cause = _unwrapped(error)
    if line := _disk_line(cause, place):
        return line
    if _is_out_of_memory(cause):
        return f"out of memory: {one_line(cause) or type(cause).__name__}; lower the batch size, {AGAIN}"
    if isinstance(cause, OSError):
        name = cause.filename or place
        return f"{name}: {cause.strerror}" if cause.strerror and name else one_line(cause)
    if "Failed while loading data" in str(error) and isinstance(cause, ValueError) and not _is_ours(cause):
        return f"{place or 'a dataset'} cannot be read: {one_line(cause)}; delete it, {AGAIN}"
    # Other types out of our frames (TypeError, KeyError, RuntimeError from torch) are bugs.
    mendable = isinstance(cause, ValueError | FloatingPointError) or type(cause).__name__ == "SafetensorError"
    return one_line(cause) if mendable and _is_ours(cause) else None


def _unwrapped(error: BaseException) -> BaseException:
    from kedro.io import DatasetError

    while isinstance(error, DatasetError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return error


def _disk_line(error: BaseException, place: str) -> str | None:
    """For a full or closed disk."""
    number, name = _disk_errno(error), getattr(error, "filename", None) or place or "a file"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {name} could not be written; free some space, {AGAIN}"
    if number == errno.EROFS:
        return f"{name} is on a read-only file system; make it writable, {AGAIN}"
    if number in (errno.EACCES, errno.EPERM):
        return f"no permission for {name}; change its owner or mode, {AGAIN}"
    return None


def _disk_errno(error: BaseException) -> int | None:
    """The system's error number; torch.save and safetensors tell it in words only."""
    if isinstance(error, OSError):
        return error.errno
    if "inline_container" in str(error) or type(error).__name__ == "SafetensorError":
        return next((number for words, number in DISK_WORDS.items() if words in str(error)), None)
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost frame is in this package."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _quiet_where_one_line_follows(record: logging.LogRecord) -> bool:
    """Kedro's own words on an error we put in one line, and its hint at --from-nodes, go to the log file only."""
    error = sys.exc_info()[1]
    if error is not None and error_line(error):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return True
