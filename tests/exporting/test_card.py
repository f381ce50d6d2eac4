"""What the card says; its code is run in test_sample."""

import json

import pytest
import yaml
from tests.exporting.conftest import CASES, SHIFTED, flow, vp

from dpdmd_pipeline.exporting.card import CardFacts, DiffusersUse, Licence, write_card

OFFICIAL = flow("sd3", [1.0, 0.857692, 0.602151, 0.008929, 0.0])  # of the published student
INTERVAL = {"value": 0.5, "low": 0.25, "high": 0.75}


def card(header=CASES["sd3_shifted"].header, **changes):
    facts = {
        "title": "mine",
        "licence": Licence("apache-2.0", None, None),
        "base_model": None,
        "teacher_folder": "its_folder",
        "header": header,
        "dtype": "bfloat16",
        "files": {"diffusers": "diffusers", "comfyui": "comfyui/mine.safetensors"},
        "diffusers": DiffusersUse({}, {"num_inference_steps": 4}, "FlowMatchEulerDiscreteScheduler", {}, False),
        "options": {"train": {"student": {"learning_rate": 0.1}}},
        "metrics": {},
    }
    return write_card(CardFacts(**facts | changes))


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_a_hub_reads():
    assert front_matter(card()) == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["distillation", "few-step", "dp-dmd", "sd3"],
    }
    licence = Licence("other", "community: 'x'", "https://example.org/licence")
    found = front_matter(card(CASES["sd3_lora"].header, licence=licence, base_model="them/theirs"))
    assert (found["license"], found["license_name"], found["license_link"]) == tuple(vars(licence).values())
    assert (found["base_model"], found["base_model_relation"], found["tags"][-1]) == ("them/theirs", "adapter", "lora")


def test_a_licence_that_is_not_known_is_left_out_and_said_and_the_teacher_is_called_as_its_folder():
    text = card(licence=Licence(None, None, None))
    assert "license" not in front_matter(text) and "base_model" not in front_matter(text)
    assert "student of `its_folder`" in text and "which this run does not know" in text
    assert "which this run does not know" not in card()


def test_levels_and_options_are_those_of_the_run():
    text = card()
    assert "| sigmas | 1, 0.9, 0.75, 0.5, 0 |" in text and "| shift | 3.0 |" in text
    assert "| `train.student.learning_rate` | `0.1` |" in text


def test_measures_stand_with_their_intervals_and_without_metrics_nothing_is_claimed():
    model = {"nfe": 4, "n": {"prompts": 12, "per_prompt": 64}, "quality": {"aligned": INTERVAL}, "diversity": {}}
    text = card(metrics={"teacher": model, "dp_dmd": model})
    assert "| aligned | 0.5 [0.25, 0.75] | 0.5 [0.25, 0.75] |" in text and "12 prompts, 64 pictures each" in text
    assert "not measured" not in text and "Measured" not in card()
    assert "This student was not measured: `kedro run --pipelines evaluate,export`" in card()


def test_any_metric_stands_under_its_full_name_and_what_is_missing_is_said():
    figure = {"value": 0.25, "low": None, "high": None}
    model = {"nfe": 4, "n": {"prompts": 1, "per_prompt": 9}, "quality": {}, "diversity": {}, "missing": {}}
    teacher = model | {"figures": {"diversity.dino_v2.vendi": figure}, "missing": {"preference.pickscore": "why"}}
    student = model | {"figures": {"diversity.dino_v2.vendi": figure, "distribution.inception.kid": figure}}
    text = card(metrics={"teacher": teacher, "dp_dmd": student})
    assert "| `diversity.dino_v2.vendi` | 0.25 | 0.25 |" in text
    assert "| `distribution.inception.kid` |  | 0.25 |" in text
    assert "Asked for and not measured: `preference.pickscore`." in text


def test_a_student_without_anchored_steps_is_not_called_diverse():
    plain = card(options={"train": {"anchored_steps": 0}})
    assert "distilled with DMD, without" in plain and "distilled with [DP-DMD]" in card()


def test_levels_that_must_be_given_are_said_so():
    use = DiffusersUse({}, {"num_inference_steps": 3, "sigmas": [0.98, 0.9, 0.6]}, "X", {}, False)
    assert "**always give `sigmas`**" in card(diffusers=use) and "always give" not in card()


def test_only_the_files_that_are_there_are_told():
    text = card(files={"comfyui": "comfyui/mine.safetensors"})
    assert "### diffusers" not in text and "### LoRA" not in text
    assert 'sample("comfyui/mine.safetensors"' in text and 'teacher="path/to/teacher"' in text


@pytest.mark.parametrize(
    "header, words",
    [
        (OFFICIAL, "With stock nodes: `KSampler` with `euler`, `normal`, 4 steps"),
        (flow("sd3", SHIFTED), "With stock nodes: `KSampler` with `euler`, `simple`, 4 steps"),
        (flow("sd3", [1.0, 0.75, 0.5, 0.25, 0.0], shift=1.0), "`ModelSamplingSD3` with `shift=1.0`, then `KSampler`"),
        (flow("sd3", [1.0, 0.2, 0.0]), "No stock scheduler has the trained levels"),
        (vp("eps", [999, 749, 499, 249]), "With stock nodes: `KSampler` with `euler`, `simple`, 4 steps"),
        (vp("eps", [999, 749, 499, 249], sampler="renoise"), "use the DP-DMD nodes"),
        (flow("sana", SHIFTED), "Stock ComfyUI was not tried with the family sana"),
        (flow("sd3", SHIFTED, max_sequence_length=256), "`T5TokenizerOptions` with `min_length=256`"),
    ],
)
def test_stock_comfyui_is_told_the_scheduler_that_has_the_levels(header, words):
    assert words in card(header)


def test_the_card_of_every_export_names_its_own_schedule(exports):
    for exported in exports.values():
        text = (exported.folder / "README.md").read_text()
        levels = exported.case.header.timesteps or exported.case.header.sigmas
        assert f"| {', '.join(f'{level:.6g}' for level in levels)} |" in text
        assert json.dumps("text-to-image") in text
