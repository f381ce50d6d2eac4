"""Parts that several nodes share: their schema, their common inputs, the text that a node shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io
from server import PromptServer

from .. import sampling
from ..schedules import MAX_STEPS

_CATEGORY = "DP-DMD"
_ALIASES = ("DP-DMD", "DPDMD")
_MAX_SEED = 2**64 - 1


def schema(aliases: Sequence[str] = (), **fields: Any) -> io.Schema:
    """A schema in this pack's category, found by the pack's name and by the node's own search words."""
    if "search_aliases" in io.Schema.__dataclass_fields__:  # older versions of ComfyUI lack it
        fields["search_aliases"] = [*_ALIASES, *aliases]
    return io.Schema(category=_CATEGORY, **fields)


def seed_input(name: str) -> io.Int.Input:
    """The input for the first picture's seed."""
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=_MAX_SEED,
        control_after_generate=True,
        tooltip="Seed of the first picture; picture i of a batch has seed + i. The same seed gives the same picture.",
    )


def steps_input(tooltip: str) -> io.Int.Input:
    """The input for the number of steps; 0 is the trained number."""
    return io.Int.Input("steps", default=0, min=0, max=MAX_STEPS, tooltip=tooltip)


def denoise_input() -> io.Float.Input:
    """The input for the share of the steps that image-to-image runs."""
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Image-to-image: the share of the steps that runs, counted from the end. The levels stay the trained "
        "ones: of 4 steps, 0.75 runs the last 3 and 0.5 the last 2. On the published SD3.5 schedule 0.25 changes "
        "almost nothing.",
    )


def method_input() -> io.Combo.Input:
    """The input for the way in which a few-step model takes its steps."""
    return io.Combo.Input(
        "method",
        options=[sampling.AUTO, *sampling.METHODS],
        default=sampling.AUTO,
        tooltip="How the few-step model takes its steps. auto: as its file says; without a DP-DMD header, "
        "deterministic for flow models and re-noise for SDXL. Lightning needs deterministic.",
    )


def per_image_seed_input() -> io.Boolean.Input:
    """The input for noise per picture or per batch."""
    return io.Boolean.Input(
        "per_image_seed",
        default=True,
        tooltip="On: picture i of a batch equals the one that seed + i gives alone. Off: KSampler's noise, where only "
        "the first picture can be reproduced alone.",
    )


def show_text(text: str, node_id: str | None) -> None:
    """Show a text in the node, and in the terminal."""
    logging.info("DP-DMD: %s", text)
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)
