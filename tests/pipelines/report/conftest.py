"""Artificial inputs of the report: metrics, histories, grids and options."""

import tempfile
from functools import cache
from pathlib import Path

import torch
import yaml
from PIL import Image

from dpdmd_pipeline.backbones.networks import WEIGHTS
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.backbones.tensor_files import save_weights
from dpdmd_pipeline.pipelines.report.options import ReportOptions

ROOT = Path(__file__).parents[3]
OPTIONS = ReportOptions(max_prompts=12, max_strip_width=1024, curve_points=50)
COLOURS = {"teacher": (255, 0, 0), "dmd": (0, 255, 0), "dp_dmd": (0, 0, 255)}
HOSTILE = '<script>alert(1)</script> {{ 7*7 }} {% raw %} | **bold** [link](http://x.org) & "quotes" `code` ünï'


def measured(value, spread):
    return {"value": value, "low": value - spread, "high": value + spread}


def made_gap(value, spread=0.05):
    ends = dict.fromkeys(("low", "high")) if value is None else {"low": value - spread, "high": value + spread}
    return {"value": value, **ends, "prompts": 3, "preset": "a protocol"}


def made_metrics(modes=(64.0, 5.0, 58.0), valid=(0.95, 0.87, 0.91), spread=0.02):
    """Metrics of three models; `spread` is half the width of every interval, relative for the modes."""
    metrics = {}
    for name, mode, share, nfe in zip(COLOURS, modes, valid, (60, 4, 4), strict=True):
        metrics[name] = {
            "nfe": nfe,
            "student": None if name == "teacher" else f"identity of {name}",
            "n": {"prompts": 3, "per_prompt": 64},
            "quality": {
                "valid": measured(share, spread),
                "aligned": measured(share, spread),
                "residual": measured(0.03, 0),
            },
            "diversity": {
                "effective_modes": measured(mode, spread * mode),
                "coverage": measured(mode / 72, spread),
                "entropy": measured(mode / 13, spread),
                "pairwise_distance": measured(0.4, spread),
            },
            "figures": {},
            "missing": {},
            "faults": {},
            "notes": [],
        }
    teacher, dmd, ours = modes
    gap = (ours - dmd) / (teacher - dmd) if teacher > dmd else None
    gaps = {"effective_modes": gap, "coverage": 0.5, "entropy": 0.5, "pairwise_distance": None}
    metrics["dp_dmd"]["gap_recovered"] = {name: made_gap(value) for name, value in gaps.items()}
    metrics["dp_dmd"] |= {"gaps": {}, "gap_notes": []}
    return {**metrics, "rank_correlation": {}}


def without_reader(figures=((0.3, 0.1, 0.25), (21.0, 22.0, 22.5)), spread=0.02):
    """Metrics without the exact reader: a diversity and a preference of teacher, DMD and DP-DMD."""
    metrics = made_metrics()
    names = ("diversity.dino_v2.one_minus_cosine", "preference.pickscore.score")
    n = {"prompts": 3, "pictures": 27, "prompts_not_measured": 0}
    for number, model in enumerate(COLOURS):
        values = [values[number] for values in figures]
        metrics[model] |= {"quality": {}, "diversity": {}}
        metrics[model]["figures"] = {
            name: {**measured(value, spread), "n": n, "preset": f"protocol of {name}"}
            for name, value in zip(names, values, strict=True)
        }
    teacher, dmd, ours = figures[0]
    gap = (ours - dmd) / (teacher - dmd) if teacher > dmd else None
    metrics["dp_dmd"]["gap_recovered"] = {}
    metrics["dp_dmd"]["gaps"] = {names[0]: made_gap(gap)}
    return metrics


def made_scores(texts, attributes=True):
    """Two metrics prompt by prompt, and the free attributes of the embedded world."""
    names = ("diversity.shapes.effective_modes", "quality.shapes.aligned") if attributes else ()
    ids = [str(row) for row in range(len(texts))]
    counts = {"radius": {"small": 3, "large": 1}, "background": {"black": 0, "white": 4}}
    return {
        "prompts": dict(zip(ids, texts, strict=True)),
        "models": {
            model: {"per_prompt": {name: {key: 10.0 * number + row for row, key in enumerate(ids)} for name in names}}
            for number, model in enumerate(COLOURS)
        },
        "attributes": dict.fromkeys(COLOURS, counts) if attributes else {},
    }


def made_history(anchored, steps=120):
    rows = [
        {"step": step, "dmd_loss": 0.3, "diversity_loss": anchored / step, "fake_score_loss": 1 / step}
        | {"student_grad_norm": 1.0, "fake_score_grad_norm": 1.0}
        for step in range(1, steps + 1)
    ]
    measurements = {"latent_diversity": 1.0, "correction": 0.1}
    measurements |= {"latent_diversity_teacher": 1.2, "correction_teacher": 0.05}
    rows = [row | measurements if row["step"] % 25 == 0 else row for row in rows]
    return [{**row, "grad_ratio": 2.0} if anchored and row["step"] % 10 == 0 else row for row in rows]


def group(name, file=None):
    """A parameter group of conf/base."""
    path = ROOT / "conf" / "base" / (f"parameters_{file or name}.yml" if name != "backbone" else "parameters.yml")
    return yaml.safe_load(path.read_text())[name]


@cache
def made_student(model):
    """Folder of a student without weights, whose header names identity and recipe."""
    train = group("train") | (group("train_dmd", "train") if model == "dmd" else {})
    recipe = {"backbone": group("backbone"), "anchors": group("anchors"), "train": train}
    header = StudentHeader("sd3", [1.0, 0.5, 0.0], identity=f"identity of {model}", recipe=recipe)
    folder = Path(tempfile.mkdtemp())
    save_weights(folder / WEIGHTS, {"weight": torch.zeros(1)}, header.metadata())
    return folder


def made_inputs(texts=("a red circle", "a blue square", HOSTILE), **changes):
    inputs = {
        "metrics": made_metrics(),
        "scores": made_scores(texts),
        "prompts": [{"text": "only trained on", "train": True, "eval": False}]
        + [{"text": text, "train": False, "eval": True} for text in texts],
        "train_history": made_history(1.0),
        "train_history_dmd": made_history(0.0),
        "train_strip": Image.new("RGB", (200, 60), (9, 9, 9)),
        **{f"grid_{name}": Image.new("RGB", (90, 10 * len(texts)), colour) for name, colour in COLOURS.items()},
        "options": OPTIONS,
        "run_arguments": "",
        "prompts_options": group("prompts"),
        "evaluate_options": group("evaluate"),
        "student": made_student("dp_dmd"),
        "student_dmd": made_student("dmd"),
    }
    return {**inputs, **changes}
