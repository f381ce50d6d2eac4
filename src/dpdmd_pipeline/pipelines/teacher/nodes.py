"""Nodes of the teacher stage."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.pipelines.teacher.options import TeacherOptions
from dpdmd_pipeline.planning.identity import code_hash, open_state
from dpdmd_pipeline.screen import screen
from dpdmd_pipeline.wording import made

log = logging.getLogger(__name__)

SCHEMA = 1
_BATCH_SIZE = 250  # pictures per batch


def train_embedded_teacher(
    teacher_state: Path, backbone: BackboneOptions, options: TeacherOptions
) -> Callable[[Path], None]:
    """Train all networks of the teacher from scratch, on the CPU; returns their writer, in half precision."""
    if options.recipe.family != backbone.family:
        raise ValueError(
            f"backbone.family is {backbone.family!r}, but teacher.recipe trains a {options.recipe.family} teacher: "
            "choose the environment base or shapes_sdxl, where both agree"
        )
    from dpdmd_pipeline.shapes.models import save_half
    from dpdmd_pipeline.training.teacher import train_teacher

    recipe = options.recipe.model_dump(mode="json", exclude_none=True)
    identity = fingerprint(SCHEMA, recipe, code_hash("training.teacher"))
    state = open_state(teacher_state, identity, "teacher", recipe)

    def follow(name: str, total: int, records: Iterator[tuple[int, float]]) -> None:
        loss = None
        with screen.bar(name, total) as advance:
            for step, loss in records:
                advance(step, f"loss {loss:.4f}")
        made.info("%s %s", name, "reused" if loss is None else f"trained, last loss {loss:.4f}")

    return partial(save_half, train_teacher(options.recipe, state, follow))


def judge_teacher(teacher: Path, backbone: BackboneOptions, options: TeacherOptions) -> dict[str, Any]:
    """Judge quality and diversity of the teacher at its own settings, and count the rarest mode of any prompt.

    `drawn` counts the pictures nearest to a mode, `drawn_clean` those that are close enough to be valid.
    """
    import torch

    from dpdmd_pipeline.metrics.shapes import judge
    from dpdmd_pipeline.shapes.reader import read
    from dpdmd_pipeline.shapes.world import NUM_MODES, NUM_PROMPTS, caption

    prompts = [caption(index) for index in range(NUM_PROMPTS)]
    images, rarest = [], []
    for row, pictures in enumerate(_draw(teacher, prompts, backbone, options)):
        images.append(pictures)
        reading = read(pictures)
        nearest = reading.prompt == row
        modes = [reading.mode[mask] for mask in (nearest, nearest & reading.valid)]
        rarest.append([int(torch.bincount(mode, minlength=NUM_MODES).min()) for mode in modes])
        log.info("%r: rarest mode drawn %d times, %d of them clean", prompts[row], *rarest[-1])
    drawn, clean = zip(*rarest, strict=True)
    return {
        **judge(images, prompts, options.judge_seed),
        "rarest_mode": {"drawn": min(drawn), "drawn_clean": min(clean)},
        "n": {"prompts": NUM_PROMPTS, "per_prompt": options.judged_per_prompt},
        "preset": "exact reader of the embedded world",
    }


def _draw(teacher: Path, prompts: Sequence[str], backbone: BackboneOptions, options: TeacherOptions) -> Iterator[Any]:
    """Yield the teacher's pictures of each prompt, [judged_per_prompt, 3, H, W] in [0, 1]."""
    import torch

    from dpdmd_pipeline.backbones.base import guided
    from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout, sample_seeds

    model = backbone.load(teacher, "cpu")
    network = model.load_model().requires_grad_(False).eval()
    encoded = model.encode([*prompts, ""])
    uncond = {name: value[-1:] for name, value in encoded.items()}
    levels = model.schedule(backbone.num_steps)

    @torch.no_grad()
    def draw(row: int, seeds: Sequence[int]) -> Any:
        noise = noise_from_seeds(seeds, model.latent_shape)
        cond = {name: value[row : row + 1].expand(len(noise), *value.shape[1:]) for name, value in encoded.items()}
        denoise = guided(model, network, cond, uncond, backbone.guidance_scale)
        return model.decode(rollout(denoise, noise, levels))

    for row in range(len(prompts)):
        seeds = sample_seeds(options.judge_seed, "teacher", row, options.judged_per_prompt)
        batches = [seeds[start : start + _BATCH_SIZE] for start in range(0, len(seeds), _BATCH_SIZE)]
        yield torch.cat([draw(row, batch) for batch in batches])
