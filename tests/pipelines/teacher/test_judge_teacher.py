"""The judgement of a tiny teacher."""

import yaml
from tests.pipelines.conftest import BASE, backbone_options

from dpdmd_pipeline.pipelines.teacher import nodes
from dpdmd_pipeline.pipelines.teacher.options import TeacherOptions

RECIPE = yaml.safe_load((BASE / "parameters_teacher.yml").read_text())["teacher"]["recipe"]


def test_the_batch_size_does_not_change_the_judged_pictures(tiny_teacher, monkeypatch):
    options = TeacherOptions(recipe=RECIPE, judged_per_prompt=3, judge_seed=0)
    inputs = tiny_teacher, ["a red circle", "a blue square"], backbone_options(num_steps=2), options
    expected = list(nodes._draw(*inputs))
    assert [pictures.shape for pictures in expected] == [(3, 3, 32, 32)] * 2
    monkeypatch.setattr(nodes, "_BATCH_SIZE", 2)
    for pictures, again in zip(expected, nodes._draw(*inputs), strict=True):
        assert (pictures - again).abs().max() < 1e-5 and not pictures.requires_grad


def test_a_judgement_holds_its_number_of_pictures(tiny_teacher):
    options = TeacherOptions(recipe=RECIPE, judged_per_prompt=2, judge_seed=0)
    judged = nodes.judge_teacher(tiny_teacher, backbone_options(num_steps=2), options)
    assert judged["n"] == {"prompts": 12, "per_prompt": 2}
    assert judged["rarest_mode"] == {"drawn": 0, "drawn_clean": 0}  # two pictures cannot have all 72 modes
