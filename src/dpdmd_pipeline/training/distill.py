"""The loop of DP-DMD: fake-score turns and student turns, one record per step.

Every random draw is a function of (seed, purpose, turn, place in the global batch): a resumed run repeats an
uninterrupted one bit for bit, and neither the number of processes nor the size of the parts that a batch is
worked through in changes what a sample sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning, GuidanceBatch, conditioned, guided
from dpdmd_pipeline.dpdmd.algorithm import fake_score_turn_loss, follow_anchors, match_teacher, student_pictures
from dpdmd_pipeline.dpdmd.anchor import AnchoredStep, anchored_steps
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, add_noise
from dpdmd_pipeline.dpdmd.sampling import Denoise, Fresh, noise_from_seeds, rollout, sample_seeds, uniform_from_seeds
from dpdmd_pipeline.training.anchors import AnchorBatch, Embeddings
from dpdmd_pipeline.training.balance import Balance
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.optimizer import learning_rate_share, make_optimizer
from dpdmd_pipeline.training.recipe import OptimizerRecipe, Recipe
from dpdmd_pipeline.training.roles import Roles, trainable
from dpdmd_pipeline.training.sharding import gradient_norm, is_sharded, load_whole_state, unsynced, whole, whole_state
from dpdmd_pipeline.training.speed import Compile, onto, speed_up
from dpdmd_pipeline.training.watch import Watch, kept_weights

Record = dict[str, float]

DrawAnchors = Callable[[int, Sequence[int]], AnchorBatch]  # of a step, and of places in its global batch


@dataclass(frozen=True)
class Lessons:
    """What is learned from.

    Attributes:
        embeddings: of all prompts.
        prompts: rows that are trained on.
        draw_anchors: the student turn's samples at a step.
        anchor_levels: scalar level of each anchor.
        teacher_levels: of the teacher's own sampling, [steps + 1].
        guidance_scale: of the teacher.
    """

    embeddings: Embeddings
    prompts: Sequence[int]
    draw_anchors: DrawAnchors
    anchor_levels: Sequence[NoiseLevel]
    teacher_levels: NoiseLevel
    guidance_scale: float


@dataclass(frozen=True)
class Execution:
    """How a recipe is carried out; nothing in here changes the student beyond rounding.

    Attributes:
        checkpoint_every: steps between checkpoints; also written when the consumer closes the generator.
        fetch_every: steps between fetches of the losses from the device; each waits for the device.
        ratio_every: steps between measurements of the two gradients' norms (one more backward pass of each).
        student_micro_batch, fake_score_micro_batch: samples that one backward pass sees; their gradients add up to the
            whole batch's.
        rollout_micro_batch: samples that the student draws at once for the fake score. It stays as it is between two
            of its own turns, so more than a batch are drawn for several turns of the fake score together.
        guidance_batch: whether the two halves of a guided call of L_DMD's teacher share a batch, see `guided`.
        compile, channels_last: see `speed_up`.
        fused: see `make_optimizer`.
    """

    checkpoint_every: int
    fetch_every: int
    ratio_every: int
    student_micro_batch: int
    fake_score_micro_batch: int
    rollout_micro_batch: int
    guidance_batch: GuidanceBatch
    compile: Compile
    channels_last: bool
    fused: bool


def distill(
    backbone: Backbone,
    roles: Roles,
    lessons: Lessons,
    recipe: Recipe,
    checkpoints: Checkpoints,
    resumed: tuple[int, dict[str, Any]] | None,
    execution: Execution,
) -> Iterator[Record]:
    """Distil the teacher into `roles.student`; yields the record of each new step.

    Args:
        backbone: the family of the three networks.
        roles: trained in place; at the end the student holds its averaged weights, or its best turn's, where the recipe
            says so.
        lessons: prompts and anchors.
        recipe: every number that changes the result.
        checkpoints: written to as the run goes.
        resumed: what `checkpoints.load_latest` found; its history goes into the next checkpoint.
        execution: how it is carried out.

    Raises:
        ValueError: when a loss or a gradient is not finite, with the step and the prompts' rows.
    """
    run = _Run(backbone, roles, lessons, recipe, _accelerator(backbone.device, recipe), execution)
    done = saved = run.resume(resumed)
    between_steps, waiting = True, []
    try:
        for step in range(done, recipe.max_steps):
            between_steps = False
            waiting.append(run.step(step))
            checkpoint_due = (step + 1) % execution.checkpoint_every == 0 or step + 1 == recipe.max_steps
            if not checkpoint_due and len(waiting) < execution.fetch_every:
                continue
            records, waiting = run.fetch(waiting), []
            done, between_steps = step + 1, True
            if checkpoint_due:
                run.save(checkpoints, done)
                saved = done
            yield from records
    finally:  # a closed generator: what was learned stays; a step broken off half-way would not repeat exactly
        if between_steps and done > saved:
            run.save(checkpoints, done)


@dataclass(frozen=True)
class _Step:
    """One step's losses and norms, still on the device, and the rows of the student turn's prompts."""

    number: int
    values: dict[str, Tensor]
    prompts: Sequence[int]


@dataclass(frozen=True)
class _Part:
    """A part of a student turn's batch, which is worked through on its own.

    Attributes:
        seeds_for: from a purpose to the seeds of its samples.
        batch: its samples.
        share: of this process's batch; the gradients of all parts add up to that of its mean loss.
        last: whether its last backward pass is the turn's, which exchanges the gradients.
        measured: whether the norms of both gradients are wanted of it.
        graded_step: see `match_teacher`; of the whole turn.
    """

    seeds_for: Callable[[str], list[int]]
    batch: AnchorBatch
    share: float
    last: bool
    measured: bool
    graded_step: int | None


class _Run:
    """Networks, optimisers and history of one distillation: what a checkpoint holds."""

    def __init__(
        self,
        backbone: Backbone,
        roles: Roles,
        lessons: Lessons,
        recipe: Recipe,
        accelerator: Accelerator,
        execution: Execution,
    ) -> None:
        self.backbone, self.lessons, self.recipe, self.accelerator = backbone, lessons, recipe, accelerator
        self.execution = execution
        self.places = _share(recipe.batch_size, accelerator.process_index, accelerator.num_processes)
        self.levels = backbone.student_schedule(recipe.grid, recipe.num_steps)
        if recipe.anchored_steps and recipe.space == "eps" and self.levels[0].alpha == 0:
            raise ValueError("space=eps gives the first step of a flow model no weight at all: choose v or x0")
        speed_up(roles, compiled=execution.compile, channels_last=execution.channels_last)
        self.teacher = roles.teacher
        self.student, self.student_optimizer = _prepare(accelerator, roles.student, recipe.student, execution.fused)
        self.fake_score, self.fake_score_optimizer = _prepare(
            accelerator, roles.fake_score, recipe.fake_score, execution.fused
        )
        self.balance = Balance(recipe, accelerator.device) if recipe.weighting == "balanced" else None
        self.ema = _average(roles.student, recipe.ema) if recipe.ema else None
        part = execution.student_micro_batch
        self.watch = Watch(recipe, lessons.prompts, part) if recipe.watch.every else None
        self.best = kept_weights(trainable(roles.student)) if recipe.watch.keep == "best" else None
        self.uncond = self._cond([len(lessons.embeddings) - 1])
        self.history: list[Record] = []

    # ---- checkpoints

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Write the state after `step` steps; the last one puts the averaged or the best weights into the student."""
        finished = step == self.recipe.max_steps
        chosen = self.best if self.ema is None else self.ema.module
        if finished and chosen is not None:
            with torch.no_grad():
                for weight, kept in zip(trainable(self.student), chosen, strict=True):
                    weight.copy_(kept)
        state = self._state(finished)  # of all processes, where each holds a shard
        if self.accelerator.is_main_process:
            checkpoints.save(step, state, finished=finished)
        self.accelerator.wait_for_everyone()

    def _state(self, finished: bool) -> dict[str, Any]:
        """All that a continuation needs; a finished run keeps the student alone."""
        kept = {"student": self.student} if finished else self._stateful()
        states = {name: self._plain(thing).state_dict() for name, thing in kept.items()}
        return {"history": self.history, **whole_state(states, kept=self.accelerator.is_main_process)}

    def _stateful(self) -> dict[str, Any]:
        networks = ("student", "fake_score", "student_optimizer", "fake_score_optimizer")
        names = (*networks, "ema", "balance", "watch", "best")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _plain(self, thing: Any) -> Any:
        return self.accelerator.unwrap_model(thing) if isinstance(thing, nn.Module) else thing

    def resume(self, found: tuple[int, dict[str, Any]] | None) -> int:
        """Continue from a checkpoint's state; returns the number of finished steps."""
        if found is None:
            return 0
        step, state = found
        self.history = list(state["history"])
        for name, thing in self._stateful().items():
            if name in state:
                load_whole_state(self._plain(thing), state[name])
        return step

    # ---- steps

    def step(self, step: int) -> _Step:
        """The turns of the fake score, then one of the student."""
        if step == 0:
            for turn in range(self.recipe.fake_score_warmup):
                self._fake_score_turns("fake_score_warmup", range(turn, turn + 1))
        turns = self.recipe.fake_score_turns
        losses, norms = zip(*self._fake_score_turns("fake_score", range(step * turns, (step + 1) * turns)), strict=True)
        means = {"fake_score_loss": torch.stack(losses).mean(), "fake_score_grad_norm": torch.stack(norms).mean()}
        values, prompts = self._student_turn(step)
        if self.watch is not None and self.watch.due(step):
            values |= self._watched(step)
        return _Step(step + 1, {**means, **values}, prompts)

    def fetch(self, steps: list[_Step]) -> list[Record]:
        """Bring the losses of some steps over and append them to the history; one that is not finite ends the run."""
        flat = torch.stack([value.detach().float() for step in steps for value in step.values.values()])
        numbers = iter(self.accelerator.reduce(flat, reduction="mean").tolist())
        records = []
        for step in steps:
            record: Record = {"step": step.number, **{name: next(numbers) for name in step.values}}
            self._check(record, step)
            records.append(record)
        self.history += records
        return records

    def _fake_score_turns(self, stream: str, turns: range) -> list[tuple[Tensor, Tensor]]:
        """Updates of the fake score on what the student draws now: loss and gradient norm of each."""
        shared = self.recipe.fake_rollout == "shared"
        pictures = self._pictures(stream, turns[:1] if shared else turns)
        return [self._fake_score_turn(stream, turn, turns[0] if shared else turn, pictures) for turn in turns]

    def _fake_score_turn(self, stream: str, turn: int, source: int, pictures: dict) -> tuple[Tensor, Tensor]:
        """One update of the fake score on the pictures of turn `source`, with noise of its own."""
        losses = []
        for places, last in _parts(self.places, self.execution.fake_score_micro_batch):
            seeds_for = partial(self._seeds, stream, turn, places)
            x0 = torch.stack([pictures[source, place] for place in places])
            loss = fake_score_turn_loss(
                conditioned(self.backbone, self.fake_score, self._cond(self._prompts(stream, source, places))),
                x0=x0,
                renoise=self._noise(seeds_for("renoise")),
                level=self._random_level(seeds_for("level")),
            )
            share = len(places) / len(self.places)
            with self._unsynced(self.fake_score, not last):
                self.accelerator.backward(share * loss)
            losses.append(share * loss.detach())
        norm = self._update(self.fake_score, self.fake_score_optimizer, self.recipe.fake_score)
        return torch.stack(losses).sum(), norm

    def _pictures(self, stream: str, turns: Sequence[int]) -> dict[tuple[int, int], Tensor]:
        """What the student draws now for some turns of the fake score: x0 [C, H, W] by turn and place."""
        wanted = [(turn, place) for turn in turns for place in self.places]
        pictures: list[Tensor] = []
        for part, _ in _parts(range(len(wanted)), self.execution.rollout_micro_batch):
            pictures += self._rollout(stream, wanted[part.start : part.stop])
        return dict(zip(wanted, pictures, strict=True))

    def _rollout(self, stream: str, samples: Sequence[tuple[int, int]]) -> Tensor:
        """What the student draws now for some turns and places, [B, C, H, W]."""

        def seeds_for(purpose: str) -> list[int]:
            return [self._seeds(stream, turn, [place], purpose)[0] for turn, place in samples]

        cond = self._cond([self._prompts(stream, turn, [place])[0] for turn, place in samples])
        student = conditioned(self.backbone, self.student, cond)
        return student_pictures(student, self._noise(seeds_for("noise")), self.levels, self._fresh(seeds_for))

    def _prompts(self, stream: str, turn: int, places: Sequence[int]) -> list[int]:
        """Rows of the embeddings that a turn's pictures are of."""
        rows = self.lessons.prompts
        return [rows[seed % len(rows)] for seed in self._seeds(stream, turn, places, "prompt")]

    def _student_turn(self, step: int) -> tuple[dict[str, Tensor], list[int]]:
        """One update of the student: its losses and norms, and the rows of the prompts it was of."""
        sums: dict[str, Tensor] = {}
        prompts: list[int] = []
        balancing = self.balance is not None and self.balance.due(step)
        apart = [torch.zeros_like(weight) for weight in trainable(self.student)] if balancing else None
        for places, last in _parts(self.places, self.execution.student_micro_batch):
            batch = self.lessons.draw_anchors(step, places)
            measured = step % self.execution.ratio_every == 0 and not prompts  # of the first part only
            share = len(places) / len(self.places)
            seeds_for = partial(self._seeds, "student", step, places)
            part = _Part(seeds_for, batch, share, last, measured, self._graded_step(step))
            for name, value in self._student_part(part, apart).items():
                sums[name] = sums.get(name, 0) + value
            prompts += batch.prompts
        if apart is not None:
            self._weigh(apart)
        if self.balance is not None:
            sums["diversity_weight"] = self._diversity_weight
        if "grad_ratio" in sums:
            sums["grad_ratio"] = self._diversity_weight * sums["grad_ratio"]
        for group in self.student_optimizer.param_groups:
            group["lr"] = self.recipe.student.learning_rate * learning_rate_share(self.recipe, step)
        sums["student_grad_norm"] = self._update(self.student, self.student_optimizer, self.recipe.student)
        if self.ema is not None:
            self.ema.update_parameters(nn.ParameterList(trainable(self.student)))
        return sums, prompts

    def _student_part(self, part: _Part, apart: list[Tensor] | None) -> dict[str, Tensor]:
        """Both losses of a part of the batch, back-propagated; L_div first, so that its activations are freed."""
        cond = self._cond(part.batch.prompts)
        student = conditioned(self.backbone, self.student, cond)
        diversity, latents, norm = self._follow_anchors(part, student, apart)
        dmd, ratio = self._match_teacher(part, student, cond, latents, norm)
        losses = {"dmd_loss": part.share * dmd, "diversity_loss": part.share * diversity}
        return losses if ratio is None else {**losses, "grad_ratio": ratio}

    def _follow_anchors(
        self, part: _Part, student: Denoise, apart: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The anchored steps of a part, and the backward pass of their loss.

        Returns:
            L_div; where the student stands now, [B, C, H, W]; the norm of L_div's gradient, None where it was not
            measured or no step is anchored.
        """
        noise = onto(self.accelerator.device, part.batch.noise)
        with self._unsynced(self.student, not self._exchanged(part)):
            diversity, latents = follow_anchors(
                student,
                noise=noise,
                anchored=self._anchored(noise, part.batch),
                levels=self.levels,
                stop_gradient=self.recipe.stop_gradient,
                space=self.recipe.space,
                fresh=self._fresh(part.seeds_for),
            )
            if not diversity.requires_grad:  # no step is anchored
                return diversity, latents, None
            norm = self._gradient_norm(diversity) if part.measured else None
            self._add_diversity(diversity, part.share, apart)
        return diversity.detach(), latents, norm

    def _match_teacher(
        self, part: _Part, student: Denoise, cond: Conditioning, latents: Tensor, diversity_norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The remaining steps of a part, and the backward pass of their loss.

        Returns:
            L_DMD; the norm of L_div's gradient over that of its own, None where the former was not measured.
        """
        with self._unsynced(self.student, not (part.last or self._exchanged(part))):
            dmd = match_teacher(
                student,
                self._guided_teacher(cond),
                conditioned(self.backbone, self.fake_score, cond),
                latents=latents,
                first=self.recipe.anchored_steps,
                levels=self.levels,
                renoise=self._noise(part.seeds_for("renoise")),
                level=self._random_level(part.seeds_for("level")),
                normalizer=self.recipe.normalizer,
                fresh=self._fresh(part.seeds_for),
                graded_step=part.graded_step,
            )
            ratio = None if diversity_norm is None else diversity_norm / self._gradient_norm(dmd)
            self.accelerator.backward(part.share * dmd)
        return dmd.detach(), ratio

    def _exchanged(self, part: _Part) -> bool:
        """Whether all backward passes of a part exchange: a norm is read off shards, which come of an exchange."""
        return part.measured and is_sharded(self.student)

    def _guided_teacher(self, cond: Conditioning) -> Denoise:
        return guided(
            self.backbone,
            self.teacher,
            cond,
            self.uncond,
            self.lessons.guidance_scale,
            interval=self.recipe.guidance_interval,
            batch=self.execution.guidance_batch,
        )

    def _watched(self, step: int) -> dict[str, Tensor]:
        """What the student draws now, and what the teacher draws, which is measured once; every process draws all."""
        if not self.watch.of_teacher:
            measured = self.watch.measure(self._watched_teacher, self._corrected)
            self.watch.of_teacher = {name: self._mean(value).item() for name, value in measured.items()}
        found = self.watch.measure(self._watched_student, self._corrected)
        if self.best is not None:
            diversity, correction = (self._mean(found[name]).item() for name in ("latent_diversity", "correction"))
            if self.watch.is_best(step, diversity, correction):
                self.best = kept_weights(trainable(self.student))
            found["best_step"] = self._scalar(self.watch.best_step)
        return {**found, **{f"{name}_teacher": self._scalar(value) for name, value in self.watch.of_teacher.items()}}

    def _watched_student(self, rows: Sequence[int], places: range) -> Tensor:
        seeds_for = partial(self._seeds, "watch", 0, places)
        student = conditioned(self.backbone, self.student, self._cond(rows))
        return student_pictures(student, self._noise(seeds_for("noise")), self.levels, self._fresh(seeds_for))

    def _watched_teacher(self, rows: Sequence[int], places: range) -> Tensor:
        noise = self._noise(self._seeds("watch", 0, places, "noise"))
        return rollout(self._guided_everywhere(rows), noise, self.lessons.teacher_levels)

    def _corrected(self, rows: Sequence[int], places: range, latents: Tensor) -> Tensor:
        level = self.backbone.random_level(torch.full((len(rows),), self.recipe.watch.level))
        noise = self._noise(self._seeds("watch", 0, places, "renoise"))
        return self._guided_everywhere(rows)(add_noise(latents, noise, level), level)

    def _guided_everywhere(self, rows: Sequence[int]) -> Denoise:
        """The teacher as it samples, whatever L_DMD's guidance interval."""
        scale, batch = self.lessons.guidance_scale, self.execution.guidance_batch
        return guided(self.backbone, self.teacher, self._cond(rows), self.uncond, scale, batch=batch)

    def _mean(self, value: Tensor) -> Tensor:
        """Over the processes, which must choose alike though their roundings may differ."""
        return self.accelerator.reduce(value, reduction="mean")

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.accelerator.device)

    @property
    def _diversity_weight(self) -> float | Tensor:
        return self.recipe.diversity_weight if self.balance is None else self.balance.weight

    def _add_diversity(self, diversity: Tensor, share: float, apart: list[Tensor] | None) -> None:
        """Back-propagate a share of L_div: under its weight, or, where that is still to be found, into `apart`."""
        keep = not self.recipe.stop_gradient  # then L_DMD goes through the same steps once more
        if apart is None:
            self.accelerator.backward(share * self._diversity_weight * diversity, retain_graph=keep)
            return
        grads = torch.autograd.grad(share * diversity, trainable(self.student), retain_graph=keep, allow_unused=True)
        for held, grad in zip(apart, grads, strict=True):
            if grad is not None:
                held += grad

    def _weigh(self, apart: list[Tensor]) -> None:
        """Measure both gradients of the whole batch, and add L_div's, held apart until now, under the new weight."""
        weights = trainable(self.student)
        means = [self.accelerator.reduce(grad, reduction="mean") for grad in apart]
        dmd = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        self.balance.measure(get_total_norm(means), dmd)
        factor = self.balance.weight
        for weight, mean in zip(weights, means, strict=True):
            if weight.grad is not None:  # what L_DMD does not reach, L_div does not either
                weight.grad.add_(factor * mean)

    def _graded_step(self, step: int) -> int | None:
        first, count = self.recipe.anchored_steps, self.recipe.num_steps
        if self.recipe.graded_steps == "random":  # the same for the whole batch: one graph
            (seed,) = sample_seeds(self.recipe.seed, "student/graded_step", step, 1)
            return first + seed % (count - first)
        return count - 1 if self.recipe.graded_steps == "last" else None

    def _anchored(self, noise: Tensor, batch: AnchorBatch) -> list[AnchoredStep]:
        device = self.accelerator.device
        lessons = anchored_steps(
            noise, [onto(device, anchor) for anchor in batch.anchors], self.levels[0], self.lessons.anchor_levels
        )
        if self.recipe.target == "secant":
            return lessons
        return [lesson._replace(target=onto(device, x0)) for lesson, x0 in zip(lessons, batch.denoised, strict=True)]

    def _gradient_norm(self, loss: Tensor) -> Tensor:
        """Norm of a loss's gradient in the student's weights, of all processes; lambda is read off two of them."""
        if is_sharded(self.student):
            return gradient_norm(loss, trainable(self.student))
        grads = torch.autograd.grad(loss, trainable(self.student), retain_graph=True, allow_unused=True)
        means = (self.accelerator.reduce(grad, reduction="mean") for grad in grads if grad is not None)
        return torch.stack([mean.norm() for mean in means]).norm()

    def _update(self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: OptimizerRecipe) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(trainable(model), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return whole(norm)

    def _unsynced(self, model: nn.Module, apart: bool) -> AbstractContextManager:
        """Gradients of all but a turn's last backward pass are not exchanged between processes."""
        if not apart:
            return nullcontext()
        return unsynced(model) if is_sharded(model) else self.accelerator.no_sync(model)

    # ---- draws

    def _seeds(self, stream: str, turn: int, places: Sequence[int], purpose: str) -> list[int]:
        return sample_seeds(self.recipe.seed, f"{stream}/{purpose}", turn, places)

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        return onto(self.accelerator.device, noise_from_seeds(seeds, self.backbone.latent_shape))

    def _random_level(self, seeds: Sequence[int]) -> NoiseLevel:
        return self.backbone.random_level(uniform_from_seeds(seeds))

    def _fresh(self, seeds_for: Callable[[str], list[int]]) -> Fresh | None:
        """Noise between the student's steps, where it re-noises."""
        if self.recipe.between_steps == "ode":
            return None
        return lambda number: self._noise(seeds_for(f"between/{number}"))

    def _cond(self, prompts: Sequence[int]) -> Conditioning:
        found = self.lessons.embeddings.rows(prompts)
        return {name: onto(self.accelerator.device, value) for name, value in found.items()}

    def _check(self, record: Record, step: _Step) -> None:
        """A record is the mean over all processes: they all refuse it together, with the same words."""
        for name, value in record.items():
            if not abs(value) < float("inf"):
                rates = (
                    f"student {self.recipe.student.learning_rate}, fake score {self.recipe.fake_score.learning_rate}"
                )
                raise ValueError(
                    f"{name} is {value} at step {step.number}, prompts {sorted(set(gather_object(step.prompts)))}: "
                    f"lower the learning rate ({rates})"
                )


def _accelerator(device: torch.device, recipe: Recipe) -> Accelerator:
    """This process among the others, if there are others; they exchange gradients, nothing else."""
    precision = {"float32": "no", "bfloat16": "bf16"}[recipe.precision]
    exchange = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[exchange])


