"""The training loop of DP-DMD (arXiv:2602.03139, Algorithm 1): in each cycle fake-score updates, then a student update.

The losses are in `dpdmd.algorithm`; the fixed parts of a run in `run`, its random draws in `draws`, everything that a
checkpoint holds in `state`, measurements in `watch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning
from dpdmd_pipeline.dpdmd.algorithm import fake_score_update_loss, follow_anchors, match_teacher, student_pictures
from dpdmd_pipeline.dpdmd.anchor import AnchoredStep, anchored_steps
from dpdmd_pipeline.training.anchors import AnchorBatch
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.draws import Sample, SampleDraws, graded_step, micro_batches
from dpdmd_pipeline.training.optimizer import learning_rate_share
from dpdmd_pipeline.training.options import Execution
from dpdmd_pipeline.training.preview import save_row
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.roles import Roles, trainable
from dpdmd_pipeline.training.run import Run, TrainingData, prepare
from dpdmd_pipeline.training.sharding import is_sharded
from dpdmd_pipeline.training.speed import onto
from dpdmd_pipeline.training.state import Record, State, copy_weights, make_writer, resume, save
from dpdmd_pipeline.training.watch import watch_cycle


def distill(
    backbone: Backbone,
    roles: Roles,
    data: TrainingData,
    recipe: Recipe,
    checkpoints: Checkpoints,
    execution: Execution,
) -> Iterator[Record]:
    """Distil the teacher into `roles.student`, in place; yields the record of each new cycle.

    It starts from the newest checkpoint, if there is one, and writes others. At the end the student holds its final
    weights: the last, averaged or best ones.

    Raises:
        ValueError: if a loss or a gradient is not finite, with the cycle and the prompts' rows.
        OSError: if a checkpoint could not be written, or if all are damaged.
    """
    run = prepare(backbone, roles, data, recipe, execution)
    state = State.of(run)
    done = saved = resume(state, checkpoints)
    writer = make_writer(run, checkpoints)
    if run.accelerator.is_main_process:
        checkpoints.write_losses(state.history, anew=True)
    saved_at, between_cycles = time.monotonic(), True
    try:
        for cycle in range(done, recipe.max_steps):
            between_cycles = False
            record = train_cycle(run, state, cycle)
            state.history.append(record)
            done, between_cycles = cycle + 1, True
            if run.accelerator.is_main_process:
                checkpoints.write_losses([record])
                save_rows(state, checkpoints.folder)
            if _checkpoint_is_due(run, done, math.inf if writer.failed() else time.monotonic() - saved_at):
                save(run, state, writer, done)
                saved, saved_at = done, time.monotonic()
            yield record
    finally:  # closed early: keep the finished cycles. A cycle cut off half-way would not repeat exactly.
        if between_cycles and done > saved:
            save(run, state, writer, done, stopping=True)
        writer.wait()


def save_rows(state: State, folder: Path) -> None:
    """Write the pictures of the last measurement, if there was one."""
    pictures = state.watch.pictures if state.watch else {}
    while pictures:
        save_row(folder, *pictures.popitem())


def _checkpoint_is_due(run: Run, done: int, seconds: float) -> bool:
    """True after enough cycles or seconds and at the end; all processes must call this and get the same answer."""
    if done % run.execution.checkpoint_every == 0 or done == run.recipe.max_steps:
        return True
    if run.accelerator.num_processes > 1:  # on the CPU: no GPU is waited for
        seconds = run.accelerator.reduce(torch.tensor(seconds), reduction="mean").item()
    return seconds >= 60 * run.execution.checkpoint_minutes


def train_cycle(run: Run, state: State, cycle: int) -> Record:
    """One cycle: the fake-score updates, then the student update, then a measurement if one is due; its record.

    All updates of a cycle have one picture size. The measurement has the first one.
    """
    if cycle == 0:
        for update in range(run.recipe.fake_score_warmup):
            update_fake_score(run.for_cycle(update), "fake_score_warmup", range(update, update + 1))
    updates, of_size = run.recipe.fake_score_turns, run.for_cycle(cycle)
    values = update_fake_score(of_size, "fake_score", range(cycle * updates, (cycle + 1) * updates))
    student_values, prompts = update_student(of_size, cycle)
    values |= student_values
    if state.average is not None:
        state.average.update_parameters(nn.ParameterList(trainable(run.student.network)))
    if state.watch is not None and state.watch.due(cycle):
        measured, is_best = watch_cycle(run, state.watch, cycle)
        values |= measured
        if is_best:
            state.best = copy_weights(run.student.network)
    return fetch_record(run, cycle + 1, values, prompts)


# ---- fake score


def update_fake_score(run: Run, stream: str, updates: range) -> dict[str, Tensor]:
    """Train the fake score on samples of the current student; returns the means of loss and gradient norm."""
    sources = updates[:1] if run.recipe.fake_rollout == "shared" else updates
    student_x0 = _draw_student_x0(run, stream, sources)
    losses, norms = [], []
    for update in updates:
        source = update if update in sources else sources[0]
        loss, norm = _fake_score_update(run, stream, update, source, student_x0)
        losses.append(loss)
        norms.append(norm)
    return {"fake_score_loss": torch.stack(losses).mean(), "fake_score_grad_norm": torch.stack(norms).mean()}


def _fake_score_update(
    run: Run, stream: str, update: int, source: int, student_x0: dict[Sample, Tensor]
) -> tuple[Tensor, Tensor]:
    """One update on the student's samples of update `source`, with its own noise; returns loss and gradient norm."""
    losses = []
    for indices in micro_batches(run.batch_indices, run.execution.fake_score_micro_batch):
        draws = run.draws.batch(stream, update, indices)
        cond = run.cond(run.draws.batch(stream, source, indices).prompts())
        loss = fake_score_update_loss(
            run.denoiser(run.fake_score, cond),
            x0=torch.stack([student_x0[source, index] for index in indices]),
            renoise=draws.noise("renoise"),
            level=draws.level(),
        )
        share = len(indices) / len(run.batch_indices)
        with run.gradient_sync(run.fake_score, sync=indices[-1] == run.batch_indices[-1]):
            run.accelerator.backward(share * loss)
        losses.append(share * loss.detach())
    return torch.stack(losses).sum(), run.fake_score.update()


