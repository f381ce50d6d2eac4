"""Trains the embedded world's CLIP on its pictures and captions: under a minute of one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdmd_pipeline.shapes.clip import full_captions, make_clip, save_clip
from dpdmd_pipeline.shapes.world import CAPTION_TEMPLATES, NUM_MODES, NUM_PROMPTS, captions, gallery
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.clip_recipe import ClipRecipe
from dpdmd_pipeline.training.teacher import fit

if TYPE_CHECKING:
    from open_clip import CLIP

_LARGEST_SCALE = 100  # of the logits, as in CLIP (arXiv:2103.00020, section 2.5): beyond it training is unstable


def train_clip(
    recipe: ClipRecipe, folder: Path, state: Path, follow: Callable[[int, Iterator[tuple[int, float]]], None]
) -> CLIP:
    """Train and save to a folder that open_clip loads; what is finished is not trained again.

    Args:
        recipe: how it is trained.
        folder: of the model; whole once its weights are there.
        state: folder of the checkpoints.
        follow: runs the fit to its end: (total steps, records).
    """
    import open_clip

    model = make_clip(folder, recipe.seed)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    loss_at = partial(clip_loss, model.train(), tokenizer(full_captions()), tokenizer(captions()), recipe)
    kept = Checkpoints(state)
    records = fit(model, loss_at, recipe, seed=recipe.seed, checkpoints=kept, checkpoint_every=recipe.checkpoint_every)
    follow(recipe.steps, records)
    save_clip(model.eval(), folder)
    return model


def clip_loss(model: CLIP, full: Tensor, short: Tensor, recipe: ClipRecipe, generator: torch.Generator) -> Tensor:
    """Contrast of pictures with their full captions (both ways), and of pictures with the world's prompts.

    The prompts are short: many pictures of a batch share one, which the plain contrast would count as wrong.

    Args:
        model: to train.
        full, short: tokens of `full_captions()` and of `captions()`, [n, L].
        recipe: batch size and noise.
        generator: of this step.
    """
    pictures = gallery()
    row = torch.randperm(len(pictures), generator=generator)[: recipe.batch_size]
    images = _noised(pictures[row], recipe.noise, generator)
    image = model.encode_image(images * 2 - 1, normalize=True)
    scale = model.logit_scale.exp().clamp(max=_LARGEST_SCALE)
    logits = scale * image @ model.encode_text(full[row], normalize=True).T
    own = torch.arange(len(row))
    contrast = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    template = int(torch.randint(len(CAPTION_TEMPLATES), (), generator=generator))
    prompts = short[template * NUM_PROMPTS : (template + 1) * NUM_PROMPTS]
    to_prompts = scale * image @ model.encode_text(prompts, normalize=True).T
    return contrast + F.cross_entropy(to_prompts, row // NUM_MODES)


def _noised(images: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Images with noise of a standard deviation of their own each, in [0, 1]."""
    sigma = torch.rand(len(images), 1, 1, 1, generator=generator) * largest
    return (images + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def retrieval(model: CLIP, folder: Path) -> dict[str, float]:
    """Share of legal pictures whose nearest caption is their own: of all full ones, and of the canonical prompts."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    image = model.encode_image(gallery() * 2 - 1, normalize=True)
    found = {}
    for name, texts, owner in (
        ("full_captions", full_captions(), torch.arange(len(image))),
        ("prompts", captions()[:NUM_PROMPTS], torch.arange(len(image)) // NUM_MODES),
    ):
        nearest = (image @ model.encode_text(tokenizer(texts), normalize=True).T).argmax(1)
        found[name] = (nearest == owner).float().mean().item()
    return found
