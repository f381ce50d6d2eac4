"""Every path of `score`, with embedders whose answers are known."""

import json
import math
import re
import weakref

import pytest
import torch
from PIL import Image
from tests.raising import refuses
from tests.scoring.corners import ABSENT, DIVERSITY, FEATURES, FITTING, MOMENTS, QUALITY, Corners, make_sets

from dpdmd_pipeline.metrics.diversity import one_minus_cosine, vendi_score
from dpdmd_pipeline.metrics.measures import NO_ANSWER, NO_NUMBER, PictureScores, SetDiversity
from dpdmd_pipeline.scoring.preset import Preset, Settings
from dpdmd_pipeline.scoring.presets import choose
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference, Scores
from dpdmd_pipeline.scoring.sets import FileSet, Loaded, TensorSet
from dpdmd_pipeline.scoring.table import as_record, as_table
from dpdmd_pipeline.scoring.workers import workers
from dpdmd_pipeline.shapes.world import NUM_MODES, caption, gallery


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, passes):
    """Settings for two processes, and their pool."""
    settings = Settings(tmp_path_factory.mktemp("weights"), passes, processes=2, seed=0)
    with workers(settings) as pool:
        yield settings, pool


def test_every_figure_has_value_interval_count_and_protocol(settings):
    sets = make_sets(5, 4, seed=0)
    scores = score(sets, [DIVERSITY, QUALITY], settings)
    features = [Corners()(one.load().images) for one in sets]
    expected = {
        "diversity.corners.one_minus_cosine": [one_minus_cosine(f) for f in features],
        "diversity.corners.vendi": [vendi_score(f) for f in features],
        "quality.bright.score": [f.double().mean().item() for f in features],
    }
    assert set(scores.figures) == set(expected)
    for name, values in expected.items():
        figure = scores.figures[name]
        assert math.isclose(figure["value"], sum(values) / 5, rel_tol=1e-6)
        assert figure["low"] < figure["value"] < figure["high"]
        assert figure["n"] == {"prompts": 5, "pictures": 20, "prompts_not_measured": 0}
        assert figure["preset"]
        assert list(scores.per_prompt[name]) == [one.id for one in sets]
    assert not scores.missing and not scores.faults
    assert any("--duplicates-above" in note for note in scores.notes)


def test_a_missing_metric_has_no_number_and_costs_no_other(settings):
    scores = score(make_sets(2, 3, seed=0), [ABSENT, QUALITY, MOMENTS], settings)
    assert list(scores.figures) == ["quality.bright.score"]
    assert "facebook/dinov2-base" in scores.missing["diversity.dino_v2"]
    assert "--reference" in scores.missing["distribution.inception"]
    assert "hf download" in as_table(scores)


def test_unusable_pictures_are_named_and_counted(settings, tmp_path):
    files = []
    for number in range(4):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (4, 4), (number * 60, 50, 200 - number * 40)).save(files[-1])
    white, empty, odd = (tmp_path / name for name in ("white.png", "empty.png", "odd.png"))
    Image.new("RGB", (4, 4), "white").save(white)
    Image.new("RGB", (5, 4), "red").save(odd)
    empty.touch()
    sets = [
        FileSet("good", "good", tuple(files)),
        FileSet("some", "some", (files[0], white, empty, files[1], odd)),
        FileSet("alone", "alone", (files[0], white)),
        FileSet("nothing", "nothing", (empty,)),
    ]
    scores = score(sets, [DIVERSITY, QUALITY], settings)
    assert scores.faults == {
        "empty file": [str(empty)],
        "another size than the prompt's other pictures": [str(odd)],
        f"{NO_NUMBER} (diversity.corners)": [str(white)],
        f"{NO_NUMBER} (quality.bright)": [str(white)],
        "prompt with fewer than 2 usable pictures": ["alone", "nothing"],
        "prompt with no usable picture": ["nothing"],
    }
    figure = scores.figures["diversity.corners.one_minus_cosine"]
    assert figure["n"] == {"prompts": 2, "pictures": 6, "prompts_not_measured": 2}
    assert scores.figures["quality.bright.score"]["n"]["prompts"] == 3
    assert any("1 prompt with 2, 1 prompt with 4" in note for note in scores.notes)
    table = as_table(scores)
    assert "2 x prompt with fewer than 2 usable pictures: alone, nothing" in table and "2 of 4" in table
    assert json.loads(json.dumps(as_record(scores), allow_nan=False))["faults"]["empty file"]["count"] == 1


