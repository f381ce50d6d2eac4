"""The model card of an export: front matter for a hub, usage, schedule, measurements and options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.dpdmd.noise import NUM_TRAIN_TIMESTEPS, flow_sigmas, shift_sigma
from dpdmd_pipeline.exporting.rounding import Loss

PAPER = "https://arxiv.org/abs/2602.03139"
FORMS = ("diffusers", "comfyui", "lora")
_COMFYUI_FAMILIES = ("sd3", "sdxl")  # tested: ComfyUI loads their diffusers keys
_COMFYUI_SHIFT = 3.0  # ComfyUI's default for an SD3 file
_CLIP_TOKENS = 77
_NO_LICENCE = "Licence: unknown. The licence of the teacher applies."
_NO_RECIPE = "The options of this student's training are unknown: its file does not name them."


@dataclass(frozen=True)
class Licence:
    """Fields of a hub's front matter, None if unknown; name and link belong to the licence `other`."""

    license: str | None
    license_name: str | None
    license_link: str | None


@dataclass(frozen=True)
class DiffusersUse:
    """Arguments with which diffusers draws with the student."""

    load: Mapping[str, Any]  # further arguments of the pipeline's `from_pretrained`
    call: Mapping[str, Any]  # arguments of the pipeline's call, without prompts and generators
    defaults: Mapping[str, Any]  # values that diffusers takes for those of them that are left out
    scheduler: str  # name of the scheduler's class
    settings: Mapping[str, Any]  # of the scheduler, without its defaults
    passes_generators: bool  # True if the pipeline's generators also make the noise between the sampling steps


@dataclass(frozen=True)
class CardFacts:
    """Facts for a card."""

    title: str  # of the model, and name of its files
    licence: Licence
    base_model: str | None  # hub id of the teacher; None if unknown
    teacher_folder: str  # name of the teacher's folder, used without a hub id
    header: StudentHeader  # of the student, before a LoRA is added to the teacher's weights
    dtype: str  # of the exported weights
    files: Mapping[str, str]  # path below the card of every form that was written
    diffusers: DiffusersUse
    losses: Mapping[str, Loss]  # by storing a LoRA, alone and merged; {} for a full student
    metrics: Mapping[str, Any]  # of this student, as the evaluate stage writes them; {} without measurements
    measure: str  # command that measures it and exports it again, for this environment


