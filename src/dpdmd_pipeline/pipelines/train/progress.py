"""Progress of a run for its user: a bar, lines in the log, and a stop between two cycles on Ctrl-C."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dpdmd_pipeline.training.recipe import Recipe

log = logging.getLogger(__name__)

_LOSSES = {"dmd_loss": "dmd", "diversity_loss": "diversity", "fake_score_loss": "fake_score"}


def method_name(recipe: Recipe) -> str:
    return "DP-DMD" if recipe.anchored_steps else "DMD"


def follow(records: Iterator[dict], done: int, recipe: Recipe, log_every: int) -> None:
    """Run the loop to its end.

    Args:
        records: of the cycles after `done`, the cycles of an earlier run.
        log_every: cycles between lines in the log.

    Raises:
        KeyboardInterrupt: after the current cycle, if a signal asked to stop.
    """
    name = method_name(recipe)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"))
    begin = time.monotonic()
    with (
        _recorded_signals() as signals,
        closing(records),
        Progress(TextColumn("{task.description}"), *columns) as progress,
    ):
        bar = progress.add_task(name, total=recipe.max_steps, completed=done, facts="")
        for cycle, record in enumerate(records, done + 1):
            seconds = (time.monotonic() - begin) / (cycle - done)
            images = recipe.batch_size * (recipe.fake_score_turns + 1) / seconds
            facts = ", ".join(f"{word} {record[key]:.4f}" for key, word in _LOSSES.items()) + f", {images:.0f} images/s"
            progress.update(bar, completed=cycle, facts=facts)
            if cycle % log_every == 0 or cycle == done + 1:
                left = timedelta(seconds=round((recipe.max_steps - cycle) * seconds))
                log.info("%s cycle %d/%d: %s, %s left", name, cycle, recipe.max_steps, facts, left)
            if signals and cycle < recipe.max_steps:
                log.warning("%s: stopped after cycle %d; run the same command to continue", name, cycle)
                raise KeyboardInterrupt


@contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Record the first Ctrl-C or SIGTERM, so that the run ends between two cycles; the second interrupts at once."""
    signals: list[int] = []

    def record(number: int, _frame: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield signals
        return
    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
