"""The judgement of a teacher in miniature."""

import yaml
from tests.pipelines.conftest import BASE, backbone_options

from dpdmd_pipeline.pipelines.teacher import nodes
from dpdmd_pipeline.pipelines.teacher.options import TeacherOptions

RECIPE = yaml.safe_load((BASE / "parameters_teacher.yml").read_text())["teacher"]["recipe"]


def test_a_teacher_is_judged_by_the_same_pictures_however_many_are_drawn_together(tiny_teacher, monkeypatch):
    options = TeacherOptions(recipe=RECIPE, judged_per_prompt=3, judge_seed=0)
    given = tiny_teacher, ["a red circle", "a blue square"], backbone_options(num_steps=2), options
    drawn = list(nodes._drawn(*given))
    assert [pictures.shape for pictures in drawn] == [(3, 3, 32, 32)] * 2
    monkeypatch.setattr(nodes, "_AT_ONCE", 2)
    for pictures, again in zip(drawn, nodes._drawn(*given), strict=True):
        assert (pictures - again).abs().max() < 1e-5 and not pictures.requires_grad


def test_a_judgement_says_over_how_many_pictures_it_is(tiny_teacher):
    options = TeacherOptions(recipe=RECIPE, judged_per_prompt=2, judge_seed=0)
    found = nodes.judge_teacher(tiny_teacher, backbone_options(num_steps=2), options)
    assert found["n"] == {"prompts": 12, "per_prompt": 2}
    assert found["rarest_mode"] == {"drawn": 0, "drawn_clean": 0}  # two pictures cannot have all 72 modes