def write_card(facts: CardFacts) -> str:
    """Write the card in Markdown."""
    uses = {"diffusers": _use_diffusers, "comfyui": _use_comfyui, "lora": _use_lora}
    sections = [
        _front_matter(facts),
        f"# {facts.title}",
        _summary(facts),
        *([] if facts.licence.license else [_NO_LICENCE]),
        "## Use",
        *(uses[form](facts) for form in FORMS if form in facts.files),
        _use_here(facts),
        "## Schedule",
        _schedule(facts.header),
        *(["## Precision", _precision(facts)] if facts.losses else []),
        *(["## Measured", _measured(facts.metrics)] if facts.metrics else [_not_measured(facts)]),
        *(["## Options of the training", _options(recipe)] if (recipe := facts.header.recipe) else [_NO_RECIPE]),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(facts: CardFacts) -> str:
    steps, base = facts.header.num_steps, facts.base_model or facts.teacher_folder
    kind = "LoRA" if facts.header.kind == "lora" else "student"
    method = f"[DP-DMD]({PAPER}). Its first step is trained to give every seed its own picture"
    if (facts.header.recipe or {}).get("train", {}).get("anchored_steps") == 0:
        method = "DMD, without the anchored steps that preserve diversity"
    return (
        f"A {steps}-step {kind} of `{base}`, distilled with {method}. A picture costs {steps} evaluations of the "
        "network, without classifier-free guidance."
    )


def _front_matter(facts: CardFacts) -> str:
    """YAML front matter; every JSON string is valid YAML."""
    relation = "adapter" if facts.header.kind == "lora" else "finetune"
    fields = {
        **vars(facts.licence),
        "base_model": facts.base_model,
        "base_model_relation": facts.base_model and relation,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value]
    tags = ["distillation", "few-step", "dp-dmd", facts.header.family]
    tags += ["lora"] if facts.header.kind == "lora" else []
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


# ---- use


def _use_diffusers(facts: CardFacts) -> str:
    code = _python("from diffusers import DiffusionPipeline", _pipe(facts, facts.files["diffusers"]), _draw(facts))
    return "\n\n".join(["### diffusers", code, _call_notes(facts)])


def _use_lora(facts: CardFacts) -> str:
    scheduler, settings = facts.diffusers.scheduler, facts.diffusers.settings
    code = _python(
        f"from diffusers import {', '.join(sorted(['DiffusionPipeline', scheduler]))}",
        _pipe(facts, facts.base_model or "path/to/teacher"),
        f'pipe.load_lora_weights("{facts.files["lora"]}")',
        f"pipe.scheduler = {scheduler}({_arguments(settings)})",
        _draw(facts),
    )
    comfyui = "In ComfyUI, load the teacher and this file from `models/loras`."
    return "\n\n".join(["### LoRA", code, comfyui])


def _pipe(facts: CardFacts, path: str) -> str:
    more = _arguments(facts.diffusers.load)
    return f'pipe = DiffusionPipeline.from_pretrained("{path}", dtype=torch.{facts.dtype}{more and ", "}{more})'


def _draw(facts: CardFacts) -> str:
    generator = "[torch.Generator().manual_seed(seed) for seed in (0, 1)]"
    lines = ['["a prompt", "another"]', *_arguments(facts.diffusers.call, "\n").splitlines(), f"generator={generator}"]
    return "\n".join(["images = pipe(", *(f"    {line.rstrip(',')}," for line in lines), ").images"])


def _python(*lines: str) -> str:
    return "\n".join(["```python", "import torch", *lines, "```"])


def _arguments(values: Mapping[str, Any], between: str = " ") -> str:
    return f",{between}".join(f"{name}={value!r}" for name, value in values.items())


def _call_notes(facts: CardFacts) -> str:
    notes = ["Each picture has its own generator on the CPU, so that it depends on its prompt and seed alone."]
    if facts.header.sampler == "renoise" and not facts.diffusers.passes_generators:
        notes = ["diffusers takes the noise between this pipeline's sampling steps from torch's global generator."]
    own = ", ".join(f"`{name}={value!r}`" for name, value in facts.diffusers.defaults.items())
    notes.append(f"**Give every argument**: diffusers stores none, and would take its own defaults ({own}).")
    sigmas = facts.diffusers.call.get("sigmas")
    if sigmas:
        notes.append("Without `sigmas`, the levels depend on the version of diffusers.")
    if sigmas and sigmas != facts.header.grid:
        notes.append("The scheduler shifts these `sigmas` once, which gives the levels below.")
    if "timesteps" in facts.diffusers.call:
        notes.append("Without `timesteps`, diffusers draws at levels at which the student was not trained.")
    return " ".join(notes)


def _use_comfyui(facts: CardFacts) -> str:
    family, length = facts.header.family, facts.header.max_sequence_length
    notes = [
        f"Put `{facts.files['comfyui']}` into `models/diffusion_models`. The nodes of category DP-DMD read the "
        "schedule from the file."
    ]
    if family in _COMFYUI_FAMILIES:
        notes.append(_stock_nodes(facts.header))
    else:
        notes.append(f"Stock ComfyUI was not tested with the family {family}.")
    if length and length > _CLIP_TOKENS:
        notes.append(f"Pad T5 as in training: `T5TokenizerOptions` with `min_length={length}`.")
    return "### ComfyUI\n\n" + " ".join(notes)


def _stock_nodes(header: StudentHeader) -> str:
    """Settings of ComfyUI's own nodes that give the trained levels."""
    if header.sampler == "renoise":
        return (
            "Use the DP-DMD nodes. With stock samplers that re-noise, the pictures of a seed depend on the version of "
            "ComfyUI."
        )
    scheduler = _stock_scheduler(header)
    if scheduler is None:
        return "Use the DP-DMD nodes, or enter the sigmas below: no stock scheduler has the trained levels."
    patched = header.prediction == "flow" and header.shift != _COMFYUI_SHIFT
    patch = f"`ModelSamplingSD3` with `shift={header.shift}`, then " if patched else ""
    return f"With stock nodes: {patch}`KSampler` with `euler`, `{scheduler}`, {header.num_steps} steps and cfg 1.0."


def _stock_scheduler(header: StudentHeader) -> str | None:
    """ComfyUI's name of the scheduler with the trained levels; None if there is none."""
    # ComfyUI's `simple` takes every (1000 / N)-th entry of a table of 1000 levels, from its end and rounded down.
    entries = [
        NUM_TRAIN_TIMESTEPS - 1 - NUM_TRAIN_TIMESTEPS * step // header.num_steps for step in range(header.num_steps)
    ]
    if header.prediction != "flow":
        return "simple" if header.timesteps == entries else None
    if header.shift:
        table = shift_sigma((torch.tensor(entries, dtype=torch.float64) + 1) / NUM_TRAIN_TIMESTEPS, header.shift)
        normal = flow_sigmas(header.num_steps, header.shift, "diffusers")
        for levels, name in ((normal.double(), "normal"), (torch.cat([table, table.new_zeros(1)]), "simple")):
            if torch.allclose(levels, torch.tensor(header.sigmas).double(), rtol=0, atol=1e-6):
                return name
    return None


def _comfyui_sigmas(header: StudentHeader) -> str | None:
    """Levels as ComfyUI takes them: sigma for flow, sigma / alpha for VP (of SDXL's table); None for other tables."""
    if header.prediction == "flow":
        return ", ".join(f"{sigma:.6g}" for sigma in header.sigmas)
    if header.family != "sdxl":
        return None
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)[header.timesteps]
    ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().tolist()
    return f"{', '.join(f'{ratio:.6g}' for ratio in [*ratios, 0.0])} (sigma / alpha, for SDXL's table of noise levels)"


