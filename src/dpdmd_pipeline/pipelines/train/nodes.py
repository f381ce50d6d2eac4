"""Nodes of the train stage."""

import gc
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.pipelines.train.progress import follow, method_name
from dpdmd_pipeline.pipelines.train.setup import Job, start
from dpdmd_pipeline.planning.checks import check_anchors, check_backbone, check_speed, check_start
from dpdmd_pipeline.planning.identity import check_embeddings, open_state, recipe_facts, state_folder, student_identity
from dpdmd_pipeline.publishing import folder_size
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.preview import FOLDER as PREVIEWS
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe, Recipe
from dpdmd_pipeline.wording import COLOURS, counted, differences, made, reuse_refusal

log = logging.getLogger(__name__)

Trained = tuple[Callable[[Path], None], list[dict]]  # function that writes the student into a folder, and its history


def train_student(
    prompts: Iterable[dict],
    embeddings: Any,
    anchors: Any,
    teacher: Path,
    train_state: Path,
    finished_student: Path | None,
    backbone: BackboneOptions,
    anchor_options: AnchorRecipe,
    options: TrainOptions,
) -> Trained:
    """Distil one student: DP-DMD, or DMD if no step is anchored.

    Args:
        finished_student: student of an earlier run; it is reused if it has the identity of this one.

    Returns:
        A function that writes the student into a folder, and the history: one row per cycle, all with the same keys.
    """
    rows = [row for row, record in enumerate(prompts) if record["train"]]
    check_embeddings(embeddings, prompts, teacher)
    check_anchors(anchors, rows, embeddings, teacher, backbone, anchor_options, options)
    check_backbone(backbone, options)
    recipe = options.recipe()
    identity = student_identity(recipe, backbone, anchors, rows)
    groups = _options(backbone, anchor_options, recipe)
    is_new = not state_folder(train_state, identity).exists()
    if finished_student and (trained := _reuse(finished_student, identity, recipe, groups if is_new else None)):
        return trained
    check_speed(teacher, options)
    check_start(teacher, backbone, recipe)
    from dpdmd_pipeline.training.checkpoint import Checkpoints

    decisive = {**groups, "anchors made": anchors.fingerprint[:16]}
    folder = open_state(train_state, identity, method_name(recipe), decisive, recipe.max_steps)
    checkpoints = Checkpoints(folder, options.keep_last)
    options = _fitted(options, teacher, backbone)
    job = Job(rows, embeddings, anchors, teacher, backbone, options, checkpoints)
    records = _train(job, recipe)
    header = _make_header(backbone.load(teacher, "cpu"), backbone, recipe, identity, groups)
    keys = dict.fromkeys(key for row in records for key in row)
    history = [{**keys, **row} for row in records]  # None for values that were not measured in that cycle
    return partial(_write_student, job=job, header=header, history=history), history


def _fitted(options: TrainOptions, teacher: Path, backbone: BackboneOptions) -> TrainOptions:
    """Options whose micro-batches of `auto` are numbers that fit on the card, if there is one to plan for."""
    from dpdmd_pipeline.planning.gpu import planned_memory, with_micro_batches
    from dpdmd_pipeline.planning.memory import memory_model

    if options.is_automatic and (free := planned_memory(options)):
        return with_micro_batches(memory_model(teacher, backbone), options, free)
    return options