def _draw_student_x0(run: Run, stream: str, updates: Sequence[int]) -> dict[Sample, Tensor]:
    """Samples of the student for some fake-score updates: x0 [C, H, W] by update and batch index."""
    samples = [(update, index) for update in updates for index in run.batch_indices]
    student_x0: list[Tensor] = []
    for part in micro_batches(samples, run.execution.rollout_micro_batch):
        draws = SampleDraws(run.draws, stream, part)
        student = run.denoiser(run.student, run.cond(draws.prompts()))
        student_x0 += student_pictures(student, draws.noise(), run.levels, draws.fresh())
    return dict(zip(samples, student_x0, strict=True))


# ---- student


@dataclass(frozen=True)
class MicroBatch:
    """A part of the student's batch that is back-propagated by itself."""

    draws: SampleDraws  # noise and levels of its samples
    anchors: AnchorBatch  # prompts, start noise and anchors of its samples
    cond: Conditioning  # embeddings of its prompts
    share: float  # of this process's batch; the gradients of all parts add up to that of the mean loss
    last: bool  # after the last part gradients are exchanged
    compare_gradients: bool  # measure the norms of both losses' gradients
    graded_step: int | None  # see `match_teacher`; the same for the whole batch


def update_student(run: Run, cycle: int) -> tuple[dict[str, Tensor], list[int]]:
    """One update of the student by L_DMD + lambda L_div; returns losses and norms, and the prompts' rows."""
    sums: dict[str, Tensor] = {}
    prompts: list[int] = []
    for indices in micro_batches(run.batch_indices, run.execution.student_micro_batch):
        anchors = run.data.draw_anchors(cycle, indices)
        first = indices[0] == run.batch_indices[0]
        part = MicroBatch(
            draws=run.draws.batch("student", cycle, indices),
            anchors=anchors,
            cond=run.cond(anchors.prompts),
            share=len(indices) / len(run.batch_indices),
            last=indices[-1] == run.batch_indices[-1],
            compare_gradients=first and _ratio_is_due(run, cycle),
            graded_step=graded_step(run.recipe, cycle),
        )
        # First steps: go where the teacher goes from this noise. L_div is back-propagated at once; with stop-gradient
        # the latents then carry no graph, so L_DMD does not reach these steps.
        diversity, latents, diversity_norm = backward_diversity(run, part)
        # Remaining steps: match the teacher's distribution.
        dmd, dmd_norm = backward_dmd(run, part, latents, compare=diversity_norm is not None)
        values = {"dmd_loss": part.share * dmd, "diversity_loss": part.share * diversity}
        if diversity_norm is not None:
            values["grad_ratio"] = diversity_norm / dmd_norm
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value
        prompts += part.anchors.prompts
    for group in run.student.optimizer.param_groups:
        group["lr"] = run.recipe.student.learning_rate * learning_rate_share(run.recipe, cycle)
    sums["student_grad_norm"] = run.student.update()
    return sums, prompts


