"""Progress of a training: the screen, lines in the log, and a stop between two cycles on Ctrl-C."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta

from dpdmd_pipeline.screen import screen
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.signals import recorded_signals

log = logging.getLogger(__name__)

_LOSSES = {"dmd_loss": "dmd", "diversity_loss": "diversity", "fake_score_loss": "fake_score"}


def method_name(recipe: Recipe) -> str:
    return "DP-DMD" if recipe.anchored_steps else "DMD"


def follow(records: Iterator[dict], done: int, recipe: Recipe, log_every: int, track: Callable[[dict], None]) -> None:
    """Run the loop to its end.

    Args:
        records: of the cycles after `done`, the cycles of an earlier run.
        log_every: cycles between lines in the log.
        track: called with each record.

    Raises:
        KeyboardInterrupt: after the current cycle, if a signal asked to stop.
    """
    name = method_name(recipe)
    begin, shown = time.monotonic(), ""
    group = "train" if recipe.anchored_steps else "train_dmd"
    with recorded_signals() as signals, closing(records), screen.bar(name, recipe.max_steps, group) as advance:
        for cycle, record in enumerate(records, done + 1):
            seconds = (time.monotonic() - begin) / (cycle - done)
            images = recipe.batch_size * (recipe.fake_score_turns + 1) / seconds
            facts = ", ".join(f"{word} {record[key]:.4f}" for key, word in _LOSSES.items()) + f", {images:.0f} images/s"
            shown = _diversity(record) or shown
            advance(cycle, shown or f"DMD loss {record['dmd_loss']:.3f}")
            track(record)
            if cycle % log_every == 0 or cycle == done + 1:
                remaining = timedelta(seconds=round((recipe.max_steps - cycle) * seconds))
                log.info("%s cycle %d/%d: %s, %s left", name, cycle, recipe.max_steps, facts, remaining)
            if signals and cycle < recipe.max_steps:
                log.warning("%s: stopped after cycle %d; run the same command to continue", name, cycle)
                raise KeyboardInterrupt


def _diversity(record: dict) -> str:
    """`diversity 94 % of the teacher's`; empty in a cycle that was not measured."""
    ours, teachers = record.get("latent_diversity"), record.get("latent_diversity_teacher")
    return f"diversity {100 * ours / teachers:.0f} % of the teacher's" if ours is not None and teachers else ""
