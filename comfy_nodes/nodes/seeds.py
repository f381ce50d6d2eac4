"""Seeds at a Glance: drafts of many seeds side by side, the chosen one finished. Diversity: one number for a batch."""

from __future__ import annotations

import re
import weakref
from typing import Any, NamedTuple

import comfy.samplers
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from .. import schedules, sheet
from ..noise import image_seeds
from .model import header_of, levels_of
from .sampler import as_intermediate, choose_method, conditions, draw, fit_latent, prepare_pictures, unguided
from .schema import method_input, schema, seed_input, show_text
from .teacher_start import make_guider, negative_input, start_inputs

MAX_SEEDS = 64
_OF_THE_START = ("base_model", "negative", "sigmas", "teacher_steps", "landing", "teacher_cfg")


class DPDMDSeeds(io.ComfyNode):
    """Draws drafts of many seeds and finishes one of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDSeeds",
            display_name="Seeds at a Glance",
            description="Draws a quick draft for each of many seeds and shows them side by side. Click a draft to "
            "finish it: its latent comes out of the node. With base_model connected, all start with Teacher Start.",
            aliases=["seed variation", "grid", "xy plot", "seed explorer", "preview seeds"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[*_model_inputs(), *_draft_inputs(), *start_inputs(), *_optional_inputs()],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The chosen picture, finished."),
                io.Int.Output("chosen_seed", display_name="chosen_seed", tooltip="Its seed."),
                io.Image.Output("sheet", display_name="sheet", tooltip="All drafts with their seeds as one picture."),
                io.Latent.Output("drafts", display_name="drafts", tooltip="The drafts, for Diversity."),
            ],
        )

    @classmethod
    def execute(
        cls, few_step_model, positive, latent_image, vae, seed, count, steps, pick, method, **start
    ) -> io.NodeOutput:
        if not 0 <= pick <= count:
            raise ValueError(f"pick is {pick} of {count} drafts: set 1 to {count}, or 0 for none")
        plan = _make_plan(few_step_model, positive, latent_image, method, start)
        rows = _parse_steps(steps)
        if count * len(rows) == 1:
            raise ValueError(
                "count is 1 and steps one number, so there is nothing to compare: raise count, or give several steps"
            )
        inputs = (few_step_model, positive, latent_image, vae, seed, count, tuple(rows), method)
        inputs += tuple(start.get(name) for name in _OF_THE_START)
        drafts = _remembered(cls.hidden.unique_id, inputs)
        if drafts is None:
            drafts = _make_drafts(plan, vae, seed, count, rows)
            _remember(cls.hidden.unique_id, inputs, drafts)
        seeds = image_seeds(seed, count)
        distance = f", diversity {sheet.mean_distance(drafts.latents):.2f}" if count > 1 else ""
        show_text(f"{count} seeds from {seed}{distance}", cls.hidden.unique_id)
        tiles = [
            {**saved, "label": label, "pick": index % count + 1}
            for index, (saved, label) in enumerate(zip(_save(drafts.tiles, cls), drafts.labels, strict=True))
        ]
        finished = {"samples": plan.draw(seed, [pick - 1])} if pick else ExecutionBlocker(None)
        chosen = seeds[pick - 1] if pick else ExecutionBlocker(None)
        columns = count if len(rows) > 1 else None
        page = sheet.make_sheet(drafts.tiles, drafts.labels, columns)
        shown = {"dpdmd_seeds": tiles, "dpdmd_columns": [columns or 0]}
        return io.NodeOutput(finished, chosen, page, {"samples": drafts.latents}, ui=shown)


def _model_inputs() -> list[io.Input]:
    return [
        io.Model.Input("few_step_model", tooltip="The few-step model, or the base model with a few-step LoRA."),
        io.Conditioning.Input("positive", tooltip="The prompt."),
        io.Latent.Input(
            "latent_image", tooltip="An empty latent. Its batch size is the number of pictures drawn at once."
        ),
        io.Vae.Input("vae", tooltip="Decodes the drafts."),
    ]


def _draft_inputs() -> list[io.Input]:
    return [
        seed_input("seed"),
        io.Int.Input("count", default=16, min=1, max=MAX_SEEDS, tooltip="Number of seeds: seed, seed + 1, ..."),
        io.String.Input(
            "steps",
            default="1",
            tooltip="Steps of a draft. Several numbers, such as 1, 2, 4, give a row for each: steps by seeds.",
        ),
        io.Int.Input(
            "pick",
            default=0,
            min=0,
            max=MAX_SEEDS,
            tooltip="Number of the draft to finish with all steps; a click on a draft sets it. 0: none, and nothing "
            "after this node runs.",
        ),
        method_input(),
    ]


def _optional_inputs() -> list[io.Input]:
    return [
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="The few-step model's noise levels; not needed if its file has a DP-DMD header.",
        ),
        io.Model.Input(
            "base_model",
            optional=True,
            tooltip="For a teacher start: the model that the few-step model was distilled from.",
        ),
        negative_input(),
    ]


class DPDMDDiversity(io.ComfyNode):
    """One number for how much the pictures of a batch differ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDDiversity",
            display_name="Diversity",
            description="Measures how much the pictures of a batch differ: their mean pairwise distance, in units of "
            "their standard deviation. 0: all alike. Compare models with the same prompt and seeds.",
            aliases=["diversity", "distance", "measure seeds"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[io.Latent.Input("samples", tooltip="A batch of at least two pictures with the same prompt.")],
            outputs=[io.Float.Output("distance", display_name="distance", tooltip="0 to about 1.4.")],
        )

    @classmethod
    def execute(cls, samples) -> io.NodeOutput:
        distance = sheet.mean_distance(samples["samples"])
        show_text(f"{len(samples['samples'])} pictures, diversity {distance:.3f}", cls.hidden.unique_id)
        return io.NodeOutput(distance)