def backward_diversity(run: Run, part: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Back-propagate lambda L_div through the anchored steps.

    Returns:
        L_div; the student's latents after these steps, [B, C, H, W]; the norm of its weighted gradient, None if it was
        not measured or no step is anchored.
    """
    recipe = run.recipe
    noise = onto(run.accelerator.device, part.anchors.noise)
    with run.gradient_sync(run.student, sync=_syncs_each_backward(run, part)):
        diversity, latents = follow_anchors(
            run.denoiser(run.student, part.cond),
            noise=noise,
            anchored=_anchored_steps(run, noise, part.anchors),
            levels=run.levels,
            stop_gradient=recipe.stop_gradient,
            space=recipe.space,
            fresh=part.draws.fresh(),
        )
        if not diversity.requires_grad:  # no step is anchored
            return diversity, latents, None
        # Without stop-gradient L_DMD goes back through the same steps
        keep_graph, weighted = not recipe.stop_gradient, part.share * recipe.diversity_weight * diversity
        norm = run.backward_student(weighted, measured=part.compare_gradients, retain_graph=keep_graph)
    return diversity.detach(), latents, norm


def backward_dmd(run: Run, part: MicroBatch, latents: Tensor, *, compare: bool) -> tuple[Tensor, Tensor | None]:
    """Back-propagate L_DMD through the remaining steps, from `latents` on.

    Returns:
        L_DMD; the norm of its gradient in this part, None without `compare`.
    """
    recipe = run.recipe
    with run.gradient_sync(run.student, sync=part.last or _syncs_each_backward(run, part)):
        dmd = match_teacher(
            run.denoiser(run.student, part.cond),
            run.guided_teacher(part.cond, recipe.guidance_interval),
            run.denoiser(run.fake_score, part.cond),
            latents=latents,
            first=recipe.anchored_steps,
            levels=run.levels,
            renoise=part.draws.noise("renoise"),
            level=part.draws.level(),
            normalizer=recipe.normalizer,
            fresh=part.draws.fresh(),
            graded_step=part.graded_step,
        )
        norm = run.backward_student(part.share * dmd, measured=compare)
    return dmd.detach(), norm


def _anchored_steps(run: Run, noise: Tensor, batch: AnchorBatch) -> list[AnchoredStep]:
    device = run.accelerator.device
    anchors = [onto(device, anchor) for anchor in batch.anchors]
    steps = anchored_steps(noise, anchors, run.levels[0], run.data.anchor_levels)
    if run.recipe.target == "secant":
        return steps
    return [step._replace(target=onto(device, x0)) for step, x0 in zip(steps, batch.denoised, strict=True)]


def _ratio_is_due(run: Run, cycle: int) -> bool:
    every = run.execution.ratio_every
    return every > 0 and cycle % every == 0


def _syncs_each_backward(run: Run, part: MicroBatch) -> bool:
    """True if every backward pass must synchronise: the norm of a sharded gradient is only valid after it."""
    return part.compare_gradients and is_sharded(run.student.network)


def fetch_record(run: Run, cycle: int, values: dict[str, Tensor], prompts: Sequence[int]) -> Record:
    """Bring a cycle's values to the CPU, as means over all processes; all refuse a non-finite one together."""
    flat = torch.stack([value.detach().float() for value in values.values()])
    numbers = run.accelerator.reduce(flat, reduction="mean").tolist()
    record: Record = {"step": cycle, **dict(zip(values, numbers, strict=True))}
    for name, value in record.items():
        if not math.isfinite(value):
            prompts = sorted(set(gather_object(prompts)))
            rates = f"student {run.recipe.student.learning_rate}, fake score {run.recipe.fake_score.learning_rate}"
            raise ValueError(f"{name} is {value} at step {cycle}, prompts {prompts}: lower the learning rate ({rates})")
    return record
