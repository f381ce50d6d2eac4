"""Nodes of the train stage."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.pipelines.train.options import TrainOptions
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe, Recipe

log = logging.getLogger(__name__)

SCHEMA = 1


def train_student(
    prompts: Iterable[dict],
    embeddings: Any,
    anchors: Any,
    teacher: Path,
    train_state: Path,
    backbone: BackboneOptions,
    anchor_options: AnchorRecipe,
    options: TrainOptions,
) -> tuple[Callable[[Path], None], list[dict]]:
    """Distil one student: DP-DMD, or DMD where no step is anchored.

    Returns:
        What writes the student into a folder, and the history, one row per step.
    """
    check_anchors(anchors, embeddings, teacher, backbone, anchor_options, options)
    from dpdmd_pipeline.backbones.student_file import StudentHeader, save_student
    from dpdmd_pipeline.training.checkpoint import Checkpoints

    rows = [row for row, record in enumerate(prompts) if record["train"]]
    recipe = options.recipe()
    identity = fingerprint(
        SCHEMA, recipe.model_dump(mode="json"), backbone.model_dump(mode="json"), anchors.fingerprint
    )
    checkpoints = Checkpoints(train_state / identity[:16], keep_last=2)
    model, roles, records = _start(rows, embeddings, anchors, teacher, backbone, options, checkpoints)
    history = _follow(records, recipe, options.log_every, checkpoints)
    header = StudentHeader(backbone.family, model.student_schedule(recipe.grid, recipe.num_steps).sigma.tolist())
    return (lambda folder: save_student(folder, roles.student, header)), history


def check_anchors(
    anchors: Any, embeddings: Any, teacher: Path, backbone: BackboneOptions, options: AnchorRecipe, recipe: Recipe
) -> None:
    """Hold the anchors' manifest against what is asked for now.

    Raises:
        ValueError: names what differs, both values, and the remedy.
    """
    from dpdmd_pipeline.datasets.model_folder import folder_hash

    asked = options.model_dump(mode="json", exclude=NOT_IN_THE_RESULT)
    manifest = anchors.manifest
    then = {
        **{f"anchors.{name}": value for name, value in manifest["options"].items()},
        **{f"backbone.{name}": value for name, value in manifest["backbone"].items()},
        **{name: manifest[name] for name in ("teacher", "embeddings")},
    }
    now = {
        **{f"anchors.{name}": value for name, value in asked.items()},
        **{f"backbone.{name}": getattr(backbone, name) for name in manifest["backbone"]},
        "teacher": folder_hash(teacher / "transformer"),
        "embeddings": embeddings.fingerprint,
    }
    for name in now:
        if now[name] != then.get(name):
            raise ValueError(
                f"the anchors were made with {name}={then.get(name)!r}, this run has {now[name]!r}: "
                "run `kedro run --pipelines anchors` again, or set the value back"
            )
    _check_recipe(manifest, options, recipe)
    if recipe.anchored_steps:
        levels = backbone.load(teacher, "cpu").student_schedule(recipe.grid, recipe.num_steps)
        _check_start(levels.sigma[0].item(), manifest["anchor_sigmas"][0])


def _check_start(start: float, anchor: float) -> None:
    if not anchor < start:
        raise ValueError(
            f"the first of anchors.anchor_levels is at sigma {anchor:.4g}, train.grid starts at {start:.4g}: "
            "an anchor lies below the start; take a later anchor or start the grid higher"
        )


def _check_recipe(manifest: dict, options: AnchorRecipe, recipe: Recipe) -> None:
    available = len(manifest["anchor_steps"])
    if recipe.anchored_steps > available:
        raise ValueError(
            f"train.anchored_steps={recipe.anchored_steps} needs as many anchors.anchor_levels, there are {available}"
        )
    if recipe.anchored_steps and recipe.target == "tangent" and not options.with_denoised:
        raise ValueError(
            "train.target=tangent needs anchors.with_denoised=true: the teacher's x0 at the anchor is not stored"
        )


def _start(
    rows: list[int],
    embeddings: Any,
    anchors: Any,
    teacher: Path,
    backbone: BackboneOptions,
    options: TrainOptions,
    checkpoints: Any,
) -> tuple[Any, Any, Iterator[dict]]:
    """Load the networks and set up the loop; nothing is trained until its records are asked for."""
    from dpdmd_pipeline.training.distill import Lessons, Roles, distill

    model = backbone.load(teacher, options.device)
    roles = Roles(teacher=model.load_model(), student=model.load_model(), fake_score=model.load_model())
    levels = model.schedule(backbone.num_steps)
    lessons = Lessons(
        embeddings=embeddings,
        prompts=rows,
        draw_anchors=_draw_anchors(rows, embeddings, anchors, model, roles.teacher, backbone, options),
        anchor_levels=[levels[steps] for steps in anchors.manifest["anchor_steps"][: options.anchored_steps]],
        guidance_scale=backbone.guidance_scale,
    )
    records = distill(
        model,
        roles,
        lessons,
        options.recipe(),
        checkpoints,
        checkpoint_every=options.checkpoint_every,
        ratio_every=options.ratio_every,
    )
    return model, roles, records


def _draw_anchors(
    rows: list[int],
    embeddings: Any,
    anchors: Any,
    model: Any,
    teacher: Any,
    backbone: BackboneOptions,
    options: TrainOptions,
) -> Callable:
    """The student turn's samples: from the cache, or from the teacher as they are needed."""
    from dpdmd_pipeline.training.anchors import CachedAnchors, OnlineAnchors, TeacherAnchors

    drawing = {"seed": options.seed, "batch_size": options.batch_size, "anchored_steps": options.anchored_steps}
    if anchors.manifest["options"]["mode"] == "cached":
        return CachedAnchors(anchors, model.latent_shape, **drawing)
    asked = TeacherAnchors(
        model,
        teacher,
        embeddings,
        num_steps=backbone.num_steps,
        guidance_scale=backbone.guidance_scale,
        anchor_steps=anchors.manifest["anchor_steps"],
        with_denoised=anchors.manifest["options"]["with_denoised"],
    )
    return OnlineAnchors(asked, rows, **drawing)


