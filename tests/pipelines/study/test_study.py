import pytest
from tests.pipelines.conftest import (
    OPTIMIZER,
    PROMPTS,
    anchor_options,
    backbone_options,
    evaluate_options,
    train_options,
)

from dpdmd_pipeline.pipelines.study.nodes import SHOWN, run_study, summarise, write_study
from dpdmd_pipeline.pipelines.study.options import StudyOptions

DMD = {"train": {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}}


def options(**runs):
    return StudyOptions(seeds=[0, 1], baseline="dmd", runs={"dmd": DMD, **runs})


@pytest.fixture
def study(tiny_teacher, embeddings, anchors, tmp_path):
    """The study of some runs, in one folder of states."""

    def run(chosen):
        inputs = PROMPTS, embeddings, anchors, tiny_teacher, tmp_path
        groups = backbone_options(), anchor_options(), train_options(), evaluate_options()
        return run_study(*inputs, *groups, chosen)

    return run


def test_every_run_is_trained_once_per_seed_and_finished_ones_are_kept(study, tmp_path):
    first = study(options(dp_dmd={}))
    states = {path.name for path in tmp_path.iterdir()}
    assert [(row["run"], row["seed"]) for row in first["rows"]] == [
        ("dmd", 0), ("dp_dmd", 0), ("dmd", 1), ("dp_dmd", 1)
    ]  # fmt: skip
    assert study(options(dp_dmd={})) == first and {path.name for path in tmp_path.iterdir()} == states


def test_a_run_may_have_other_seeds_and_the_table_tells_which(study):
    found = study(options(dp_dmd={"seeds": [1]}))
    assert [(row["run"], row["seed"]) for row in found["rows"]] == [("dmd", 0), ("dmd", 1), ("dp_dmd", 1)]
    table = write_study(found)
    assert "| dp_dmd |  | 1 |" in table and "| 0, 1 |" in table


def test_a_run_and_its_baseline_may_have_more_seeds_than_the_study():
    more = {"seeds": [0, 1, 2], "baseline": "longer"}
    chosen = options(longer={**DMD, **more}, dp_dmd={}, two_anchors=more)
    assert chosen.students[-2:] == [(2, "longer"), (2, "two_anchors")] and len(chosen.students) == 10


def test_seeds_that_the_baseline_lacks_are_refused():
    with pytest.raises(ValueError, match=r"runs.dp_dmd has the seeds \[7\]: give it seeds of \[0, 1\],"):
        options(dp_dmd={"seeds": [1, 7]})
    with pytest.raises(ValueError, match=r"runs.dp_dmd has the seeds \[0, 1\]: give it seeds of \[2\]"):
        StudyOptions(seeds=[0, 1], baseline="dmd", runs={"dmd": {**DMD, "seeds": [2]}, "dp_dmd": {}})


def test_a_run_may_have_anchors_of_its_own_and_its_teacher_is_asked_online(study):
    same = study(options(dp_dmd={}, same={"anchors": {"anchor_levels": [{"steps": 2}]}}, later=later()))
    losses = {row["run"]: row["last"]["diversity_loss"] for row in same["rows"] if row["seed"] == 0}
    assert 0 < losses["same"] != losses["later"]


def later():
    return {"anchors": {"anchor_levels": [{"steps": 4}]}}


def test_the_table_names_what_each_run_changes(study):
    found = study(options(dp_dmd={}, later=later(), left_out=None))
    assert list(summarise(found)) == ["dmd", "dp_dmd", "later"]
    table = write_study(found)
    assert '| later | `anchors.mode="online"`, `anchors.anchor_levels=[{"steps": 4}]` |' in table
    assert "`stop_gradient=false`" in table and "left_out" not in table
    assert "for each of 2 prompts (" in table and "; quality.shapes: exact reader of the embedded world)." in table


def test_changes_that_make_no_recipe_are_refused_before_the_first_run(study, tmp_path):
    with pytest.raises(ValueError, match=r"^runs\.wrong: anchored_steps=9"):
        study(options(wrong={"train": {"anchored_steps": 9}}))
    with pytest.raises(
        ValueError,
        match=r"^runs\.wrong: anchors\.anchor_levels steps=6 must be below the teacher's backbone.num_steps=6",
    ):
        study(options(wrong={"anchors": {"anchor_levels": [{"steps": 6}]}}))
    with pytest.raises(ValueError, match=r"^runs\.wrong: student.kind=adamw_8bit: 8-bit moments need a CUDA device"):
        study(options(wrong={"train": {"student": {**OPTIMIZER, "kind": "adamw_8bit"}}}))
    assert not any(tmp_path.iterdir())


def test_the_baseline_cannot_be_left_out():
    with pytest.raises(ValueError, match="baseline=dmd is none of the runs dp_dmd"):
        StudyOptions(seeds=[0], baseline="dmd", runs={"dmd": None, "dp_dmd": {}})


def test_a_run_may_be_compared_with_another_baseline():
    def judged(modes):
        numbers = {name: {"value": modes} for name in SHOWN}
        return {"quality": numbers, "diversity": numbers}

    modes = {"dmd": (0.0, 4.0), "dmd_longer": (1.0, 5.0), "longer": (2.0, 6.0), "same": (3.0, 7.0)}
    longer = {"train": {"max_steps": 200}, "baseline": "dmd_longer"}
    runs = {"dmd": DMD, "dmd_longer": DMD, "longer": longer, "same": {}}
    rows = [{"run": run, "seed": seed, **judged(modes[run][seed])} for seed in (0, 1) for run in runs]
    count = {"prompts": 12, "per_prompt": 64, "exact_presets": {"diversity.shapes": "exact reader"}}
    found = {"baseline": "dmd", "runs": runs, "judged": count, "teacher": judged(20.0), "rows": rows}
    assert summarise(found)["longer"]["gap_recovered"] == [(2 - 1) / (20 - 1), (6 - 5) / (20 - 5)]
    assert summarise(found)["same"]["gap_recovered"] == [3 / 20, (7 - 4) / (20 - 4)]
    table = write_study(found)
    assert "| longer | `max_steps=200`, gap of dmd_longer | 0, 1 |" in table
    assert "64 pictures a student for each of 12 prompts (diversity.shapes: exact reader)." in table


def test_a_baseline_that_is_no_run_or_lacks_a_seed_is_refused():
    with pytest.raises(ValueError, match="runs.longer.baseline=dmd_200 is none of the runs dmd, longer"):
        options(longer={"baseline": "dmd_200"})
    with pytest.raises(ValueError, match=r"runs.longer has the seeds \[1\]: .* which its baseline short"):
        options(longer={"baseline": "short"}, short={**DMD, "seeds": [0]})