def test_prompts_with_pictures_of_another_size_are_named_on_either_side(settings):
    def sized(side, count):
        return [TensorSet(f"{side}_{n}", "", _noise(side, n)) for n in range(count)]

    def about_sizes(scores):
        (note,) = (note for note in scores.notes if "(4 x 4)" in note)
        assert "5 prompts" in note and note.endswith(": 8_0, 8_1, 8_2 and 2 more")
        return note

    mixed, small = [*sized(4, 12), *sized(8, 5)], sized(4, 12)
    assert "in the reference" not in about_sizes(score(mixed, [QUALITY], settings))
    assert "in the reference" in about_sizes(score(small, [FEATURES], settings, Reference(mixed)))
    assert not any("size" in note for note in score(small, [QUALITY, FEATURES], settings, Reference(small)).notes)
    other = score(small, [FEATURES], settings, Reference(sized(8, 12))).notes
    assert any("4 x 4" in note and "8 x 8" in note for note in other)


def test_figures_of_neighbours_among_copies_have_a_note(settings):
    copies = [TensorSet("copies", "", _noise(4, 0)[:1].expand(10, 3, 4, 4))]
    mixed = [*copies, *make_sets(3, 4, seed=0)]
    for sets, count in ((copies, 20), (mixed, 20), (make_sets(3, 4, seed=0), 0)):
        scores = score(sets, [FEATURES], settings, Reference(sets))
        notes = [note for note in scores.notes if "copies" in note]
        assert len(notes) == bool(count)
        assert all(note.startswith(f"{count} pictures") and "distribution.dino_v2" in note for note in notes)


