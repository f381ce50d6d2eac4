"""Nodes of the sample stage."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.pipelines.sample.options import SampleOptions


def draw_samples(export: Path, teacher: Path, options: SampleOptions) -> tuple[dict[str, Any], Any]:
    """Functions that return a prompt's pictures by seed, and a grid with a row per prompt and a column per seed."""
    import torch
    from PIL import Image

    from dpdmd_pipeline.exporting.sample import sample

    seeds = [options.seed + number for number in range(options.images_per_prompt)]
    images = sample(
        _form_path(export, options.form),
        [prompt for prompt in options.prompts for _ in seeds],
        seeds * len(options.prompts),
        teacher=teacher if options.teacher_start or options.form != "diffusers" else None,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
        teacher_start=options.teacher_start,
        size=options.size,
    )
    rows = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (len(options.prompts), len(seeds)))
    pictures = {prompt: partial(_by_seed, seeds, row) for prompt, row in zip(options.prompts, rows, strict=True)}
    sheet = rows.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # [prompts * H, seeds * W, 3]
    return pictures, Image.fromarray(sheet.numpy())


def _by_seed(seeds: Sequence[int], pictures: Any) -> dict[int, Any]:
    """Convert one prompt's pictures, uint8 [n, H, W, 3], to Pillow images by seed."""
    from PIL import Image

    return dict(zip(seeds, map(Image.fromarray, pictures.numpy()), strict=True))


def _form_path(export: Path, form: str) -> Path:
    """Path of one form of an export."""
    files = json.loads((export / "config.json").read_text(encoding="utf-8"))["files"]
    if form not in files:
        raise ValueError(
            f"sample.form={form}: {export} has {', '.join(files)}: choose one of them, or add it to export.formats"
        )
    return export / files[form]