def _prepare(
    accelerator: Accelerator, network: nn.Module, recipe: OptimizerRecipe, fused: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A trained network among the other processes', and its optimizer."""
    optimizer = make_optimizer(trainable(network), recipe, fused=fused)
    if is_sharded(network):  # it exchanges by itself; only the precision is accelerate's
        return accelerator.prepare_model(network, device_placement=False, evaluation_mode=True), optimizer
    return accelerator.prepare(network, optimizer)


def _average(student: nn.Module, decay: float) -> AveragedModel:
    """Of the trained weights alone: a view of a shared base would be copied with all of it."""
    return AveragedModel(nn.ParameterList(trainable(student)), multi_avg_fn=get_ema_multi_avg_fn(decay))


def _share(batch_size: int, process: int, processes: int) -> range:
    """A process's places in the global batch.

    Raises:
        ValueError: if the batch cannot be shared evenly.
    """
    if batch_size % processes:
        raise ValueError(f"train.batch_size={batch_size} cannot be shared evenly by {processes} processes")
    each = batch_size // processes
    return range(process * each, (process + 1) * each)


def _parts(places: range, size: int) -> Iterator[tuple[range, bool]]:
    """A range in parts of at most `size`, each with whether it is the last."""
    for start in range(places.start, places.stop, size):
        part = range(start, min(start + size, places.stop))
        yield part, part.stop == places.stop
