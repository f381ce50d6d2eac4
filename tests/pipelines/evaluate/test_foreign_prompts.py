"""Prompts that the exact reader cannot judge are refused before anything is made of them."""

import pytest
from kedro.io import DataCatalog, MemoryDataset
from tests.pipelines.conftest import EVALUATE, evaluate_options

from dpdmd_pipeline.datasets.prompt_file import PromptFile
from dpdmd_pipeline.pipelines import anchors, distill, evaluate, export, prompts, report, study, train
from dpdmd_pipeline.planning.prompts import refuse_prompts

WORLD = "a red circle\n\nblue square\n"
FOREIGN = "a fox\na red circle\na dog\na red and blue square\n" + "a house " * 20 + "\n"
REFUSED = (
    "4 prompts are not of the shapes world, the only one that evaluate.judge=shapes reads ('a fox', 'a dog', "
    "'a red and blue square' and 1 more): name one colour of red, green, blue, yellow and one shape of circle, square, "
    "triangle in each, take an --env with a teacher of your own, or set evaluate.judge=null"
)


@pytest.fixture
def given(tmp_path):
    """A catalog of two prompt files, or of prompts that are cleaned already."""

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


def test_prompts_of_the_world_are_not_refused(given):
    assert refuse_prompts(distill.create_pipeline(), given()) == []


@pytest.mark.parametrize("which", ["train", "judged"])
def test_foreign_prompts_are_counted_and_some_named_with_the_remedy(given, which):
    assert refuse_prompts(distill.create_pipeline(), given(**{which: FOREIGN})) == [REFUSED]


@pytest.mark.parametrize("stage", [anchors, train, evaluate, study])
def test_cleaned_prompts_are_asked_too_by_every_stage_that_uses_them(given, stage):
    assert refuse_prompts(stage.create_pipeline(), given(cleaned=FOREIGN.replace("\n\n", "\n"))) == [REFUSED]


@pytest.mark.parametrize("stage", [prompts, report, export])
def test_stages_that_make_nothing_of_prompts_do_not_mind(given, stage):
    assert refuse_prompts(stage.create_pipeline(), given(FOREIGN, cleaned=FOREIGN)) == []


def test_without_the_exact_reader_any_prompt_will_do(given):
    assert refuse_prompts(distill.create_pipeline(), given(FOREIGN, judge=None)) == []


def test_options_may_be_plain_or_the_stages_own(given):
    catalog = given(FOREIGN)
    catalog["params:evaluate"] = MemoryDataset(evaluate_options())
    assert refuse_prompts(distill.create_pipeline(), catalog) == [REFUSED]


def test_a_file_that_is_not_read_is_not_asked(given):
    assert refuse_prompts(distill.create_pipeline(), given(judged=FOREIGN, eval_share=0.5)) == []


def test_a_file_that_is_not_there_is_missed_at_once(given):
    (line,) = refuse_prompts(distill.create_pipeline(), given(judged=None))
    assert "raw_eval_prompts.txt does not exist: create it" in line