def _noise(side, seed):
    return torch.randint(256, (2, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def test_a_prompt_that_a_metric_cannot_judge_costs_no_other_prompt(settings):
    (reader,) = choose("quality.shapes")
    readable = [TensorSet(caption(row), caption(row), (gallery()[[row * NUM_MODES]] * 255).byte()) for row in (0, 1)]
    cat = TensorSet("p2", "a photo of a cat", readable[0].images)
    small = TensorSet("p3", caption(3), readable[0].images[:, :, :16, :16])
    scores = score([*readable, cat, small], [reader], settings)
    n = scores.figures["quality.shapes.aligned"]["n"]
    assert n == {"prompts": 2, "pictures": 2, "prompts_not_measured": 2} and not scores.missing
    kind_of = {names[0]: kind for kind, names in scores.faults.items()}
    assert "the exact reader" in kind_of["p2"] and "'a photo of a cat'" in kind_of["p2"]
    assert "the exact reader" in kind_of["p3"] and "[1, 3, 16, 16]" in kind_of["p3"]
    alone = score([cat], [reader], settings)
    assert not alone.figures and "'a photo of a cat'" in alone.missing["quality.shapes"]


def test_a_file_name_neither_breaks_a_line_nor_commands_the_terminal(settings, tmp_path):
    empty = tmp_path / "x\ny\x1b[31m.png"
    empty.touch()
    table = as_table(score([FileSet("p", "p", (empty,))], [QUALITY], settings))
    assert "x\\ny\\x1b[31m.png" in table and "\x1b" not in table


def test_a_network_that_fails_costs_its_metric_only(settings, caplog):
    def broken(settings):
        return PictureScores(lambda text, images: torch.zeros(2) @ torch.zeros(3))

    scores = score(make_sets(2, 3, seed=0), [Preset("quality", "broken", "", broken), QUALITY], settings)
    assert list(scores.figures) == ["quality.bright.score"]
    assert "inconsistent tensor size" in scores.missing["quality.broken"]
    assert "quality.broken" in caplog.text and caplog.records[0].exc_info


def test_faults_of_the_reference_are_named_too(settings, tmp_path):
    (tmp_path / "gone.png").touch()
    reference = Reference([*make_sets(3, 4, seed=1), FileSet("bad", "bad", (tmp_path / "gone.png",))])
    scores = score([*make_sets(3, 4, seed=0), FileSet("bad", "bad", ())], [DIVERSITY, MOMENTS], settings, reference)
    assert scores.faults == {
        "prompt with no picture": ["bad"],
        "empty file, in the reference": [str(tmp_path / "gone.png")],
        "prompt with fewer than 2 usable pictures, in the reference": ["bad"],
        "prompt with no usable picture, in the reference": ["bad"],
    }
    judged = score(reference.sets, [DIVERSITY, MOMENTS], settings, Reference(reference.sets))
    assert not any("reference" in kind for kind in judged.faults)


def test_a_prompt_without_a_picture_is_counted(settings):
    scores = score([*make_sets(2, 3, seed=0), FileSet("empty", "empty", ())], [DIVERSITY, QUALITY], settings)
    assert scores.faults == {"prompt with no picture": ["empty"]}
    assert scores.figures["quality.bright.score"]["n"]["prompts_not_measured"] == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_only_metrics_that_read_the_text_leave_out_prompts_without_one(settings, processes, request):
    settings, pool = request.getfixturevalue("two_processes") if processes == 2 else (settings, None)
    sets = make_sets(3, 3, seed=0)
    nameless = [TensorSet(one.id, one.id, one.images, "prompt without a text (an id)") for one in sets]
    some, none = (
        score(prompts, [DIVERSITY, FITTING], settings, None, pool) for prompts in ([nameless[0], *sets[1:]], nameless)
    )
    assert some.faults == {"prompt without a text (an id)": ["p0"]} and not some.missing
    assert some.figures["alignment.bright.score"]["n"]["prompts"] == 2
    assert some.figures["diversity.corners.vendi"]["n"]["prompts"] == 3
    assert "--prompts" in none.missing["alignment.bright"] and "prompt.txt" in none.missing["alignment.bright"]
    assert none.figures["diversity.corners.vendi"]["n"]["prompts"] == 3


def test_prompts_that_the_encoder_cuts_are_counted_in_a_note(settings):
    def build(settings):
        def score(text, images):
            return Corners()(images).mean(1)

        score.cut_at = lambda text: 77 if "1" in text else None
        return PictureScores(score)

    scores = score(make_sets(12, 2, seed=0), [Preset("alignment", "cut", "", build)], settings)
    assert any(all(part in note for part in ("3 of 12", "77", "alignment.cut")) for note in scores.notes)


def rated(answers):
    """A metric with these ratings for each prompt; NaN stands for an answer that did not parse."""
    build = lambda settings: PictureScores(lambda text, images: torch.tensor(answers), why=NO_ANSWER)  # noqa: E731
    return Preset("quality", "rated", "", build)


def test_an_answer_that_does_not_parse_has_a_fault_of_its_own(settings):
    scores = score(make_sets(2, 4, seed=0), [rated([1.0, 2.0, math.nan, math.nan])], settings)
    assert list(scores.faults) == [f"{NO_ANSWER} (quality.rated)"]
    assert scores.figures["quality.rated.score"]["value"] == 1.5


def test_a_metric_is_missing_if_most_answers_do_not_parse(settings):
    scores = score(make_sets(2, 4, seed=0), [rated([1.0, math.nan, math.nan, math.nan]), QUALITY], settings)
    assert scores.missing["quality.rated"].startswith("6 of 8 ")
    assert list(scores.figures) == ["quality.bright.score"]
    assert len(scores.faults[f"{NO_ANSWER} (quality.rated)"]) == 6


def test_two_sets_of_one_prompt_are_refused(settings):
    sets = make_sets(2, 3, seed=0)
    with refuses(ValueError, "'p0'"):
        score([*sets, sets[0]], [QUALITY], settings)


def test_a_metric_without_usable_pictures_is_missing(settings):
    white = TensorSet("p", "p", torch.full((3, 3, 4, 4), 255, dtype=torch.uint8))
    scores = score([white], [DIVERSITY], settings)
    assert not scores.figures and list(scores.missing) == ["diversity.corners"]


def test_one_prompt_has_a_value_without_an_interval(settings):
    scores = score(make_sets(1, 4, seed=0), [QUALITY], settings)
    assert scores.figures["quality.bright.score"]["low"] is None
    assert any("one prompt only" in note for note in scores.notes)


def test_near_duplicates_are_counted_against_the_reference_at_the_same_number(settings):
    sets, teacher = make_sets(30, 4, seed=0), Reference(make_sets(30, 4, seed=1))
    copies = [TensorSet(one.id, one.text, one.images[:1].expand(4, 3, 4, 4)) for one in sets]
    rates = [score(some, [DIVERSITY], settings, teacher).figures for some in (sets, copies)]
    assert rates[0]["diversity.corners.duplicate_rate"]["value"] < 0.05
    assert rates[1]["diversity.corners.duplicate_rate"]["value"] == 1
    assert list(teacher.duplicates) == ["diversity.corners"]
    _, threshold = teacher.duplicates["diversity.corners"]
    figure = rates[0]["diversity.corners.duplicate_rate"]
    assert (figure["threshold"], figure["threshold_from"]) == (threshold, "reference")
    fewer = score(make_sets(30, 3, seed=0), [DIVERSITY], settings, teacher)
    assert "diversity.corners.duplicate_rate" not in fewer.figures
    assert any(re.search(r"reference .*\b4 .*\b3\b", note) for note in fewer.notes)


def test_a_given_cosine_counts_near_duplicates_without_a_reference(settings):
    always = Settings(settings.weights, settings.passes, 1, 0, duplicates_above=-1.0)
    scores = score(make_sets(2, 3, seed=0), [DIVERSITY], always)
    figure = scores.figures["diversity.corners.duplicate_rate"]
    assert (figure["value"], figure["threshold"], figure["threshold_from"]) == (1, -1, "user")
    assert any("diversity.corners" in note and " -1," in note for note in scores.notes)
    assert as_record(scores)["figures"]["diversity.corners.duplicate_rate"] == figure


def test_results_are_bit_identical_over_one_and_two_processes(settings, two_processes):
    sets, reference = make_sets(9, 4, seed=0), make_sets(9, 4, seed=1)
    presets = [DIVERSITY, QUALITY, MOMENTS, FEATURES]
    alone = score(sets, presets, settings, Reference(reference))
    spread, pool = two_processes
    assert score(sets, presets, spread, Reference(reference), pool) == alone


def test_the_joined_results_of_several_calls_equal_those_of_one_call(settings, tmp_path):
    (tmp_path / "gone.png").touch()
    sets = [*make_sets(3, 4, seed=0), FileSet("bad", "bad", (tmp_path / "gone.png",))]
    presets, reference = [DIVERSITY, ABSENT, QUALITY], Reference(make_sets(3, 4, seed=1))
    joined = Scores(len(sets), sum(map(len, sets)))
    for preset in presets:
        joined.join(score(sets, [preset], settings, reference))
    assert joined == score(sets, presets, settings, reference)


def test_calls_may_share_processes(settings, two_processes):
    spread, pool = two_processes
    sets = make_sets(3, 3, seed=0)
    separate = [score(sets, [preset], spread, None, pool) for preset in (DIVERSITY, QUALITY)]
    assert separate == [score(sets, [preset], settings) for preset in (DIVERSITY, QUALITY)]


def test_a_reference_that_is_judged_itself_is_measured_once(settings):
    calls = []

    def build(settings):
        return SetDiversity(lambda images: calls.append(1) or Corners()(images))

    sets = make_sets(3, 4, seed=0)
    reference = Reference(sets)
    score(sets, [Preset("diversity", "corners", "", build)], settings, reference)
    assert len(calls) == 3 and reference.duplicates["diversity.corners"][0] == 4


def test_missing_weights_have_the_same_reason_in_workers(settings):
    spread = Settings(settings.weights, settings.passes, 2, settings.seed)
    sets = make_sets(2, 3, seed=0)
    assert score(sets, [ABSENT], spread).missing == score(sets, [ABSENT], settings).missing


class Counted:
    """A prompt of nine small pictures, which counts the pictures in memory."""

    alive = most = 0

    no_text = ""

    def __init__(self, number):
        self.id = self.text = str(number)

    @staticmethod
    def count_down():
        Counted.alive -= 1

    def __len__(self):
        return 9

    def load(self):
        images = [Image.new("RGB", (4, 4), (int(self.id) % 251, 20 * seed, 77)) for seed in range(9)]
        for image in images:
            weakref.finalize(image, Counted.count_down)
        Counted.alive += len(images)
        Counted.most = max(Counted.most, Counted.alive)
        return Loaded([f"{self.id}_{seed}" for seed in range(9)], images, [])


def test_many_prompts_are_scored_in_bounded_memory(settings, monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.metrics.distribution.LARGEST", 500)
    sets = [Counted(number) for number in range(1000)]
    scores = score(sets, [QUALITY, DIVERSITY], settings)
    for name in ("quality.bright.score", "diversity.corners.vendi"):
        assert scores.figures[name]["n"]["pictures"] == 9000
    assert Counted.most <= 18  # of one prompt and of the one before
    compared = score(sets, [MOMENTS, FEATURES], settings, Reference(sets[:200]))
    assert compared.figures["distribution.dino_v2.precision"]["n"]["compared"] == 500
    fid, kid = (compared.figures[f"distribution.inception.{name}"] for name in ("fid", "kid"))
    assert fid["low"] is None and kid["low"] < kid["high"]  # KID uses the stored features, FID all
    assert Counted.most <= 18
