"""Train the embedded world's CLIP on its images and captions, in under a minute of one core."""

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
from dpdmd_pipeline.training.teacher import fit
from dpdmd_pipeline.training.teacher_recipe import ClipRecipe

if TYPE_CHECKING:
    from open_clip import CLIP

_LARGEST_SCALE = 100  # of the logits, as in CLIP (arXiv:2103.00020, section 2.5): beyond it training is unstable


def train_clip(
    recipe: ClipRecipe, folder: Path, state: Path, follow: Callable[[int, Iterator[tuple[int, float]]], None]
) -> CLIP:
    """Train the CLIP and save it to a folder that open_clip loads; the folder is complete once it has weights.

    `state` is the folder of the checkpoints. `follow` runs the fit to its end: (total steps, records).
    """
    import open_clip

    model = make_clip(folder, recipe.seed)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    loss_at = partial(clip_loss, model.train(), tokenizer(full_captions()), tokenizer(captions()), recipe)
    every = recipe.checkpoint_every
    records = fit(model, loss_at, recipe, seed=recipe.seed, checkpoints=Checkpoints(state), checkpoint_every=every)
    follow(recipe.steps, records)
    save_clip(model.eval(), folder)
    return model


def clip_loss(model: CLIP, full: Tensor, short: Tensor, recipe: ClipRecipe, generator: torch.Generator) -> Tensor:
    """Contrast of images with their full captions (both ways), plus contrast of images with the world's prompts.

    The prompts are short: many images of a batch share one, which the plain contrast would count as wrong. `full` and
    `short` are tokens of `full_captions()` and of `captions()`, [n, L].
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
    """Add noise to images, each with its own standard deviation; clamped to [0, 1]."""
    sigma = torch.rand(len(images), 1, 1, 1, generator=generator) * largest
    return (images + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def retrieval(model: CLIP, folder: Path) -> dict[str, float]:
    """Share of legal images whose nearest caption is their own, among all full captions and among the prompts."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    image = model.encode_image(gallery() * 2 - 1, normalize=True)
    shares = {}
    for name, texts, owner in (
        ("full_captions", full_captions(), torch.arange(len(image))),
        ("prompts", captions()[:NUM_PROMPTS], torch.arange(len(image)) // NUM_MODES),
    ):
        nearest = (image @ model.encode_text(tokenizer(texts), normalize=True).T).argmax(1)
        shares[name] = (nearest == owner).float().mean().item()
    return shares
