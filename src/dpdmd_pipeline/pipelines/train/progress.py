"""A run as its user sees it: a bar, lines in the log, and an end between two steps when it is asked for."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dpdmd_pipeline.training.recipe import Recipe

log = logging.getLogger(__name__)

_LOSSES = {"dmd_loss": "dmd", "diversity_loss": "diversity", "fake_score_loss": "fake_score"}


def follow(records: Iterator[dict], done: int, recipe: Recipe, log_every: int) -> list[dict]:
    """Run the loop to its end; returns the records of its new steps.

    Args:
        records: of the steps after `done`.
        done: steps of an earlier run.
        recipe: of the student.
        log_every: steps between lines in the log.
    """
    name = "DP-DMD" if recipe.anchored_steps else "DMD"
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"))
    new: list[dict] = []
    begun = time.monotonic()
    with _noted_signals() as noted, closing(records), Progress(TextColumn("{task.description}"), *columns) as progress:
        bar = progress.add_task(name, total=recipe.max_steps, completed=done, facts="")
        for record in records:
            new.append(record)
            step = done + len(new)
            images = len(new) * recipe.batch_size * (recipe.fake_score_turns + 1) / (time.monotonic() - begun)
            facts = ", ".join(f"{word} {record[key]:.4f}" for key, word in _LOSSES.items()) + f", {images:.0f} images/s"
            progress.update(bar, completed=step, facts=facts)
            if step % log_every == 0:
                log.info("%s step %d/%d: %s", name, step, recipe.max_steps, facts)
            if noted and step < recipe.max_steps:
                log.warning("%s: stopped after step %d; the same command goes on from there", name, step)
                raise KeyboardInterrupt
    return new


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted, so that a run ends between two steps; the second is obeyed at once."""
    noted: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield noted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
