"""A study compares runs seed by seed; its table shows every run with its changes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from kedro.io import DataCatalog, MemoryDataset
from tests.pipelines.conftest import (
    OPTIMIZER,
    PROMPTS,
    anchor_options,
    backbone_options,
    evaluate_options,
    train_options,
)
from tests.raising import refuses

from dpdmd_pipeline.errors import MissingInputError, StageError
from dpdmd_pipeline.pipelines.study import nodes
from dpdmd_pipeline.pipelines.study.figure import rows_of
from dpdmd_pipeline.pipelines.study.nodes import SHOWN, run_study, summarise, write_study
from dpdmd_pipeline.pipelines.study.options import StudyOptions
from dpdmd_pipeline.planning.checks import refused_runs

REPORTING = Path(__file__).parents[3] / "data/08_reporting"
COMMITTED = sorted(path for path in REPORTING.rglob("*.json") if path.stem in ("study", "beyond", "variety"))
DMD = {"train": {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}}


def options(**runs):
    return StudyOptions(seeds=[0, 1], baseline="dmd", runs={"dmd": DMD, **runs})


@pytest.fixture(scope="module")
def shared_state(tmp_path_factory):
    """State folder of several tests, so that they train a student once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def study(tiny_teacher, embeddings, anchors, shared_state):
    """Function that runs a study."""

    def run(study_options, state=shared_state):
        inputs = PROMPTS, embeddings, anchors, tiny_teacher, state
        groups = backbone_options(), anchor_options(), train_options(), evaluate_options()
        return run_study(*inputs, *groups, study_options)

    return run


def test_every_run_is_trained_once_per_seed_and_finished_ones_are_reused(study, tmp_path):
    first = study(options(dp_dmd={}), tmp_path)
    states = {path.name for path in tmp_path.iterdir()}
    assert [(row["run"], row["seed"]) for row in first["rows"]] == [
        ("dmd", 0), ("dp_dmd", 0), ("dmd", 1), ("dp_dmd", 1)
    ]  # fmt: skip
    assert study(options(dp_dmd={}), tmp_path) == first and {path.name for path in tmp_path.iterdir()} == states


def test_runs_that_differ_in_their_start_share_the_trained_student(study, tmp_path):
    starts = {"start": {**DMD, "teacher_start": {"steps": 2}}, "noise": {**DMD, "prompt_noise": {"strength": 30.0}}}
    result = study(options(**starts), tmp_path)
    states = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(states) == 2  # one per seed
    rows = {(row["run"], row["seed"]): row for row in result["rows"]}
    assert rows["start", 0]["last"] == rows["dmd", 0]["last"] == rows["noise", 0]["last"]
    assert len({json.dumps(rows[run, 0]["diversity"]) for run in ("dmd", "start", "noise")}) == 3
    alone, started = (result["runs"][run]["evaluations"] for run in ("dmd", "start"))
    guided = backbone_options().guidance_scale != 1
    assert started == alone - 1 + 2 * (1 + guided)
    assert f'`teacher_start={{"steps": 2, "landing": 1}}`, {started} evaluations' in write_study(result)


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"train": {"num_stepz": 4}}, ["train", "num_stepz"]),
        ({"train": {"num_steps": 0}}, ["train", "num_steps", "0"]),
        ({"train": {"anchored_steps": 2}}, ["train.anchored_steps=2", "anchor_levels"]),
        ({"train": {"student": {**OPTIMIZER, "kind": "adamw_8bit"}}}, ["student.kind=adamw_8bit"]),
        ({"anchors": {"anchor_levels": [{"steps": -1}]}}, ["anchors", "anchor_levels.0.steps"]),
        ({"teacher_start": {"steps": 2, "landing": 4}}, ["teacher_start.landing", "4"]),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_the_first_node(changes, facts):
    groups = {"train": train_options(num_steps=4), "anchors": anchor_options(), "study": options(odd=changes)}
    run = SimpleNamespace(inputs=lambda: {f"params:{name}" for name in groups})
    catalog = DataCatalog({f"params:{name}": MemoryDataset(value) for name, value in groups.items()})
    (line,) = refused_runs(run, catalog)
    assert line.startswith("study.runs.odd: ") and all(fact in line for fact in facts) and "\n" not in line


def test_a_run_has_one_start():
    with refuses(ValueError, "teacher_start", "prompt_noise"):
        options(both={**DMD, "teacher_start": {"steps": 2}, "prompt_noise": {"strength": 1.0}})


def test_a_run_may_have_other_seeds_and_the_table_shows_them(study):
    result = study(options(dp_dmd={"seeds": [1]}))
    assert [(row["run"], row["seed"]) for row in result["rows"]] == [("dmd", 0), ("dmd", 1), ("dp_dmd", 1)]
    table = write_study(result)
    assert "| dp_dmd |  | 1 |" in table and "| 0, 1 |" in table


def test_a_run_and_its_baseline_may_have_more_seeds_than_the_study():
    more = {"seeds": [0, 1, 2], "baseline": "longer"}
    students = options(longer={**DMD, **more}, dp_dmd={}, two_anchors=more).students
    assert students[-2:] == [(2, "longer"), (2, "two_anchors")] and len(students) == 10