def _options(backbone: BackboneOptions, anchors: AnchorRecipe, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Options that decide a student, by parameter group."""
    return {
        "backbone": backbone.model_dump(mode="json"),
        "anchors": anchors.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "train": recipe_facts(recipe),
    }


def _reuse(finished_student: Path, identity: str, recipe: Recipe, groups: Mapping[str, Any] | None) -> Trained | None:
    """The published student if it is this run's; else None, and with the run's options a warning of how it differs.

    Raises:
        OSError: if its weights are damaged.
    """
    from dpdmd_pipeline.backbones.student_file import load_finished, load_header, weight_file
    from dpdmd_pipeline.backbones.tensor_files import check_content

    history = load_finished(finished_student, identity)
    if history is None:
        with suppress(OSError, ValueError):  # damaged: there is nothing to compare
            header = load_header(finished_student)
            if header.identity != identity and groups:
                changes = [*differences(header.recipe or {}, groups)]
                state = f"the finished student in {finished_student}"
                line = reuse_refusal(state, folder_size(finished_student), changes, "anchors or code")
                log.warning("%s: %s", method_name(recipe), line)
        return None
    check_content(weight_file(finished_student))
    log.info("%s: finished student reused from %s", method_name(recipe), finished_student)
    made.info("%s reused", method_name(recipe))
    return partial(shutil.copytree, finished_student, dirs_exist_ok=True), history


def _train(job: Job, recipe: Recipe) -> list[dict[str, Any]]:
    """Train to the end, from the newest checkpoint if there is one; returns the records of all cycles.

    No network outlives the training, and a process that only starts others loads none.
    """
    import torch

    from dpdmd_pipeline.planning.gpu import explain_out_of_memory
    from dpdmd_pipeline.training.tracking import tracked

    name, checkpoints = method_name(recipe), job.checkpoints
    several = job.options.launch.total > 1  # then one of the processes locks the checkpoints
    with nullcontext() if several else checkpoints.locked():
        cycles = checkpoints.latest()
        if cycles == recipe.max_steps:
            log.info("%s: finished student reused from %s", name, checkpoints.folder)
            made.info("%s reused", name)
        elif cycles:
            log.info("%s: resumed after cycle %d of %d from %s", name, cycles, recipe.max_steps, checkpoints.folder)
            made.info("%s resumed after cycle %d", name, cycles)
        if cycles < recipe.max_steps:
            try:
                records = train_in_processes(job) if several else start(job)[1]
                with tracked(name, checkpoints.folder, job.options) as track:
                    follow(records, cycles, recipe, job.options.log_every, track)
                made.info("%s %s", name, counted(recipe.max_steps, "cycle"))
            except torch.OutOfMemoryError as error:
                raise ValueError(explain_out_of_memory(error, job.teacher, job.backbone, job.options)) from error
            if job.options.compile != "none":
                gc.collect()  # compiled blocks are in cycles, which would keep the networks on the GPU
        if finished := checkpoints.load_latest(lambda *_: None):
            return finished[1]["history"]
    raise ValueError(
        f"training has ended, but {checkpoints.folder} has no complete state: was it deleted, or is its disk faulty? "
        "Run the same command again"
    )


def _make_header(
    model: Any, backbone: BackboneOptions, recipe: Recipe, identity: str, groups: dict[str, dict[str, Any]]
) -> Any:
    """Header of the student: its sampling, identity and recipe."""
    from dpdmd_pipeline.backbones.student_header import StudentHeader

    levels = model.student_schedule(recipe.grid, recipe.num_steps)
    facts: dict[str, Any] = {
        "family": backbone.family,
        "resolution": backbone.resolution,
        "max_sequence_length": backbone.max_sequence_length,
        "prediction": model.prediction,
        "sampler": {"ode": "euler", "renoise": "renoise"}[recipe.between_steps],
        "identity": identity,
        "recipe": groups,
    }
    if model.prediction == "flow":
        facts |= {"sigmas": levels.sigma.tolist(), "shift": getattr(model, "shift", None)}
    else:
        facts |= {"timesteps": [int(timestep) for timestep in levels.timestep[:-1]]}
    if recipe.roles == "lora":
        rank, scale = recipe.lora.student_rank, recipe.lora.alpha_per_rank
        facts |= {"kind": "lora", "lora_rank": rank, "lora_alpha": rank * scale}
    return StudentHeader(**facts)


def _write_student(folder: Path, job: Job, header: Any, history: list[dict[str, Any]]) -> None:
    """Write the finished student into a folder, whole or as its adapter, with its history; no GPU is used."""
    import torch

    from dpdmd_pipeline.backbones.student_file import save_history, save_lora, save_student
    from dpdmd_pipeline.planning.weightless import weightless
    from dpdmd_pipeline.training.roles import make_roles

    backbone = weightless(job.backbone.load(job.teacher, "cpu"), job.teacher)
    with torch.device("meta"):
        student = make_roles(backbone, job.options.recipe(), gradient_checkpointing=False, sharded=False).student
    _, state = job.checkpoints.load_latest()
    student.load_state_dict(state["student"], assign=True)
    if header.kind == "lora":
        save_lora(folder, student.adapter_state(), header)
    else:
        save_student(folder, student, header)
    save_history(folder, history)
    with suppress(FileNotFoundError):  # a training without previews
        shutil.copytree(job.checkpoints.folder / PREVIEWS, folder / PREVIEWS)


def train_in_processes(job: Job) -> Iterator[dict]:
    """Train in other processes; yields the new cycles' records. The student is in the last checkpoint."""
    from dpdmd_pipeline.training.launch import Launch, launched

    options = job.options.launch
    cuda = resolve_device(job.options.device).type == "cuda"
    launch = Launch(options.processes, options.machines, options.rendezvous, job.checkpoints.folder.name, cuda)
    return launched(train_share, job, launch)


def train_share(job: Job, member: Any) -> bool:
    """Run the loop in one process; returns True if it came to its end."""
    # The writing process holds the lock: it outlives a killed parent until its cycle is done.
    with job.checkpoints.locked() if member.rank == 0 else nullcontext():
        member.wait_for_all()
        with closing(start(job)[1]) as records:  # saves if the loop stops early
            if member.asked_to_stop():
                return False
            for record in records:
                member.report(record)
                if member.asked_to_stop():
                    return record["step"] == job.options.max_steps
    return True


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
        for name, rows in runs.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, color=COLOURS[name])
        if teacher := [row[f"{key}_teacher"] for row in history if row.get(f"{key}_teacher") is not None]:
            axis.axhline(teacher[-1], color=COLOURS["teacher"], linestyle="--", label="teacher")
        axis.set(title=title, xlabel="cycles", yscale="linear" if teacher else "log")
        if axis.has_data():  # matplotlib warns of a legend without entries
            axis.legend()
    return figure
