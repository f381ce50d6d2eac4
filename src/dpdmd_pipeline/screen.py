"""Screen of a run: a line for each stage, one bar, the results last. Every line of the log is in its file."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kedro.framework.hooks import hook_impl
from rich import get_console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from dpdmd_pipeline.wording import made

SHOWN = ("planning", "training.launch", "training.machines", "pipelines.study")  # whose information is shown at once
WIDTH = 120  # columns where there is no terminal
QUARTERS = 4  # lines of a training where there is no terminal


class Screen(logging.Handler):
    """Hooks and log handler of one run at a time; it does nothing before `open`."""

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self._progress: Progress | None = None
        self._task: Any = None
        self._unfinished: dict[str, set[str]] = {}  # names of nodes and outputs, by stage
        self._made: dict[str, list[str]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        self._passes: dict[str, float] = {}
        self._results: list[Any] = []
        self._stage, self._since, self._stages = "", time.monotonic(), 0

    @contextmanager
    def open(self, title: str, is_verbose: bool) -> Iterator[None]:
        """Show a run from its first line to its end; if it is verbose, all lines of the log instead."""
        self._clear()
        if is_verbose:
            _show_all()
            yield
            return
        loggers = [logging.getLogger(name) for name in (made.name, *(f"dpdmd_pipeline.{name}" for name in SHOWN))]
        console = get_console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = WIDTH
        is_narrow = console.width <= WIDTH  # there the bar has what the texts leave
        bar = BarColumn(None if is_narrow else 40, table_column=Column(ratio=1 if is_narrow else None, min_width=8))
        texts = [TextColumn("{task.description}"), bar, TextColumn("{task.fields[facts]}")]
        console.print(title, highlight=False)
        self._progress = Progress(
            SpinnerColumn(), *texts, console=console, transient=True, expand=is_narrow, disable=not console.is_terminal,
            refresh_per_second=4,
        )  # fmt: skip
        self._task = self._progress.add_task("options, weights and disk are checked", total=None, facts="")
        for logger in loggers:
            logger.addHandler(self)
        try:
            with self._progress:
                yield
        finally:
            for logger in loggers:
                logger.removeHandler(self)
            self._show_results()
            self._clear()

    def emit(self, record: logging.LogRecord) -> None:
        self._passes.update(getattr(record, "passes", {}))  # by stage, of the whole run
        if record.name == made.name:
            self._made[self._stage].append(record.getMessage())
        elif record.levelno == logging.INFO:  # the configured handlers show warnings
            self.show(Text(f"     {record.getMessage()}", style="dim"))

    def show(self, line: Any) -> None:
        """Print above the bar; only a terminal breaks lines."""
        console = get_console()
        is_text = not isinstance(line, Table)
        console.print(line, markup=False, highlight=False, soft_wrap=is_text and not console.is_terminal)

    def at_end(self, *lines: Any) -> None:
        """Print at the end of the run; at once if no run is shown."""
        self._results += lines
        if not self._progress:
            self._show_results()

    def _show_results(self) -> None:
        while self._results:
            self.show(self._results.pop(0))

    # ---- stages

    @hook_impl
    def before_pipeline_run(self, pipeline: Any) -> None:
        for node in pipeline.nodes:
            self._unfinished.setdefault(_stage(node), set()).update({node.name, *node.outputs})
        self._stages = len(self._unfinished)

    @hook_impl
    def before_dataset_loaded(self, node: Any) -> None:
        self._enter(node)

    @hook_impl
    def after_node_run(self, node: Any) -> None:
        self._finish(node, node.name)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, node: Any) -> None:
        self._finish(node, dataset_name)

    def _enter(self, node: Any) -> None:
        now = time.monotonic()
        self._seconds[self._stage] += now - self._since
        self._since = now
        if self._progress and self._stage != _stage(node):
            self._stage = _stage(node)
            self._progress.reset(self._task, total=None, description=self._heading(), facts="")

    def _heading(self) -> str:
        return f"{self._stages - len(self._unfinished) + 1}/{self._stages} {self._stage}"

    def _finish(self, node: Any, name: str) -> None:
        stage = _stage(node)
        if not self._progress or stage not in self._unfinished:
            return
        self._unfinished[stage].discard(name)
        if not self._unfinished[stage]:
            self._enter(node)
            number = self._heading().partition(" ")[0]
            del self._unfinished[stage]
            self._passes.pop(stage, None)
            line = Table.grid(padding=(0, 2))
            for width, style in ((4, "dim"), (8, "bold"), (7, "cyan")):
                line.add_column(min_width=width, no_wrap=True, style=style, justify="left" if width == 8 else "right")
            facts = Text("; ".join(dict.fromkeys(self._made.pop(stage, []))))
            line.add_row(number, stage, duration(self._seconds.pop(stage, 0)), facts)
            self.show(line)

    # ---- bar

    @contextmanager
    def bar(self, name: str, total: int, stage: str = "") -> Iterator[Callable[[int, str], None]]:
        """Show how far a training is; yields a function of the step and of the facts beside the bar.

        Args:
            stage: its name among the passes of the run; with it the time left is that of the whole run.
        """
        begin, own = time.monotonic(), self._passes.pop(stage, 0)
        steps: list[int] = []  # the first one of this run
        marks = {total * quarter // QUARTERS for quarter in range(1, QUARTERS + 1)}

        def advance(step: int, facts: str) -> None:
            if not self._progress:
                return
            is_first = not steps
            steps[:] = steps or [step]
            seconds = (time.monotonic() - begin) / (step - steps[0] + 1)
            left = seconds * (total - step + (total * sum(self._passes.values()) / own if own else 0))
            text = f"{name} {step}/{total}, {duration(left)} left"
            numbered = f"{self._heading().split()[0]} {text}"
            self._progress.update(self._task, total=total, completed=step, description=numbered, facts=facts)
            if not get_console().is_terminal and (is_first or step in marks):
                self.show(f"      {text}; {facts}")

        yield advance
        if self._progress:
            self._progress.reset(self._task, total=None, description=self._heading(), facts="")


def _show_all() -> None:
    """Show every line of the log."""
    for name in (None, "kedro"):
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.INFO)


def _stage(node: Any) -> str:
    """Stage of a node: the folder of `pipelines` that has its function."""
    function = getattr(node.func, "func", node.func)
    path = function.__module__.split(".")
    return path[path.index("pipelines") + 1] if "pipelines" in path else path[-1]


def duration(seconds: float) -> str:
    """`12 s`, `3:05 min`, `2:10 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours}:{minutes:02} h" if hours else f"{minutes}:{round(seconds) % 60:02} min"


screen = Screen()
