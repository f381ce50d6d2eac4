"""A run stops before its first node if the exact reader cannot judge its prompts."""

import pytest
from kedro.io import DataCatalog, MemoryDataset
from tests.pipelines.conftest import EVALUATE, evaluate_options

from dpdmd_pipeline.datasets.prompt_file import PromptFile
from dpdmd_pipeline.pipelines import anchors, distill, evaluate, export, prompts, report, study, train
from dpdmd_pipeline.planning.checks import refuse_run

WORLD = "a red circle\n\nblue square\n"
FOREIGN = "a fox\na red circle\na dog\na red and blue square\n" + "a house " * 20 + "\n"


def assert_foreign(lines):
    """One message counts the foreign prompts, shows the first three, and names the remedies."""
    (line,) = lines
    assert line.startswith("4 prompts") and "'a fox', 'a dog', 'a red and blue square' and 1 more" in line
    assert "red, green, blue, yellow" in line and "circle, square, triangle" in line
    assert "evaluate.judge=shapes" in line and "evaluate.judge=null" in line


@pytest.fixture
def make_catalog(tmp_path):
    """A catalog of two prompt files, or of clean prompts."""

    def make(train=WORLD, judged=WORLD, cleaned=None, eval_share=None, **changes) -> DataCatalog:
        files = {"raw_prompts": train, "raw_eval_prompts": judged}
        for name, text in files.items():
            if text is not None:
                (tmp_path / f"{name}.txt").write_text(text)
        data = {name: PromptFile(tmp_path / f"{name}.txt") for name in files}
        data["prompts"] = [{"text": text} for text in (cleaned or "").splitlines()]
        data["params:prompts"] = {"eval_share": eval_share}
        data["params:evaluate"] = {**EVALUATE, **changes}
        return DataCatalog({name: MemoryDataset(value) for name, value in data.items()})

    return make


def test_prompts_of_the_world_are_accepted(make_catalog):
    assert refuse_run(distill.create_pipeline(), make_catalog()) == []


@pytest.mark.parametrize("which", ["train", "judged"])
def test_foreign_prompts_are_counted_and_some_named_with_the_remedy(make_catalog, which):
    assert_foreign(refuse_run(distill.create_pipeline(), make_catalog(**{which: FOREIGN})))


@pytest.mark.parametrize("stage", [anchors, train, evaluate, study])
def test_every_stage_that_uses_prompts_checks_clean_ones_too(make_catalog, stage):
    assert_foreign(refuse_run(stage.create_pipeline(), make_catalog(cleaned=FOREIGN.replace("\n\n", "\n"))))


@pytest.mark.parametrize("stage", [prompts, report, export])
def test_stages_that_do_not_use_clean_prompts_accept_any(make_catalog, stage):
    assert refuse_run(stage.create_pipeline(), make_catalog(FOREIGN, cleaned=FOREIGN)) == []


def test_without_the_exact_reader_any_prompt_is_accepted(make_catalog):
    assert refuse_run(distill.create_pipeline(), make_catalog(FOREIGN, judge=None)) == []


def test_options_may_be_a_dict_or_the_stages_own_class(make_catalog):
    catalog = make_catalog(FOREIGN)
    catalog["params:evaluate"] = MemoryDataset(evaluate_options())
    assert_foreign(refuse_run(distill.create_pipeline(), catalog))


def test_a_file_that_the_run_does_not_read_is_not_checked(make_catalog):
    assert refuse_run(distill.create_pipeline(), make_catalog(judged=FOREIGN, eval_share=0.5)) == []


def test_a_missing_file_is_reported(make_catalog):
    (line,) = refuse_run(distill.create_pipeline(), make_catalog(judged=None))
    assert "raw_eval_prompts.txt" in line
