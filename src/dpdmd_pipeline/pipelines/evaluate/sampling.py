"""Draw pictures with all models: the same prompts and seeds, and on a CPU the same bits for any batch size."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, PromptNoise, TeacherStart, resolve_device
from dpdmd_pipeline.datasets.sharded import LastLoaded, LazyShards, fingerprint
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.evaluate.pictures import MODELS, STARTED
from dpdmd_pipeline.planning.identity import check_embeddings, code_hash

SHARD = 64  # pictures per file; a multiple of ON_CPU
ON_CPU = 16  # pictures per batch on a CPU: another batch size may change the order of sums in a matrix product

Sample = tuple[int, int]  # row of the embeddings, seed
StartOptions = TeacherStart | PromptNoise


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
    """Shards with the pictures of every evaluation prompt, from the same seeds for all models."""
    from dpdmd_pipeline.backbones.student_file import load_header
    from dpdmd_pipeline.datasets.model_folder import folder_hash

    check_embeddings(embeddings, prompts, teacher)
    start = options.teacher_start
    folders = dict(zip(MODELS, (None, student_dmd, student), strict=True)) | ({STARTED: student_dmd} if start else {})
    headers = {name: load_header(folder) for name, folder in folders.items() if folder}
    evaluations = {"teacher": backbone.evaluations, **{name: header.num_steps for name, header in headers.items()}}
    if start:
        start.check_landing(evaluations[STARTED])
        evaluations[STARTED] += start.evaluations(backbone.guidance_scale) - start.landing
    manifest = {
        "models": {name: folder_hash(folder or teacher) for name, folder in folders.items()},
        "students": {name: header.identity for name, header in headers.items()},
        "nfe": evaluations,
        "images_per_prompt": options.images_per_prompt,
        "seed": options.seed,
        "teacher_start": start and start.model_dump(),
        "prompts": fingerprint([[row, text] for row, text in chosen.items()]),
        "embeddings": embeddings.fingerprint,
        "backbone": backbone.model_dump(mode="json"),
    }
    samples = _samples(chosen, options)
    load = LastLoaded(partial(_load_model, embeddings, teacher, backbone, options))
    models = {name: (folder, start if name == STARTED else None) for name, folder in folders.items()}
    shards = {
        f"{name}-{first // SHARD:05d}": partial(_shard, number, load, model, samples[first : first + SHARD])
        for number, (name, model) in enumerate(models.items())
        for first in range(0, len(samples), SHARD)
    }
    identity = fingerprint(manifest, code_hash("pipelines.evaluate.sampling", f"backbones.{backbone.family}"))
    return LazyShards(shards, identity, manifest, options.launch.of_shards(identity[:16], options.device))


def image_seeds(options: EvaluateOptions, text: str) -> list[int]:
    """Seeds of one prompt's pictures; they depend on no model, batch size or other prompt."""
    from dpdmd_pipeline.dpdmd.sampling import sample_seeds

    return sample_seeds(options.seed, f"evaluate/{text}", 0, options.images_per_prompt)


def _samples(chosen: dict[int, str], options: EvaluateOptions) -> list[Sample]:
    """Every sample of one model, ordered by prompt and seed."""
    return [(row, seed) for row, text in chosen.items() for seed in image_seeds(options, text)]


def _shard(
    number: int, load: LastLoaded, model: tuple[Path | None, StartOptions | None], samples: list[Sample]
) -> dict[str, Any]:
    """One shard: some pictures of one model, given by its folder and its start."""
    import torch

    return {"model": torch.full((len(samples),), number), **load(*model)(samples)}


def sample_model(
    folder: Path | None,
    chosen: dict[int, str],
    embeddings: Any,
    teacher: Path,
    backbone: BackboneOptions,
    options: EvaluateOptions,
    start: StartOptions | None = None,
) -> dict[str, Any]:
    """Draw all pictures of a student's folder, or of the teacher, as 8-bit images with their prompt and seed."""
    return _load_model(embeddings, teacher, backbone, options, folder, start)(_samples(chosen, options))


def _load_model(
    embeddings: Any,
    teacher: Path,
    backbone: BackboneOptions,
    options: EvaluateOptions,
    folder: Path | None,
    start: StartOptions | None = None,
) -> Callable[[list[Sample]], dict[str, Any]]:
    """Load the teacher, or a student from its folder, as a function that draws samples."""
    model = backbone.load(teacher, options.device)
    uncond = {name: value.to(model.device) for name, value in embeddings.rows([len(embeddings) - 1]).items()}
    if folder is None:
        sampler = _teacher_sampler(backbone.load_teacher(teacher, options.device), uncond, backbone)
    else:
        sampler = _student_sampler(model, folder, backbone, uncond, start)
    return partial(_draw, model, sampler, embeddings, options)


def _draw(
    model: Any, sampler: Callable, embeddings: Any, options: EvaluateOptions, samples: list[Sample]
) -> dict[str, Any]:
    """Draw samples as 8-bit images [N, 3, H, W], with their prompt and seed."""
    import torch

    on_cpu = resolve_device(options.device).type == "cpu"
    size = ON_CPU if on_cpu else options.batch_size
    images = []
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        padding = batch[-1:] * (size - len(batch)) if on_cpu else []  # all batches have one size
        rows, seeds = zip(*batch, *padding, strict=True)
        cond = {name: value.to(model.device) for name, value in embeddings.rows(rows).items()}
        with torch.no_grad():
            drawn = (model.decode(sampler(cond, seeds)) * 255).round().to(torch.uint8).cpu()
        images.append(drawn[: len(batch)])
    rows, seeds = zip(*samples, strict=True)
    return {"prompt": torch.tensor(rows), "seed": torch.tensor(seeds), "image": torch.cat(images)}


def _teacher_sampler(model: Any, uncond: dict[str, Any], backbone: BackboneOptions) -> Callable:
    """Function from conditioning and seeds to clean latents, at the teacher's own settings."""
    from dpdmd_pipeline.backbones.base import guided
    from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

    network = model.load_model().requires_grad_(False).eval()
    levels = model.schedule(backbone.num_steps)

    def draw(cond: dict[str, Any], seeds: Sequence[int]) -> Any:
        noise = noise_from_seeds(seeds, model.latent_shape).to(model.device)
        return rollout(guided(model, network, cond, uncond, backbone.guidance_scale), noise, levels)

    return draw


def _student_sampler(
    model: Any, folder: Path, backbone: BackboneOptions, uncond: dict[str, Any], options: StartOptions | None
) -> Callable:
    """Function from conditioning and seeds to clean latents, as the student's file describes its steps."""
    from dpdmd_pipeline.exporting.sample import draw_latents, load_onto
    from dpdmd_pipeline.exporting.starts import noise_the_prompt, start_with_teacher

    student, start = load_onto(model, folder, backbone.family), None
    if isinstance(options, PromptNoise):
        start = noise_the_prompt(model, student.network, student.levels, options)
    elif options:
        teacher = model.load_model().requires_grad_(False).eval()
        start = start_with_teacher(model, teacher, uncond, student.levels, options, backbone.guidance_scale)
    return partial(draw_latents, student, start=start)
