"""Facts of the card; test_sample runs its code."""

import json
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import yaml
from tests.exporting.conftest import CASES, SHIFTED, flow, vp

from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.dpdmd.noise import flow_sigmas, vp_schedule
from dpdmd_pipeline.exporting.card import _stock_nodes, write_card
from dpdmd_pipeline.exporting.formats import Export, Licence, Student
from dpdmd_pipeline.exporting.rounding import Loss
from dpdmd_pipeline.exporting.schedulers import DiffusersUse

OFFICIAL = flow("sd3", [1.0, 0.857692, 0.602151, 0.008929, 0.0])  # of the published student
USE = DiffusersUse({}, {"num_inference_steps": 4}, {"num_inference_steps": 28}, "Scheduler", {}, False)
INTERVAL = {"value": 0.5, "low": 0.25, "high": 0.75}


def card(header=CASES["sd3_shifted"].header, use=USE, losses=MappingProxyType({}), **changes):
    facts = {
        "title": "mine",
        "formats": ["diffusers", "comfyui"],
        "dtype": "bfloat16",
        "licence": Licence("apache-2.0", None, None),
        "base_model": None,
        "metrics": {},
        "measure": "`kedro run --env mine`",
    }
    return write_card(Export(Student(header, {}, None), Path("its_folder"), **facts | changes), use, losses)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_has_the_fields_of_a_hub():
    assert front_matter(card()) == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["distillation", "few-step", "dp-dmd", "sd3"],
    }
    licence = Licence("other", "community: 'x'", "https://example.org/licence")
    fields = front_matter(card(CASES["sd3_lora"].header, licence=licence, base_model="them/theirs"))
    assert {name: fields[name] for name in licence._fields} == licence._asdict()
    assert (fields["base_model"], fields["base_model_relation"]) == ("them/theirs", "adapter")
    assert fields["tags"][-1] == "lora"


def test_the_card_says_that_a_licence_is_unknown_and_names_the_teacher_by_its_folder():
    text = card(licence=Licence(None, None, None))
    assert "license" not in front_matter(text) and "base_model" not in front_matter(text)
    assert "`its_folder`" in text and "Licence: unknown" in text
    assert "Licence: unknown" not in card()


def test_levels_and_options_are_those_of_the_run():
    text = card(flow("sd3", SHIFTED, recipe={"train": {"student": {"learning_rate": 0.1}}}))
    assert "| sigmas | 1, 0.9, 0.75, 0.5, 0 |" in text and "| shift | 3.0 |" in text
    assert "| `train.student.learning_rate` | `0.1` |" in text


def test_measures_have_their_intervals_and_a_card_without_metrics_names_the_command():
    model = {"nfe": 4, "n": {"prompts": 12, "per_prompt": 64}, "quality": {"aligned": INTERVAL}, "diversity": {}}
    text = card(metrics={"teacher": model, "dp_dmd": model})
    assert "| aligned | 0.5 [0.25, 0.75] | 0.5 [0.25, 0.75] |" in text and "12 prompts, 64 pictures" in text
    assert "## Measured" in text and "`kedro run --env mine`" not in text
    assert "## Measured" not in card() and "`kedro run --env mine`" in card()


def test_any_metric_has_its_full_name_and_missing_ones_are_listed():
    figure = {"value": 0.25, "low": None, "high": None}
    model = {"nfe": 4, "n": {"prompts": 1, "per_prompt": 9}, "quality": {}, "diversity": {}, "missing": {}}
    teacher = model | {"figures": {"diversity.dino_v2.vendi": figure}, "missing": {"preference.pickscore": "why"}}
    student = model | {"figures": {"diversity.dino_v2.vendi": figure, "distribution.inception.kid": figure}}
    text = card(metrics={"teacher": teacher, "dp_dmd": student})
    assert "| `diversity.dino_v2.vendi` | 0.25 | 0.25 |" in text
    assert "| `distribution.inception.kid` |  | 0.25 |" in text
    assert "`preference.pickscore`" in text


def test_a_student_without_anchored_steps_is_not_called_diverse():
    plain = card(flow("sd3", SHIFTED, recipe={"train": {"anchored_steps": 0}}))
    assert "DP-DMD]" not in plain and "DP-DMD](https://arxiv.org/abs/2602.03139)" in card()


def test_the_card_says_which_levels_the_call_needs():
    grid = [0.98, 0.9, 0.6]
    header = flow("sd3", [*grid, 0.0])
    for sigmas, is_shifted in ((grid, False), ([0.9, 0.8, 0.7], True)):
        use = DiffusersUse({}, {"num_inference_steps": 3, "sigmas": sigmas}, {}, "X", {}, False)
        text = card(header, use)
        assert "Without `sigmas`" in text and ("shifts these `sigmas` once" in text) == is_shifted
    assert "`sigmas`" not in card()


