"""Nodes of the clip stage."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.pipelines.clip.options import ClipOptions
from dpdmd_pipeline.planning.identity import code_hash, open_state
from dpdmd_pipeline.screen import screen
from dpdmd_pipeline.wording import made

log = logging.getLogger(__name__)

SCHEMA = 1


def train_embedded_clip(clip_state: Path, options: ClipOptions) -> Callable[[Path], None]:
    """Function that trains on the legal pictures and their captions, on the CPU, and writes a folder for open_clip."""
    from dpdmd_pipeline.training.clip import train_clip

    recipe = options.recipe
    facts = recipe.model_dump(mode="json")
    state = open_state(clip_state, fingerprint(SCHEMA, facts, code_hash("training.clip")), "clip", facts, recipe.steps)

    def follow(total: int, records: Iterator[tuple[int, float]]) -> None:
        loss = None
        with screen.bar("clip", total) as advance:
            for step, loss in records:
                advance(step, f"loss {loss:.4f}")
                if step % recipe.checkpoint_every == 0 or step == total:
                    log.info("clip: step %d of %d, loss %.4f", step, total, loss)
        if loss is None:
            made.info("reused the finished training")

    return lambda folder: train_clip(recipe, folder, state, follow)


def judge_clip(shapes_clip: Path) -> dict[str, dict[str, float]]:
    """Share of all legal pictures nearest to their own caption; chance gives 1 in 864, and 1 in 12 for prompts."""
    from dpdmd_pipeline.metrics.embedders import load_open_clip
    from dpdmd_pipeline.shapes.world import NUM_MODES, NUM_PROMPTS
    from dpdmd_pipeline.training.clip import retrieval

    pictures = NUM_PROMPTS * NUM_MODES
    n = {"pictures": pictures, "full_captions": pictures, "prompts": NUM_PROMPTS}
    return {"retrieval": retrieval(load_open_clip(shapes_clip)[0], shapes_clip), "n": n}