def test_seeds_that_the_baseline_lacks_are_refused():
    with refuses(ValueError, "runs.dp_dmd", "[7]", "dmd", "[0, 1]"):
        options(dp_dmd={"seeds": [1, 7]})
    with refuses(ValueError, "runs.dp_dmd", "[0, 1]", "dmd", "[2]"):
        StudyOptions(seeds=[0, 1], baseline="dmd", runs={"dmd": {**DMD, "seeds": [2]}, "dp_dmd": {}})


def test_a_run_may_have_own_anchors_that_the_teacher_draws_online(study):
    result = study(options(dp_dmd={}, same={"anchors": {"anchor_levels": [{"steps": 2}]}}, later=later()))
    losses = {row["run"]: row["last"]["diversity_loss"] for row in result["rows"] if row["seed"] == 0}
    assert 0 < losses["same"] != losses["later"]


def later():
    return {"anchors": {"anchor_levels": [{"steps": 4}]}}


def test_the_table_names_what_each_run_changes(study):
    result = study(options(dp_dmd={}, later=later(), unused=None))
    assert list(summarise(result)) == ["dmd", "dp_dmd", "later"]
    table = write_study(result)
    assert '| later | `anchors.mode="online"`, `anchors.anchor_levels=[{"steps": 4}]` |' in table
    assert "`stop_gradient=false`" in table and "unused" not in table
    assert "2 prompts" in table and "quality.shapes: exact reader of the embedded world" in table


def test_invalid_changes_are_refused_before_the_first_run(study, tmp_path):
    with pytest.raises(ValueError, match=r"^runs\.wrong: train: anchored_steps=9"):
        study(options(wrong={"train": {"anchored_steps": 9}}), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^runs\.wrong: .*steps=6.*backbone\.num_steps=6",
    ):
        study(options(wrong={"anchors": {"anchor_levels": [{"steps": 6}]}}), tmp_path)
    with pytest.raises(ValueError, match=r"^runs\.wrong: .*student\.kind=adamw_8bit"):
        study(options(wrong={"train": {"student": {**OPTIMIZER, "kind": "adamw_8bit"}}}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_error_in_a_run_names_the_run_and_the_stage_that_must_run_first():
    with pytest.raises(StageError, match=r"^runs\.wrong: .*12ab") as error, nodes._naming("wrong"):
        raise MissingInputError("no anchors of 12ab", stage="anchors")
    assert type(error.value) is MissingInputError and error.value.stage == "anchors"


def test_the_baseline_must_be_a_run():
    with refuses(ValueError, "baseline=dmd", "dp_dmd"):
        StudyOptions(seeds=[0], baseline="dmd", runs={"dmd": None, "dp_dmd": {}})


def test_a_run_may_have_another_baseline():
    def judged(modes):
        numbers = {name: {"value": modes} for name in SHOWN}
        return {"quality": numbers, "diversity": numbers}

    modes = {"dmd": (0.0, 4.0), "dmd_longer": (1.0, 5.0), "longer": (2.0, 6.0), "same": (3.0, 7.0)}
    longer = {"train": {"max_steps": 200}, "baseline": "dmd_longer"}
    runs = {"dmd": DMD, "dmd_longer": DMD, "longer": longer, "same": {}}
    rows = [{"run": run, "seed": seed, **judged(modes[run][seed])} for seed in (0, 1) for run in runs]
    count = {"prompts": 12, "per_prompt": 64, "exact_presets": {"diversity.shapes": "exact reader"}}
    result = {"baseline": "dmd", "runs": runs, "judged": count, "teacher": judged(20.0), "rows": rows}
    assert summarise(result)["longer"]["gap_recovered"] == [(2 - 1) / (20 - 1), (6 - 5) / (20 - 5)]
    assert summarise(result)["same"]["gap_recovered"] == [3 / 20, (7 - 4) / (20 - 4)]
    table = write_study(result)
    assert "| longer | `max_steps=200`, gap of dmd_longer | 0, 1 |" in table
    assert "64 pictures" in table and "12 prompts (diversity.shapes: exact reader)" in table


def test_an_unknown_baseline_or_one_without_a_seed_is_refused():
    with refuses(ValueError, "runs.longer.baseline=dmd_200", "dmd, longer"):
        options(longer={"baseline": "dmd_200"})
    with refuses(ValueError, "runs.longer", "[1]", "short", "[0]"):
        options(longer={"baseline": "short"}, short={**DMD, "seeds": [0]})


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_committed_study_is_shown_with_runs_and_options_that_conf_no_longer_declares(path):
    committed = json.loads(path.read_text())
    name = list(committed["runs"])[-1]
    committed["runs"][name]["train"] = {"removed_option": "balanced"}
    shown = [line.split(" | ")[0].removeprefix("| ") for line in write_study(committed).splitlines()]
    assert [row.name for row in rows_of(committed)] == list(committed["runs"])
    assert [run for run in shown if run in committed["runs"]] == list(committed["runs"])
    assert f'| {name} | `removed_option="balanced"`' in write_study(committed)