def test_the_card_says_what_diffusers_takes_for_arguments_that_are_left_out(exports):
    assert "(`num_inference_steps=28`)" in card()
    text = (exports["sdxl_eps"].folder / "README.md").read_text()
    assert "`num_inference_steps=50`, `guidance_scale=5.0`" in text


def test_the_card_lists_losses_by_precision():
    text = card(losses={"merged weights": Loss(0.00123, 0.5, "blocks.0")})
    assert "| merged weights | 0.12 % | 50 % | `blocks.0` |" in text and "## Precision" not in card()


def test_the_card_lists_existing_files_only():
    text = card(formats=["comfyui"])
    assert "### diffusers" not in text and "### LoRA" not in text
    assert 'sample("comfyui/mine.safetensors"' in text and 'teacher="path/to/teacher"' in text


@pytest.mark.parametrize(
    "header, names, absent",
    [
        (OFFICIAL, ["`KSampler`", "`euler`", "`normal`", "4 steps"], "ModelSamplingSD3"),
        (flow("sd3", SHIFTED), ["`KSampler`", "`euler`", "`simple`", "4 steps"], "ModelSamplingSD3"),
        (
            flow("sd3", [1.0, 0.75, 0.5, 0.25, 0.0], shift=1.0),
            ["`ModelSamplingSD3`", "`shift=1.0`", "`KSampler`"],
            "DP-DMD nodes",
        ),
        (flow("sd3", [1.0, 0.2, 0.0]), ["DP-DMD nodes"], "`KSampler`"),
        (vp("eps", [999, 749, 499, 249]), ["`KSampler`", "`euler`", "`simple`", "4 steps"], "ModelSamplingSD3"),
        (vp("eps", [999, 749, 499, 249], sampler="renoise"), ["DP-DMD nodes"], "`KSampler`"),
        (flow("sana", SHIFTED), ["family sana"], "`KSampler`"),
        (flow("sd3", SHIFTED, max_sequence_length=256), ["`T5TokenizerOptions`", "`min_length=256`"], "DP-DMD nodes"),
    ],
)
def test_the_card_names_the_stock_comfyui_nodes_that_give_the_levels(header, names, absent):
    text = card(header)
    assert all(name in text for name in names) and absent not in text


def test_the_card_of_every_export_names_its_own_schedule(exports):
    for exported in exports.values():
        text = (exported.folder / "README.md").read_text()
        levels = exported.case.header.timesteps or exported.case.header.sigmas
        assert f"| {', '.join(f'{level:.6g}' for level in levels)} |" in text
        assert json.dumps("text-to-image") in text


def comfyui_simple(table, steps):
    """ComfyUI's own rule for `simple`: every (len / steps)-th entry of the table, from its end and rounded down."""
    return [*(float(table[-(1 + int(step * len(table) / steps))]) for step in range(steps)), 0.0]


@pytest.mark.parametrize("steps", range(1, 17))
def test_the_card_names_a_stock_scheduler_only_where_its_own_rule_gives_the_trained_levels(steps):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    table = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    timesteps = vp_schedule(steps, alphas_cumprod.float()).timestep[:-1].tolist()
    text = _stock_nodes(StudentHeader("sdxl", prediction="eps", timesteps=timesteps))
    same = comfyui_simple(table, steps) == pytest.approx([*(float(table[t]) for t in timesteps), 0.0], abs=1e-6)
    assert ("`simple`" in text) == same
    for shift in (1.0, 3.0):
        levels = flow_sigmas(steps, shift, "shifted").tolist()
        unshifted = torch.arange(1, 1001, dtype=torch.float64) / 1000
        table_of_shift = shift * unshifted / (1 + (shift - 1) * unshifted)
        text = _stock_nodes(StudentHeader("sd3", levels, shift=shift))
        if "`simple`" in text:
            assert comfyui_simple(table_of_shift, steps) == pytest.approx(levels, abs=1e-6)


def test_a_card_that_asks_for_the_sigmas_lists_them():
    text = card(StudentHeader("sdxl", prediction="eps", timesteps=[999, 700, 310, 50]))
    assert "sigmas below" in text and "| sigmas | 14.6146, 3.33439, 0.862072, 0.225582, 0 (" in text


def test_the_code_of_the_card_names_the_precision_as_diffusers_does():
    assert "dtype=torch.bfloat16" in card() and "torch_dtype" not in card()