# ---- drawing


class _Plan(NamedTuple):
    """Everything that decides a picture but its seed and the number of steps."""

    guider: comfy.samplers.CFGGuider
    latent: dict
    method: str
    sigmas: Tensor  # of the few-step model
    landing: int  # first level that the few-step model takes itself

    def draw(self, seed: int, indices: list[int], steps: int | None = None) -> Tensor:
        """Latents of the pictures `indices` of a batch, with all steps of the few-step model or with fewer."""
        own = self.sigmas[self.landing :]
        if steps is not None:
            own = schedules.trained_subset(own, steps)
        size, pictures = len(self.latent["samples"]), []
        for first in range(0, len(indices), size):
            part = indices[first : first + size]
            latent = self.latent | {"samples": self.latent["samples"][: len(part)], "batch_index": part}
            sigmas = torch.cat([self.sigmas[: self.landing], own])
            pictures.append(draw(self.guider, latent, seed, self.method, True, sigmas, preview=False))
        return as_intermediate(torch.cat(pictures))


def _make_plan(few_step_model: Any, positive: list, latent_image: dict, method: str, start: dict) -> _Plan:
    levels, header = levels_of(few_step_model), header_of(few_step_model)
    base_model, sigmas = start.get("base_model"), start.get("sigmas")
    model = prepare_pictures(few_step_model)
    if base_model is None:
        guider, landing = unguided(model, conditions(model, positive, start.get("negative"))), 0
    else:
        landing, options = start["landing"], {"teacher_steps": start["teacher_steps"], "cfg": start["teacher_cfg"]}
        negative = start.get("negative")
        guider = make_guider(prepare_pictures(base_model), model, positive, negative, landing=landing, **options)
    if sigmas is None:
        sigmas = schedules.sigmas_for(schedules.AUTO, 0, levels, header, custom="")[0]
    sigmas = schedules.check_sigmas(sigmas.float(), levels)
    if base_model is not None:
        guider.join(sigmas)  # refuses a landing without steps before anything is drawn
    return _Plan(guider, fit_latent(latent_image, model), choose_method(method, levels, header), sigmas, landing)


class _Drafts(NamedTuple):
    latents: Tensor  # of the last row
    tiles: Tensor  # of all rows, [rows * count, H, W, 3] in [0, 1]
    labels: list[str]


def _make_drafts(plan: _Plan, vae: Any, seed: int, count: int, rows: list[int]) -> _Drafts:
    tiles, labels = [], []
    for steps in rows:
        latents = plan.draw(seed, list(range(count)), steps)
        # one by one: decoding takes the most memory; of a film, the first frame
        images = [vae.decode(latent[None]).flatten(0, -4)[:1] for latent in latents]
        tiles.append(sheet.shrink(torch.cat(images).cpu()))
        prefix = f"{steps} step{'s' * (steps > 1)}, " if len(rows) > 1 else ""
        labels += [f"#{index + 1} {prefix}seed {each}" for index, each in enumerate(image_seeds(seed, count))]
    return _Drafts(latents, torch.cat(tiles), labels)


def _parse_steps(text: str) -> list[int]:
    words = re.findall(r"[^,\s]+", text)
    if not words or not all(word.isdecimal() and 1 <= int(word) <= schedules.MAX_STEPS for word in words):
        raise ValueError(
            f"steps {text!r} are no numbers from 1 to {schedules.MAX_STEPS}: write 1, or several such as 1, 2, 4"
        )
    return [int(word) for word in words]


def _save(tiles: Tensor, cls: type[io.ComfyNode]) -> list[dict]:
    """Write tiles into ComfyUI's folder of temporary pictures; returns where the page finds them."""
    return [dict(saved) for saved in ui.PreviewImage(tiles, cls=cls).values]


# ---- drafts of the last run, so that choosing one draws nothing again

_MEMORY: dict[str, tuple[tuple, _Drafts]] = {}  # id of a node -> its inputs and drafts


def _remember(node: str, inputs: tuple, drafts: _Drafts) -> None:
    """Keep drafts of a node, without keeping its models alive."""
    _MEMORY[node] = (tuple(map(_reference, inputs)), drafts)


def _remembered(node: str, inputs: tuple) -> _Drafts | None:
    """Drafts of the same inputs; ComfyUI hands over the same objects if nothing before the node changed."""
    references, drafts = _MEMORY.get(node, ((), None))
    same = len(references) == len(inputs) and all(map(_is_same, references, inputs))
    return drafts if same else None


def _reference(value: Any) -> Any:
    return value if isinstance(value, int | float | str | tuple | list | dict | None) else weakref.ref(value)


def _is_same(reference: Any, value: Any) -> bool:
    if isinstance(reference, weakref.ref):
        return reference() is value
    return reference is value if isinstance(value, list | dict) else reference == value
