"""Gaps recovered, from the scores of three models to the table."""

import pytest
import torch
from tests.scoring.corners import DIVERSITY, QUALITY, make_sets

from dpdmd_pipeline.metrics.summary import gap_figure
from dpdmd_pipeline.scoring.gap import gaps_recovered
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference
from dpdmd_pipeline.scoring.sets import TensorSet
from dpdmd_pipeline.scoring.table import as_gap_table


def test_a_model_between_dmd_and_the_teacher_recovers_a_part_of_the_gap(settings):
    teacher = make_sets(8, 4, seed=0)
    dmd = [TensorSet(one.id, one.text, one.images[[0, 0, 0, 1]]) for one in teacher]
    ours = [TensorSet(one.id, one.text, one.images[[0, 0, 1, 2]]) for one in teacher]
    reference = Reference(teacher)
    scores = [score(some, [DIVERSITY, QUALITY], settings, reference) for some in (teacher, dmd, ours)]
    gaps, _ = gaps_recovered(*scores, seed=0)
    assert set(gaps) == {f"diversity.corners.{name}" for name in ("one_minus_cosine", "vendi", "duplicate_rate")}
    for gap in gaps.values():
        assert 0 < gap["value"] < 1 and gap["prompts"] == 8 and gap["preset"] == "corner pixels"
    assert gaps["diversity.corners.vendi"]["low"] < gaps["diversity.corners.vendi"]["high"]
    assert "diversity.corners.vendi: 0." in as_gap_table(gaps)
    assert gaps_recovered(scores[0], scores[1], scores[0], seed=0)[0]["diversity.corners.vendi"]["value"] == 1


@pytest.mark.parametrize(
    ("teacher", "dmd", "parts"),
    [
        ([2.0, 2.0], [1.0, 1.0], ["0.5  0.5 to 0.5", "prompts: 2"]),
        ([2.0, 1.0], [1.0, 1.9], ["no interval", "chance", "prompts: 2"]),
        ([2.0], [1.0], ["0.5  no interval", "one prompt", "prompts: 1"]),
        ([1.0, 1.0], [2.0, 2.0], ["lost nothing", "prompts: 2"]),
    ],
)
def test_a_share_without_an_interval_gives_the_reason(teacher, dmd, parts):
    ours = torch.full((len(dmd),), 1.5)
    gap = gap_figure(torch.tensor(teacher), torch.tensor(dmd), ours, seed=0) | {"prompts": len(dmd)}
    line = as_gap_table({"diversity.corners.vendi": gap}).splitlines()[-1]
    assert all(part in line for part in parts)


def test_a_gap_leaves_out_prompts_with_different_numbers_of_pictures_if_it_depends_on_them(settings):
    teacher = make_sets(4, 5, seed=0)
    dmd = [TensorSet(one.id, one.text, one.images[[0, 0, 0, 1, 1]]) for one in teacher]
    ours = [TensorSet(one.id, one.text, one.images[[0, 0, 1, 2, 2]]) for one in teacher]
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)  # not usable
    ours[0] = TensorSet("p0", "prompt 0", torch.cat([ours[0].images[:4], white]))

    def compare(sets):
        reference = Reference(teacher)
        scores = [score(some, [DIVERSITY], settings, reference) for some in (teacher, dmd, sets)]
        return gaps_recovered(*scores, seed=0)

    gaps, notes = compare(ours)
    prompts = {name.rsplit(".", 1)[1]: gap["prompts"] for name, gap in gaps.items()}
    assert prompts == {"one_minus_cosine": 4, "vendi": 3, "duplicate_rate": 3}
    (note,) = notes
    assert note.startswith("diversity.corners.vendi, diversity.corners.duplicate_rate: ") and "1 of 4 prompts" in note
    assert note in as_gap_table(gaps, notes)
    fewer = [TensorSet(one.id, one.text, one.images[:4]) for one in ours]
    gaps, notes = compare(fewer)
    assert list(gaps) == ["diversity.corners.one_minus_cosine"]
    assert "4 of 4 prompts" in notes[0]


def test_without_a_common_prompt_there_is_no_gap_but_a_note(settings):
    teacher, others = make_sets(3, 4, seed=0), make_sets(3, 4, seed=1)
    lost = [TensorSet(f"q{one.id}", one.text, one.images) for one in others]
    scores = [score(some, [DIVERSITY], settings) for some in (teacher, others, lost)]
    gaps, notes = gaps_recovered(*scores, seed=0)
    (note,) = notes
    assert gaps == {} and note.startswith("diversity.corners.one_minus_cosine, diversity.corners.vendi: ")
    assert note in as_gap_table(gaps, notes)