def _use_here(facts: CardFacts) -> str:
    form = next(form for form in FORMS if form in facts.files)
    teacher = "" if form == "diffusers" else ', teacher="path/to/teacher"'
    call = f'images = sample("{facts.files[form]}", ["a prompt", "another"], seeds=[0, 1]{teacher})'
    code = "\n".join(["```python", "from dpdmd_pipeline import sample", "", f"{call}  # [B, 3, H, W] in [0, 1]", "```"])
    return "\n\n".join(["### dpdmd_pipeline", code, "Every file has its own schedule."])


# ---- facts


def _schedule(header: StudentHeader) -> str:
    sampler = {"flow": "Euler, deterministic", "eps": "DDIM with eta 0", "v": "DDIM with eta 0"}[header.prediction]
    if header.sampler == "renoise":
        sampler = "re-noise: each prediction gets fresh noise of the next level"
    rows = {
        "steps": header.num_steps,
        "sampler": sampler,
        "prediction": header.prediction,
        "sigmas": _comfyui_sigmas(header),
        "timesteps": header.timesteps and ", ".join(map(str, header.timesteps)),
        "shift": header.shift,
        "guidance": "none (1.0)",
        "resolution": header.resolution,
        "LoRA rank": header.lora_rank,
        "LoRA alpha": header.lora_alpha,
    }
    return _table(["", ""], [[name, str(value)] for name, value in rows.items() if value is not None])


def _precision(facts: CardFacts) -> str:
    rows = [
        [name, f"{100 * loss.overall:.2g} %", f"{100 * loss.worst:.2g} %", f"`{loss.weight}`"]
        for name, loss in facts.losses.items()
    ]
    text = f"Difference between the weights in {facts.dtype} and in float32, as a share of their norm:"
    return "\n\n".join([text, _table(["", "all weights", "worst weight", ""], rows)])


def _not_measured(facts: CardFacts) -> str:
    return f"This student was not measured. To measure it, run {facts.measure} with the `--params` of its training."


def _measured(metrics: Mapping[str, Any]) -> str:
    """Table of all figures with their intervals: a row per measure, a column per model."""
    titles = {"teacher": "teacher", "dmd": "DMD", "dp_dmd": "DP-DMD (this)"}
    models = {title: metrics[model] for model, title in titles.items() if model in metrics}
    rows = [["evaluations per picture", *(str(model.get("nfe", "")) for model in models.values())]]
    for group in ("quality", "diversity", "figures"):
        columns = [model.get(group, {}) for model in models.values()]
        for measure in dict.fromkeys(name for column in columns for name in column):
            name = f"`{measure}`" if group == "figures" else measure.replace("_", " ")
            rows.append([name, *(_interval(column.get(measure)) for column in columns)])
    paragraphs = [_table(["", *models], rows)]
    if counts := next(iter(models.values())).get("n", {}):
        paragraphs.append(
            f"{counts['prompts']} prompts, {counts['per_prompt']} pictures each; 95 % intervals in brackets."
        )
    if missing := sorted({name for model in models.values() for name in model.get("missing", {})}):
        paragraphs.append(f"Requested but not measured: {', '.join(f'`{name}`' for name in missing)}.")
    return "\n\n".join(paragraphs)


def _interval(figure: Mapping[str, float | None] | None) -> str:
    """Value and interval; empty without a measurement. A single prompt has no interval."""
    if figure is None or figure["value"] is None:
        return ""
    spread = "" if figure["low"] is None else f" [{figure['low']:.4g}, {figure['high']:.4g}]"
    return f"{figure['value']:.4g}{spread}"


def _options(groups: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [[f"`{name}`", f"`{value}`"] for group, options in groups.items() for name, value in _flat(group, options)]
    return _table(["option", "value"], rows)


def _flat(name: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, json.dumps(value)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