def _follow(records: Iterator[dict], recipe: Recipe, log_every: int, checkpoints: Any) -> list[dict]:
    """Run the loop to its end under a progress bar; says where it resumed, and what it reused."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name = "DP-DMD" if recipe.anchored_steps else "DMD"
    done = checkpoints.latest_step() or 0
    if done == recipe.max_steps:
        log.info("%s: finished student reused from %s", name, checkpoints.folder)
    elif done:
        log.info("%s: resumed after step %d of %d from %s", name, done, recipe.max_steps, checkpoints.folder)
    history: list[dict] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    begun = time.monotonic()
    with _noted_signals() as noted, closing(records), Progress(*columns) as progress:
        bar = progress.add_task(name, total=recipe.max_steps, facts="")
        for record in records:
            history.append(record)
            new = len(history) - done
            if new <= 0:
                progress.update(bar, completed=len(history))
                continue
            images = new * recipe.batch_size * (recipe.fake_score_turns + 1) / (time.monotonic() - begun)
            losses = ", ".join(
                f"{key[:-5]} {record[key]:.4f}" for key in ("dmd_loss", "diversity_loss", "fake_score_loss")
            )
            progress.update(bar, completed=len(history), facts=f"{losses}, {images:.0f} images/s")
            if len(history) % log_every == 0:
                log.info("%s step %d/%d: %s, %.0f images/s", name, len(history), recipe.max_steps, losses, images)
            if noted:
                log.warning("%s: stopped after step %d; the same command goes on from there", name, len(history))
                raise KeyboardInterrupt
    return history


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted, so that a run ends between two steps; the second is obeyed at once."""
    noted: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield noted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_curves(history: list[dict], history_dmd: list[dict]) -> Any:
    """Losses and gradient norms of both students over their steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = {
        "dmd_loss": "DMD loss",
        "diversity_loss": "diversity loss",
        "fake_score_loss": "fake-score loss",
        "grad_ratio": "weighted gradient ratio, diversity / DMD",
    }
    for axis, (key, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name, rows in {"DMD": history_dmd, "DP-DMD": history}.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="student turns", yscale="log")
        axis.legend()
    return figure
