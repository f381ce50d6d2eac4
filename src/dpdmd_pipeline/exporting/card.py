"""The model card of an export: the facts that its template `card.md.j2` shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from dpdmd_pipeline.backbones.sizes import size_text
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.dpdmd.noise import NUM_TRAIN_TIMESTEPS, flow_sigmas, shift_sigma
from dpdmd_pipeline.exporting.rounding import Loss
from dpdmd_pipeline.exporting.schedulers import DiffusersUse

if TYPE_CHECKING:
    from dpdmd_pipeline.exporting.formats import Export

# ComfyUI's node that sets the shift of a flow model, and the shift without it; families not named need the DP-DMD nodes
_COMFYUI_SHIFTS = {
    "sd3": ("ModelSamplingSD3", 3.0),
    "z_image": ("ModelSamplingAuraFlow", 3.0),
    "qwen_image": ("ModelSamplingAuraFlow", 1.15),
}


def write_card(export: Export, use: DiffusersUse, losses: Mapping[str, Loss]) -> str:
    """Write the card in Markdown; `losses` are those of a LoRA by its precision, see `rounding`."""
    header = export.student.header
    recipe = header.recipe or {}
    environment = Environment(
        loader=PackageLoader("dpdmd_pipeline.exporting", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"json": json.dumps, "repr": repr}
    return environment.get_template("card.md.j2").render(
        export=export,
        files=export.files,
        header=header,
        is_dmd=recipe.get("train", {}).get("anchored_steps") == 0,
        use=use,
        losses=losses,
        stock_nodes=_stock_nodes(header),
        schedule=_schedule(header),
        measured=_table(_measured(export.metrics)),
        options=_table([["option", "value"], *_flat("", recipe)]),
    )


def _stock_nodes(header: StudentHeader) -> str:
    """Settings of ComfyUI's own nodes that give the trained levels."""
    if header.sampler == "renoise":
        return (
            "Use the DP-DMD nodes. With stock samplers that re-noise, the pictures of a seed depend on the version of "
            "ComfyUI."
        )
    scheduler = _stock_scheduler(header)
    if scheduler is None or (header.prediction == "flow" and header.family not in _COMFYUI_SHIFTS):
        return "Use the DP-DMD nodes, or enter the sigmas below: no stock scheduler has the trained levels."
    node, shift = _COMFYUI_SHIFTS.get(header.family, ("", header.shift))
    patch = "" if header.shift == shift else f"`{node}` with `shift={header.shift}`, then "
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
        "picture size (height x width)": ", ".join(map(size_text, header.sizes)) or None,
        "LoRA rank": header.lora_rank,
        "LoRA alpha": header.lora_alpha,
    }
    return _table([["", ""], *([name, str(value)] for name, value in rows.items() if value is not None)])


def _measured(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows of all figures with their intervals: a row per measure, a column per model."""
    titles = {"teacher": "teacher", "dmd": "DMD", "dp_dmd": "DP-DMD (this)"}
    models = {title: metrics[model] for model, title in titles.items() if model in metrics}
    rows = [["", *models], ["evaluations per picture", *(str(model.get("nfe", "")) for model in models.values())]]
    for group in ("quality", "diversity", "figures"):
        columns = [model.get(group, {}) for model in models.values()]
        for measure in dict.fromkeys(name for column in columns for name in column):
            name = f"`{measure}`" if group == "figures" else measure.replace("_", " ")
            rows.append([name, *(_interval(column.get(measure)) for column in columns)])
    return rows


def _interval(figure: Mapping[str, float | None] | None) -> str:
    """Value and interval; empty without a measurement. A single prompt has no interval."""
    if figure is None or figure["value"] is None:
        return ""
    spread = "" if figure["low"] is None else f" [{figure['low']:.4g}, {figure['high']:.4g}]"
    return f"{figure['value']:.4g}{spread}"


def _flat(name: str, value: Any) -> Iterable[list[str]]:
    """Rows of an option's path and value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
    else:
        yield [f"`{name}`", f"`{json.dumps(value)}`"]


def _table(rows: Iterable[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *rows = rows
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
