"""The model card of an export: front matter for a hub, how it is used, how it was made, what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.dpdmd.noise import flow_sigmas

PAPER = "https://arxiv.org/abs/2602.03139"
MEASURE = "kedro run --pipelines evaluate,export"
FORMS = ("diffusers", "comfyui", "lora")
_COMFYUI_FAMILIES = ("sd3", "sdxl")  # whose diffusers keys ComfyUI is known to load
_COMFYUI_SHIFT = 3.0  # what ComfyUI takes for an SD3 file
_CLIP_TOKENS = 77
_NO_LICENCE = "Licence: that of the teacher, which this run does not know."
_NOT_MEASURED = f"This student was not measured: `{MEASURE}`, with the `--env` and `--params` of its training, does it."


@dataclass(frozen=True)
class Licence:
    """As a hub's front matter names it, None if it is not known; name and link go with the licence `other`."""

    license: str | None
    license_name: str | None
    license_link: str | None


@dataclass(frozen=True)
class DiffusersUse:
    """How diffusers is told to draw with the student.

    Attributes:
        load: further arguments of the pipeline's `from_pretrained`.
        call: arguments of the pipeline's call, without prompts and generators.
        scheduler: name of the scheduler's class.
        settings: of the scheduler, those that are not its defaults.
        passes_generators: whether the pipeline's generators also make the noise between the steps.
    """

    load: Mapping[str, Any]
    call: Mapping[str, Any]
    scheduler: str
    settings: Mapping[str, Any]
    passes_generators: bool


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        title: of the model; its files are called so.
        licence: of the weights.
        base_model: hub id of the teacher; None if it is on no hub, or nobody said which.
        teacher_folder: name of the teacher's folder, told where there is no hub id.
        header: of the student, before a LoRA is added to the teacher's weights.
        dtype: of the exported weights.
        files: form to path below the card, of those that were written.
        diffusers: how that is told to draw.
        options: option group to its options.
        metrics: of this student, as the evaluate stage writes them; {} if it was not measured.
    """

    title: str
    licence: Licence
    base_model: str | None
    teacher_folder: str
    header: StudentHeader
    dtype: str
    files: Mapping[str, str]
    diffusers: DiffusersUse
    options: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Any]


def write_card(facts: CardFacts) -> str:
    """The card in Markdown."""
    header, steps, base = facts.header, facts.header.num_steps, facts.base_model or facts.teacher_folder
    kind = "LoRA" if header.kind == "lora" else "student"
    uses = {"diffusers": _use_diffusers, "comfyui": _use_comfyui, "lora": _use_lora}
    parts = [
        _front_matter(facts),
        f"# {facts.title}",
        f"A {steps}-step {kind} of `{base}`, distilled with {_method(facts)}. A picture costs {steps} "
        "evaluations of the network, without classifier-free guidance.",
        *([] if facts.licence.license else [_NO_LICENCE]),
        "## Use",
        *(uses[form](facts) for form in FORMS if form in facts.files),
        _use_here(facts),
        "## Schedule",
        _schedule(header),
        *(["## Measured", _measured(facts.metrics)] if facts.metrics else [_NOT_MEASURED]),
        "## Options of the run",
        _options(facts.options),
    ]
    return "\n\n".join(parts) + "\n"


def _method(facts: CardFacts) -> str:
    if facts.options.get("train", {}).get("anchored_steps") == 0:
        return "DMD, without the steps that keep diversity"
    return f"[DP-DMD]({PAPER}), whose first step is trained to keep a different picture for every seed"


def _front_matter(facts: CardFacts) -> str:
    """YAML; every JSON string is one."""
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
    return "\n\n".join(["### diffusers", code, _words_on_the_call(facts)])


def _use_lora(facts: CardFacts) -> str:
    scheduler, settings = facts.diffusers.scheduler, facts.diffusers.settings
    code = _python(
        f"from diffusers import {', '.join(sorted(['DiffusionPipeline', scheduler]))}",
        _pipe(facts, facts.base_model or "path/to/teacher"),
        f'pipe.load_lora_weights("{facts.files["lora"]}")',
        f"pipe.scheduler = {scheduler}({_arguments(settings)})",
        _draw(facts),
    )
    return "\n\n".join(["### LoRA", code, "ComfyUI loads the same file from `models/loras`, on top of the teacher."])


def _pipe(facts: CardFacts, place: str) -> str:
    more = _arguments(facts.diffusers.load)
    return f'pipe = DiffusionPipeline.from_pretrained("{place}", torch_dtype=torch.{facts.dtype}{more and ", "}{more})'


def _draw(facts: CardFacts) -> str:
    generator = "[torch.Generator().manual_seed(seed) for seed in (0, 1)]"
    lines = ['["a prompt", "another"]', *_arguments(facts.diffusers.call, "\n").splitlines(), f"generator={generator}"]
    return "\n".join(["images = pipe(", *(f"    {line.rstrip(',')}," for line in lines), ").images"])


def _python(*lines: str) -> str:
    return "\n".join(["```python", "import torch", *lines, "```"])


def _arguments(values: Mapping[str, Any], between: str = " ") -> str:
    return f",{between}".join(f"{name}={value!r}" for name, value in values.items())


def _words_on_the_call(facts: CardFacts) -> str:
    words = ["Each picture has a generator of its own, on the CPU: it depends on its prompt and seed alone."]
    if facts.header.sampler == "renoise" and not facts.diffusers.passes_generators:
        words = ["diffusers takes the noise between this pipeline's steps from torch's global generator."]
    given = [name for name in ("sigmas", "timesteps") if name in facts.diffusers.call]
    if given:
        words.append(
            f"No stock scheduler has these levels by itself: **always give `{given[0]}`**. With the number of steps "
            "alone, diffusers would draw at levels that the student was not trained at."
        )
    else:
        words.append("The folder's scheduler has the trained levels at this number of steps, and at no other.")
    return " ".join(words)


def _use_comfyui(facts: CardFacts) -> str:
    words = [
        f"Put `{facts.files['comfyui']}` into `models/diffusion_models`. The nodes of category DP-DMD read the "
        "schedule from the file."
    ]
    if facts.header.family in _COMFYUI_FAMILIES:
        words.append(_stock_nodes(facts.header))
    else:
        words.append(f"Stock ComfyUI was not tried with the family {facts.header.family}.")
    if facts.header.max_sequence_length and facts.header.max_sequence_length > _CLIP_TOKENS:
        length = facts.header.max_sequence_length
        words.append(f"Pad T5 as in training: `T5TokenizerOptions` with `min_length={length}`.")
    return "### ComfyUI\n\n" + " ".join(words)


def _stock_nodes(header: StudentHeader) -> str:
    """Which stock scheduler has the trained levels, if one has."""
    steps = header.num_steps
    if header.sampler == "renoise":
        return "Stock samplers do not re-noise in a way that a seed repeats on every version: use the DP-DMD nodes."
    scheduler = _stock_scheduler(header)
    if scheduler is None:
        return "No stock scheduler has the trained levels: use the DP-DMD nodes, or give the sigmas below by hand."
    patch = header.prediction == "flow" and header.shift != _COMFYUI_SHIFT
    before = f"`ModelSamplingSD3` with `shift={header.shift}`, then " if patch else ""
    return f"With stock nodes: {before}`KSampler` with `euler`, `{scheduler}`, {steps} steps and cfg 1.0."


def _stock_scheduler(header: StudentHeader) -> str | None:
    if header.prediction != "flow":
        trailing = [round(1000 * left / header.num_steps) - 1 for left in range(header.num_steps, 0, -1)]
        return "simple" if header.timesteps == trailing else None
    for grid, name in (("diffusers", "normal"), ("shifted", "simple")):
        if header.shift:
            levels = flow_sigmas(header.num_steps, header.shift, grid)
            if torch.allclose(levels, torch.tensor(header.sigmas), rtol=0, atol=1e-6):
                return name
    return None


def _use_here(facts: CardFacts) -> str:
    form = next(form for form in FORMS if form in facts.files)
    teacher = "" if form == "diffusers" else ', teacher="path/to/teacher"'
    call = f'images = sample("{facts.files[form]}", ["a prompt", "another"], seeds=[0, 1]{teacher})'
    code = "\n".join(["```python", "from dpdmd_pipeline import sample", "", f"{call}  # [B, 3, H, W] in [0, 1]", "```"])
    return "\n\n".join(["### dpdmd_pipeline", code, "Every file tells its own schedule."])


# ---- facts


def _schedule(header: StudentHeader) -> str:
    sampler = {"flow": "Euler, deterministic", "eps": "DDIM with eta 0", "v": "DDIM with eta 0"}[header.prediction]
    rows = {
        "steps": header.num_steps,
        "sampler": sampler if header.sampler == "euler" else "re-noise: each prediction is noised to the next level",
        "prediction": header.prediction,
        "sigmas": header.sigmas and ", ".join(f"{sigma:.6g}" for sigma in header.sigmas),
        "timesteps": header.timesteps and ", ".join(map(str, header.timesteps)),
        "shift": header.shift,
        "guidance": "none (1.0)",
        "resolution": header.resolution,
        "LoRA rank": header.lora_rank,
        "LoRA alpha": header.lora_alpha,
    }
    return _table(["", ""], [[name, str(value)] for name, value in rows.items() if value is not None])


def _measured(metrics: Mapping[str, Any]) -> str:
    """Every figure with its interval: a row per measure, a column per model."""
    names = {"teacher": "teacher", "dmd": "DMD", "dp_dmd": "DP-DMD (this)"}
    models = [model for model in names if model in metrics]
    rows = [["evaluations per picture", *(str(metrics[model].get("nfe", "")) for model in models)]]
    for group in ("quality", "diversity", "figures"):
        found = [metrics[model].get(group, {}) for model in models]
        for measure in dict.fromkeys(name for of_model in found for name in of_model):
            name = f"`{measure}`" if group == "figures" else measure.replace("_", " ")
            rows.append([name, *(_interval(of_model.get(measure)) for of_model in found)])
    parts = [_table(["", *(names[model] for model in models)], rows)]
    if counts := metrics[models[0]].get("n", {}):
        parts.append(f"{counts['prompts']} prompts, {counts['per_prompt']} pictures each; in brackets 95 % intervals.")
    if missing := sorted({name for model in models for name in metrics[model].get("missing", {})}):
        parts.append(f"Asked for and not measured: {', '.join(f'`{name}`' for name in missing)}.")
    return "\n\n".join(parts)


def _interval(figure: Mapping[str, float | None] | None) -> str:
    """Empty for what was not measured; one prompt alone has no interval."""
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
