"""Nodes of the train stage."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.lineage import check_embeddings, code_hash
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.pipelines.train.checks import check_anchors, check_guidance, check_precision, check_speed
from dpdmd_pipeline.pipelines.train.options import TrainOptions
from dpdmd_pipeline.pipelines.train.progress import follow
from dpdmd_pipeline.pipelines.train.setup import Job, start
from dpdmd_pipeline.training.recipe import AnchorRecipe, Recipe

log = logging.getLogger(__name__)

# A finished or broken-off student is only taken up by the code that began it.
CODE = (
    "dpdmd",
    "backbones/base.py",
    "pipelines/train/setup.py",
    "training/anchors.py",
    "training/distill.py",
    "training/draws.py",
    "training/optimizer.py",
    "training/roles.py",
    "training/run.py",
    "training/speed.py",
    "training/state.py",
    "training/watch.py",
)


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
        What writes the student into a folder, and the history, one row per step; all have the same keys.
    """
    rows = [row for row, record in enumerate(prompts) if record["train"]]
    check_embeddings(embeddings, prompts, teacher)
    check_anchors(anchors, rows, embeddings, teacher, backbone, anchor_options, options)
    check_precision(backbone, options)
    check_guidance(backbone, options)
    check_speed(teacher, options)
    from dpdmd_pipeline.training.checkpoint import Checkpoints

    recipe = options.recipe()
    checkpoints = Checkpoints(state_folder(train_state, recipe, backbone, anchors, rows), options.keep_last)
    many = options.launch.total > 1  # then one of the processes holds the checkpoints
    held = nullcontext() if many else checkpoints.held()
    with held, _out_of_memory_explained(teacher, backbone, options):
        resumed = checkpoints.load_latest()
        done = _tell(resumed, recipe, checkpoints.folder)
        job = Job(rows, embeddings, anchors, teacher, backbone, options, checkpoints)
        if many and done < recipe.max_steps:
            resumed = _train_in_processes(job, done)
            done = resumed[0]
        model, roles, records = start(job, resumed)
        # A finished student has no records left, but only when they are asked for do its weights get into the roles.
        new = follow(records, done, recipe, options.log_every) if done < recipe.max_steps else list(records)
        history = [*(resumed[1]["history"] if resumed else []), *new]
    return _writer(model, roles.student, backbone, recipe), _of_the_same_keys(history)


def _of_the_same_keys(history: list[dict]) -> list[dict]:
    """Rows with None for what was not measured in their turn: `dvc plots` reads no rows whose keys differ."""
    keys = dict.fromkeys(key for row in history for key in row)
    return [{**keys, **row} for row in history]


@contextmanager
def _out_of_memory_explained(teacher: Path, backbone: BackboneOptions, options: TrainOptions) -> Iterator[None]:
    """A GPU that runs out of memory is told with the options that need less."""
    import torch

    from dpdmd_pipeline.pipelines.train.preflight import explain_out_of_memory

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(explain_out_of_memory(error, teacher, backbone, options)) from error


def _writer(model: Any, student: Any, backbone: BackboneOptions, recipe: Recipe) -> Callable[[Path], None]:
    """What writes the student, whole or as its adapter, with how it is to be sampled in its header."""
    from dpdmd_pipeline.backbones.student_file import StudentHeader, save_lora, save_student

    levels = model.student_schedule(recipe.grid, recipe.num_steps)
    facts: dict[str, Any] = {
        "family": backbone.family,
        "resolution": backbone.resolution,
        "max_sequence_length": backbone.max_sequence_length,
        "prediction": model.prediction,
        "sampler": {"ode": "euler", "renoise": "renoise"}[recipe.between_steps],
    }
    if model.prediction == "flow":
        facts |= {"sigmas": levels.sigma.tolist(), "shift": getattr(model, "shift", None)}
    else:
        facts |= {"timesteps": [int(timestep) for timestep in levels.timestep[:-1]]}
    if recipe.roles == "full":
        return lambda folder: save_student(folder, student, StudentHeader(**facts))
    rank, scale = recipe.lora.student_rank, recipe.lora.alpha_per_rank
    header = StudentHeader(**facts, kind="lora", lora_rank=rank, lora_alpha=rank * scale)
    return lambda folder: save_lora(folder, student.adapter_state(), header)


def run_identity(recipe: Recipe, backbone: BackboneOptions, anchors: Any, rows: list[int]) -> str:
    """Everything that decides a student: recipe, teacher's settings, anchors, training prompts and code."""
    unread = {"lora"} if recipe.roles == "full" else set()
    unread |= {"watch"} if recipe.watch.keep == "last" else set()
    parts = (
        recipe.model_dump(mode="json", exclude=unread),
        backbone.model_dump(mode="json"),
        anchors.fingerprint,
        rows,
    )
    return fingerprint(*parts, code_hash(*CODE, f"backbones/{backbone.family}.py"))


def state_folder(train_state: Path, recipe: Recipe, backbone: BackboneOptions, anchors: Any, rows: list[int]) -> Path:
    """Where a student's states are kept among those of all."""
    return train_state / run_identity(recipe, backbone, anchors, rows)[:16]


def _tell(resumed: tuple[int, dict] | None, recipe: Recipe, folder: Path) -> int:
    """Say what is reused; returns the number of finished steps."""
    name, done = "DP-DMD" if recipe.anchored_steps else "DMD", resumed[0] if resumed else 0
    if done == recipe.max_steps:
        log.info("%s: finished student reused from %s", name, folder)
    elif done:
        log.info("%s: resumed after step %d of %d from %s", name, done, recipe.max_steps, folder)
    return done


def _train_in_processes(job: Job, done: int) -> tuple[int, dict]:
    """Train on in other processes; returns the finished state that they leave.

    Raises:
        ValueError: if there is none, since it was deleted or damaged meanwhile.
    """
    from dpdmd_pipeline.pipelines.train.worker import train_in_processes

    follow(train_in_processes(job), done, job.options.recipe(), job.options.log_every)
    finished = job.checkpoints.load_latest()
    if finished is None:
        raise ValueError(
            f"the processes have ended, and no whole state is left in {job.checkpoints.folder}: "
            "was it deleted, or is its disk faulty? The same command trains again"
        )
    return finished


def draw_curves(history: list[dict], history_dmd: list[dict]) -> Any:
    """Losses, gradient norms and what was watched of both students over their steps; dashed: the teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    panels = {
        "dmd_loss": "DMD loss",
        "diversity_loss": "diversity loss",
        "fake_score_loss": "fake-score loss",
        "grad_ratio": "weighted gradient ratio, diversity / DMD",
        "latent_diversity": "diversity: distance of a prompt's latents",
        "correction": "quality: the teacher's correction, less is better",
    }
    runs = {"DMD": history_dmd, "DP-DMD": history}
    for axis, (key, title) in zip(figure.subplots(3, 2).flat, panels.items(), strict=True):
        for (name, rows), color in zip(runs.items(), ("C0", "C1"), strict=True):  # a run has one colour in all panels
            points = [(row["step"], row[key]) for row in rows if row.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, color=color)
        if teacher := [row[f"{key}_teacher"] for row in history if row.get(f"{key}_teacher") is not None]:
            axis.axhline(teacher[-1], color="black", linestyle="--", label="teacher")
        axis.set(title=title, xlabel="student turns", yscale="linear" if teacher else "log")
        axis.legend()
    return figure
