"""Nodes of the sample stage."""

import json
import re
from pathlib import Path
from typing import Any

from dpdmd_pipeline.pipelines.sample.options import SampleOptions


def draw_samples(export: Path, teacher: Path, options: SampleOptions) -> dict[str, Any]:
    """Pictures by name, and a grid of them: a row per prompt, a column per seed."""
    import torch
    from PIL import Image

    from dpdmd_pipeline.exporting.sample import sample

    seeds = [options.seed + number for number in range(options.images_per_prompt)]
    images = sample(
        exported(export, options.form),
        [prompt for prompt in options.prompts for _ in seeds],
        seeds * len(options.prompts),
        teacher=None if options.form == "diffusers" else teacher,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
    )
    rows = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (len(options.prompts), len(seeds)))
    pictures = {
        f"{number:02d}_{_slug(prompt)}_{seed}": Image.fromarray(picture.numpy())
        for number, (prompt, row) in enumerate(zip(options.prompts, rows, strict=True))
        for seed, picture in zip(seeds, row, strict=True)
    }
    sheet = rows.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # [prompts * H, seeds * W, 3]
    return {"grid": Image.fromarray(sheet.numpy()), **pictures}


def exported(export: Path, form: str) -> Path:
    """Where one form of an export lies.

    Raises:
        ValueError: if the export has it not.
    """
    files = json.loads((export / "config.json").read_text(encoding="utf-8"))["files"]
    if form not in files:
        raise ValueError(f"sample.form={form}: {export} holds {', '.join(files)}; choose one, or export it too")
    return export / files[form]


def _slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "empty"
