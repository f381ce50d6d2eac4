"""Nodes of the evaluate stage."""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.lineage import check_embeddings
from dpdmd_pipeline.datasets.sharded import LazyShards, fingerprint
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions

log = logging.getLogger(__name__)

SCHEMA = 2
MODELS = ("teacher", "dmd", "dp_dmd")


def judged_prompts(prompts: Iterable[dict], options: EvaluateOptions) -> dict[int, str]:
    """Row and text of every evaluation prompt; depends on nothing trained, so that it refuses before training.

    Raises:
        ValueError: if there is none, or the judge does not know one of them.
    """
    from dpdmd_pipeline.shapes.world import prompt_index

    chosen = {row: record["text"] for row, record in enumerate(prompts) if record["eval"]}
    if not chosen:
        raise ValueError("no evaluation prompt: name a file (raw_eval_prompts) or set prompts.eval_share")
    if options.judge == "shapes":
        for text in chosen.values():
            prompt_index(text)
    return chosen


def sample_images(
    chosen: dict[int, str],
    prompts: Iterable[dict],
    embeddings: Any,
    teacher: Path,
    student_dmd: Path,
    student: Path,
    backbone: BackboneOptions,
    options: EvaluateOptions,
) -> LazyShards:
    """Draw every evaluation prompt from the same seeds with all three models; one shard per model."""
    from dpdmd_pipeline.backbones.student_file import load_header
    from dpdmd_pipeline.datasets.model_folder import folder_hash

    check_embeddings(embeddings, prompts, teacher)
    folders = {"teacher": None, "dmd": student_dmd, "dp_dmd": student}
    steps = {name: len(load_header(folder).sigmas) - 1 for name, folder in folders.items() if folder}
    manifest = {
        "models": {name: folder_hash(folder or teacher) for name, folder in folders.items()},
        "nfe": {"teacher": backbone.num_steps * (1 if backbone.guidance_scale == 1 else 2), **steps},
        "images_per_prompt": options.images_per_prompt,
    }
    shards = {
        name: partial(_draw, number, folders[name], chosen, embeddings, teacher, backbone, options)
        for number, name in enumerate(MODELS)
    }
    settings = options.model_dump(mode="json", include={"seed", "images_per_prompt"})
    rows = [[row, text] for row, text in chosen.items()]
    parts = (manifest, rows, settings, backbone.model_dump(mode="json"), embeddings.fingerprint)
    return LazyShards(shards, fingerprint(SCHEMA, *parts), manifest)


def image_seeds(options: EvaluateOptions, text: str) -> list[int]:
    """Seeds of one prompt's pictures: the same for every model, whatever the batch and the other prompts."""
    from dpdmd_pipeline.dpdmd.sampling import sample_seeds

    return sample_seeds(options.seed, f"evaluate/{text}", 0, options.images_per_prompt)


def _draw(
    number: int,
    folder: Path | None,
    chosen: dict[int, str],
    embeddings: Any,
    teacher: Path,
    backbone: BackboneOptions,
    options: EvaluateOptions,
) -> dict[str, Any]:
    """All pictures of one of the three models."""
    import torch

    log.info("drawing %d pictures with %s", len(chosen) * options.images_per_prompt, MODELS[number])
    drawn = sample_model(folder, chosen, embeddings, teacher, backbone, options)
    return {"model": torch.full((len(drawn["seed"]),), number), **drawn}


def sample_model(
    folder: Path | None,
    chosen: dict[int, str],
    embeddings: Any,
    teacher: Path,
    backbone: BackboneOptions,
    options: EvaluateOptions,
) -> dict[str, Any]:
    """Pictures of the teacher, or of a student's folder, as 8-bit images with their prompt and seed."""
    import torch

    from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

    model = backbone.load(teacher, options.device)
    samples = [(row, seed) for row, text in chosen.items() for seed in image_seeds(options, text)]
    sampler = _sampler(model, folder, embeddings, backbone)
    images = []
    for start in range(0, len(samples), options.batch_size):
        chunk = samples[start : start + options.batch_size]
        noise = noise_from_seeds([seed for _, seed in chunk], model.latent_shape).to(model.device)
        with torch.no_grad():
            denoise, levels = sampler([row for row, _ in chunk])
            images.append((model.decode(rollout(denoise, noise, levels)) * 255).round().to(torch.uint8).cpu())
    return {
        "prompt": torch.tensor([row for row, _ in samples]),
        "seed": torch.tensor([seed for _, seed in samples]),
        "image": torch.cat(images),
    }


def _sampler(model: Any, folder: Path | None, embeddings: Any, backbone: BackboneOptions) -> Any:
    """Rows of prompts to a denoiser and its schedule: the guided teacher, or a student as its file says."""
    from dpdmd_pipeline.backbones.base import conditioned, guided
    from dpdmd_pipeline.backbones.student_file import load_header

    def cond(rows: list[int]) -> dict[str, Any]:
        return {name: value.to(model.device) for name, value in embeddings.rows(rows).items()}

    network = model.load_model(folder).requires_grad_(False).eval()
    if folder is None:
        levels, uncond = model.schedule(backbone.num_steps), cond([len(embeddings) - 1])
        return lambda rows: (guided(model, network, cond(rows), uncond, backbone.guidance_scale), levels)
    header = load_header(folder)
    asked = (header.family, header.prediction, header.sampler, header.guidance)
    if asked != (backbone.family, "flow", "euler", 1.0):
        raise ValueError(
            f"{folder} is to be sampled as {asked}: this version samples {backbone.family} flow, euler, 1.0"
        )
    levels = model.student_schedule(header.sigmas[:-1], len(header.sigmas) - 1)
    return lambda rows: (conditioned(model, network, cond(rows)), levels)


def measure(images: Any, chosen: dict[int, str], options: EvaluateOptions) -> dict[str, Any]:
    """Quality and diversity of the three models, and the share of DMD's loss that DP-DMD gets back."""
    from dpdmd_pipeline.metrics.summary import gap_recovered

    results: dict[str, Any] = {}
    for name, shard in zip(MODELS, images.shards(), strict=True):
        counts = {"prompts": len(chosen), "per_prompt": options.images_per_prompt}
        results[name] = {"nfe": images.manifest["nfe"][name], "n": counts, **judge_images(shard, chosen, options)}
    diversity = {name: results[name]["diversity"] for name in MODELS}
    results["dp_dmd"]["gap_recovered"] = {
        metric: gap_recovered(*(diversity[name][metric]["value"] for name in MODELS)) for metric in diversity["teacher"]
    }
    return results


def judge_images(drawn: dict[str, Any], chosen: dict[int, str], options: EvaluateOptions) -> dict[str, Any]:
    """Quality and diversity of one model's pictures."""
    from dpdmd_pipeline.metrics.shapes import judge

    per_prompt = [drawn["image"][drawn["prompt"] == row] / 255 for row in chosen]
    return judge(per_prompt, list(chosen.values()), options.seed)


def draw_grids(images: Any, chosen: dict[int, str], options: EvaluateOptions) -> tuple[Any, Any, Any]:
    """One picture per model: a row per prompt, a column per seed, the same in all three."""
    return tuple(_grid(shard, list(chosen), options.grid_columns) for shard in images.shards())


def _grid(shard: dict[str, Any], rows: list[int], columns: int) -> Any:
    """Pictures side by side with a hairline between them, enlarged without smoothing."""
    import torch
    from PIL import Image
    from torch.nn.functional import pad

    tiles = [
        [pad(image, (0, 1, 0, 1), value=255) for image in shard["image"][shard["prompt"] == row][:columns]]
        for row in rows
    ]
    sheet = torch.cat([torch.cat(line, dim=2) for line in tiles], dim=1).permute(1, 2, 0).numpy()
    scale = max(1, 640 // sheet.shape[1])
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)
