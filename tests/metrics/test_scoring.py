"""Every path of `score`, with embedders of which the answer is known."""

import json
import math
import weakref
from functools import partial

import pytest
import torch
from PIL import Image

from dpdmd_pipeline.metrics.distribution import frechet_influence, kernel_influence
from dpdmd_pipeline.metrics.diversity import one_minus_cosine, vendi_score
from dpdmd_pipeline.metrics.measures import (
    NO_ANSWER,
    PairDiversity,
    PictureScores,
    SetDiversity,
    SetFeatures,
    pixel_distances,
)
from dpdmd_pipeline.metrics.pictures import FileSet, Loaded, TensorSet
from dpdmd_pipeline.metrics.pixels import pairwise_distance
from dpdmd_pipeline.metrics.presets import Preset, Settings, choose
from dpdmd_pipeline.metrics.score import Reference, Scores, gap_notes, gaps_recovered, score, workers
from dpdmd_pipeline.metrics.summary import gap_figure, ratio_interval
from dpdmd_pipeline.metrics.table import as_gap_table, as_record, as_table
from dpdmd_pipeline.metrics.weights import DINO_V2
from dpdmd_pipeline.shapes.world import NUM_MODES, caption, gallery


class Corners:
    """Features of a picture: four of its pixels, all channels; NaN for a white one."""

    def __init__(self, batch_size=1):
        self.batch_size = batch_size

    def __call__(self, images):
        rows = [[value for x in (0, 3) for y in (0, 3) for value in image.getpixel((x, y))] for image in images]
        found = torch.tensor(rows, dtype=torch.float32) / 255
        return found.masked_fill((found == 1).all(1, keepdim=True), math.nan)


def corners(kind, settings):
    return kind(Corners())


def brightness(settings):
    return PictureScores("score", lambda text, images: Corners()(images).mean(1))


DIVERSITY = Preset("diversity", "corners", "corner pixels", partial(corners, SetDiversity))
FEATURES = Preset("distribution", "dino_v2", "corner pixels, k = 5", partial(corners, SetFeatures))
MOMENTS = Preset("distribution", "inception", "corner pixels", partial(corners, SetFeatures))
QUALITY = Preset("quality", "bright", "mean of corners", brightness)
FITTING = Preset("alignment", "bright", "mean of corners", brightness)
ABSENT = Preset("diversity", "dino_v2", "DINO", partial(corners, SetDiversity), (DINO_V2,))


def make_sets(prompts, pictures, seed, low=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, pictures, 3, 4, 4)
    pixels = torch.randint(low, 255, shape, generator=generator, dtype=torch.uint8)
    return [TensorSet(f"p{number}", f"prompt {number}", images) for number, images in enumerate(pixels)]


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
    assert any("near-duplicates were not counted" in note for note in scores.notes)


def test_a_missing_metric_costs_no_other_and_is_never_a_number(settings):
    scores = score(make_sets(2, 3, seed=0), [ABSENT, QUALITY, MOMENTS], settings)
    assert list(scores.figures) == ["quality.bright.score"]
    assert "facebook/dinov2-base" in scores.missing["diversity.dino_v2"]
    assert "--reference FOLDER" in scores.missing["distribution.inception"]
    assert "hf download" in as_table(scores)


def test_what_cannot_be_used_is_named_and_counted(settings, tmp_path):
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
        "the network gave no finite number (diversity.corners)": [str(white)],
        "the network gave no finite number (quality.bright)": [str(white)],
        "prompt with fewer than 2 usable pictures": ["alone", "nothing"],
        "prompt with no usable picture": ["nothing"],
    }
    figure = scores.figures["diversity.corners.one_minus_cosine"]
    assert figure["n"] == {"prompts": 2, "pictures": 6, "prompts_not_measured": 2}
    assert scores.figures["quality.bright.score"]["n"]["prompts"] == 3
    assert "unequal numbers of usable pictures a prompt (1 prompt with 2, 1 prompt with 4)" in "".join(scores.notes)
    table = as_table(scores)
    assert "2 x prompt with fewer than 2 usable pictures: alone, nothing" in table and "2 of 4" in table
    assert json.loads(json.dumps(as_record(scores), allow_nan=False))["faults"]["empty file"]["count"] == 1


def test_prompts_whose_pictures_have_another_size_are_named_on_either_side(settings):
    def sized(side, count):
        return [TensorSet(f"{side}_{n}", "", _noise(side, n)) for n in range(count)]

    told = "5 prompts with pictures of another size than most (4 x 4){}: 8_0, 8_1, 8_2 and 2 more"
    mixed, small = [*sized(4, 12), *sized(8, 5)], sized(4, 12)
    assert told.format("") in score(mixed, [QUALITY], settings).notes
    assert told.format(", in the reference") in score(small, [FEATURES], settings, Reference(mixed)).notes
    assert not any("size" in note for note in score(small, [QUALITY, FEATURES], settings, Reference(small)).notes)
    other = score(small, [FEATURES], settings, Reference(sized(8, 12))).notes
    assert "most pictures are 4 x 4, the reference's 8 x 8: resizing is part of the distance" in other


def test_real_pictures_of_any_size_are_all_compared_with(settings, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        Image.new("RGB", (4 + number, 5), (20 * number, 9, 200 - number)).save(file)
    real = Reference([FileSet("real", "", tuple(files))])
    found = score(make_sets(4, 3, seed=0), [FEATURES], settings, real)
    assert not found.faults and found.figures["distribution.dino_v2.coverage"]["n"]["compared"] == 12


def _noise(side, seed):
    return torch.randint(256, (2, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def test_a_prompt_that_a_metric_cannot_judge_costs_no_other_prompt(settings):
    (reader,) = choose("quality.shapes")
    known = [TensorSet(caption(row), caption(row), (gallery()[[row * NUM_MODES]] * 255).byte()) for row in (0, 1)]
    cat = TensorSet("p2", "a photo of a cat", known[0].images)
    small = TensorSet("p3", caption(3), known[0].images[:, :, :16, :16])
    scores = score([*known, cat, small], [reader], settings)
    n = scores.figures["quality.shapes.aligned"]["n"]
    assert n == {"prompts": 2, "pictures": 2, "prompts_not_measured": 2} and not scores.missing
    told = {names[0]: kind for kind, names in scores.faults.items()}
    assert "the exact reader: prompt 'a photo of a cat' is not of the shapes world" in told["p2"]
    assert "the exact reader: images have shape [1, 3, 16, 16]" in told["p3"]
    alone = score([cat], [reader], settings)
    assert not alone.figures and "is not of the shapes world" in alone.missing["quality.shapes"]


def test_what_a_file_is_called_neither_breaks_a_line_nor_commands_the_terminal(settings, tmp_path):
    empty = tmp_path / "x\ny\x1b[31m.png"
    empty.touch()
    table = as_table(score([FileSet("p", "p", (empty,))], [QUALITY], settings))
    assert "x\\ny\\x1b[31m.png" in table and "\x1b" not in table


def test_a_network_that_breaks_down_costs_its_metric_only(settings, caplog):
    def broken(settings):
        return PictureScores("score", lambda text, images: torch.zeros(2) @ torch.zeros(3))

    scores = score(make_sets(2, 3, seed=0), [Preset("quality", "broken", "", broken), QUALITY], settings)
    assert list(scores.figures) == ["quality.bright.score"]
    assert "inconsistent tensor size" in scores.missing["quality.broken"]
    assert "quality.broken has failed" in caplog.text  # with its traceback


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
def test_what_asks_for_the_text_leaves_out_prompts_without_one_and_other_metrics_go_on(settings, processes):
    settings = Settings(settings.weights, settings.passes, processes, settings.seed)
    sets = make_sets(3, 3, seed=0)
    nameless = [TensorSet(one.id, one.id, one.images, "prompt without a text (an id)") for one in sets]
    some = score([nameless[0], *sets[1:]], [DIVERSITY, FITTING], settings)
    assert some.faults == {"prompt without a text (an id)": ["p0"]} and not some.missing
    assert some.figures["alignment.bright.score"]["n"]["prompts"] == 2
    assert some.figures["diversity.corners.vendi"]["n"]["prompts"] == 3
    none = score(nameless, [DIVERSITY, FITTING], settings)
    assert none.missing["alignment.bright"].startswith("no prompt has a text: give --prompts FILE")
    assert none.figures["diversity.corners.vendi"]["n"]["prompts"] == 3


def test_prompts_that_the_encoder_cuts_are_counted_in_a_note(settings):
    def build(settings):
        cut_at = lambda text: 77 if "1" in text else None  # noqa: E731
        return PictureScores("score", lambda text, images: Corners()(images).mean(1), cut_at)

    scores = score(make_sets(12, 2, seed=0), [Preset("alignment", "cut", "", build)], settings)
    assert "3 of 12 prompts are longer than 77 tokens and were cut (alignment.cut)" in scores.notes


def rated(answers):
    """A metric that reads ratings, of which some are no number; the same for each prompt."""
    build = lambda settings: PictureScores("score", lambda text, images: torch.tensor(answers), why=NO_ANSWER)  # noqa: E731
    return Preset("quality", "rated", "", build)


def test_an_answer_that_does_not_parse_is_called_so(settings):
    scores = score(make_sets(2, 4, seed=0), [rated([1.0, 2.0, math.nan, math.nan])], settings)
    assert list(scores.faults) == ["the network's answer did not parse (quality.rated)"]
    assert scores.figures["quality.rated.score"]["value"] == 1.5


def test_a_metric_of_which_most_answers_do_not_parse_is_missing(settings):
    scores = score(make_sets(2, 4, seed=0), [rated([1.0, math.nan, math.nan, math.nan]), QUALITY], settings)
    assert scores.missing["quality.rated"].startswith("6 of 8 answers did not parse")
    assert list(scores.figures) == ["quality.bright.score"]
    assert len(scores.faults["the network's answer did not parse (quality.rated)"]) == 6


def test_two_sets_of_one_prompt_are_refused(settings):
    sets = make_sets(2, 3, seed=0)
    with pytest.raises(ValueError, match="prompt id 'p0' is given to more than one set"):
        score([*sets, sets[0]], [QUALITY], settings)


def test_nothing_usable_is_missing_not_a_number(settings):
    white = TensorSet("p", "p", torch.full((3, 3, 4, 4), 255, dtype=torch.uint8))
    scores = score([white], [DIVERSITY], settings)
    assert not scores.figures and "no prompt could be measured" in scores.missing["diversity.corners"]


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
    told = rates[0]["diversity.corners.duplicate_rate"]
    assert (told["threshold"], told["threshold_from"]) == (threshold, "reference")
    fewer = score(make_sets(30, 3, seed=0), [DIVERSITY], settings, teacher)
    assert "diversity.corners.duplicate_rate" not in fewer.figures
    assert any("the reference has 4 pictures a prompt, not 3" in note for note in fewer.notes)


def test_a_cosine_of_one_s_own_counts_near_duplicates_without_a_reference(settings):
    always = Settings(settings.weights, settings.passes, 1, 0, duplicates_above=-1.0)
    scores = score(make_sets(2, 3, seed=0), [DIVERSITY], always)
    figure = scores.figures["diversity.corners.duplicate_rate"]
    assert (figure["value"], figure["threshold"], figure["threshold_from"]) == (1, -1, "user")
    assert "near-duplicates of diversity.corners have a cosine of at least -1, as given" in as_table(scores)
    assert as_record(scores)["figures"]["diversity.corners.duplicate_rate"] == figure


def test_the_same_distribution_is_near_and_another_far(settings):
    reference = Reference(make_sets(30, 6, seed=0))
    near, far = (
        score(sets, [MOMENTS, FEATURES], settings, reference).figures
        for sets in (make_sets(30, 6, seed=1), make_sets(30, 6, seed=2, low=150))
    )
    assert set(near) == {
        *(f"distribution.inception.{name}" for name in ("fid", "kid")),
        *(f"distribution.dino_v2.{name}" for name in ("precision", "recall", "density", "coverage")),
    }
    for name in ("fid", "kid"):
        assert near[f"distribution.inception.{name}"]["value"] < 0.2 * far[f"distribution.inception.{name}"]["value"]
        for figure in (near[f"distribution.inception.{name}"], far[f"distribution.inception.{name}"]):
            assert figure["low"] < figure["value"] < figure["high"]
    assert near["distribution.inception.kid"]["n"]["subset"] == 180
    for name in ("recall", "coverage"):
        figures = near[f"distribution.dino_v2.{name}"], far[f"distribution.dino_v2.{name}"]
        assert figures[0]["low"] > figures[1]["high"]
        assert figures[0]["n"] == {"prompts": 30, "pictures": 180, "reference_pictures": 180, "compared": 180}


def test_fid_and_kid_have_the_intervals_of_their_own_influence(settings):
    ours, theirs = make_sets(20, 6, seed=1, low=40), make_sets(30, 5, seed=0)
    figures = score(ours, [MOMENTS], settings, Reference(theirs)).figures
    fake, real = (torch.cat([Corners()(one.load().images) for one in sets]) for sets in (ours, theirs))
    owners = torch.arange(20).repeat_interleave(6)
    for name, influence in (("fid", frechet_influence), ("kid", kernel_influence)):
        found = figures[f"distribution.inception.{name}"]
        expected = ratio_interval(found["value"] + influence(real, fake), owners, settings.seed)
        assert (found["low"], found["high"]) == pytest.approx((expected["low"], expected["high"]), rel=1e-6)
        assert expected["low"] > 0


def test_fid_s_interval_ends_at_zero_and_one_that_cannot_be_computed_costs_no_figure(settings, monkeypatch):
    reference, alike = Reference(make_sets(8, 4, seed=0)), make_sets(8, 4, seed=1)
    figures = score(alike, [MOMENTS], settings, reference).figures
    assert figures["distribution.inception.fid"]["low"] >= 0 > figures["distribution.inception.kid"]["low"]

    def breaks_down(real, fake):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr("dpdmd_pipeline.metrics.compare.frechet_influence", breaks_down)
    without = score(alike, [MOMENTS], settings, reference).figures
    fid = without["distribution.inception.fid"]
    assert fid == {**figures["distribution.inception.fid"], "low": None, "high": None}
    assert without["distribution.inception.kid"] == figures["distribution.inception.kid"]


def test_too_few_pictures_for_fid_leave_kid_and_say_why(settings):
    scores = score(make_sets(2, 4, seed=0), [MOMENTS], settings, Reference(make_sets(2, 4, seed=1)))
    assert list(scores.figures) == ["distribution.inception.kid"]
    assert "more pictures than features" in scores.missing["distribution.inception.fid"]


def test_results_are_bit_identical_over_one_and_two_processes(settings):
    sets, reference = make_sets(9, 4, seed=0), make_sets(9, 4, seed=1)
    presets = [DIVERSITY, QUALITY, MOMENTS, FEATURES]
    alone = score(sets, presets, settings, Reference(reference))
    spread = Settings(settings.weights, settings.passes, 2, settings.seed)
    assert score(sets, presets, spread, Reference(reference)) == alone


def test_what_several_calls_found_of_the_same_pictures_joins_to_what_one_call_finds(settings, tmp_path):
    (tmp_path / "gone.png").touch()
    sets = [*make_sets(3, 4, seed=0), FileSet("bad", "bad", (tmp_path / "gone.png",))]
    presets, reference = [DIVERSITY, ABSENT, QUALITY], Reference(make_sets(3, 4, seed=1))
    joined = Scores(len(sets), sum(map(len, sets)))
    for preset in presets:
        joined.join(score(sets, [preset], settings, reference))
    assert joined == score(sets, presets, settings, reference)


def test_calls_may_share_their_processes(settings):
    spread = Settings(settings.weights, settings.passes, 2, settings.seed)
    sets = make_sets(3, 3, seed=0)
    with workers(spread) as pool:
        found = [score(sets, [preset], spread, None, pool) for preset in (DIVERSITY, QUALITY)]
    assert found == [score(sets, [preset], settings) for preset in (DIVERSITY, QUALITY)]


def test_a_reference_is_not_measured_twice_where_it_is_judged_itself(settings):
    counted = []

    def build(settings):
        return SetDiversity(lambda images: counted.append(1) or Corners()(images))

    sets = make_sets(3, 4, seed=0)
    reference = Reference(sets)
    score(sets, [Preset("diversity", "corners", "", build)], settings, reference)
    assert len(counted) == 3 and reference.duplicates["diversity.corners"][0] == 4


def test_weights_missing_in_workers_are_told_as_in_one_process(settings):
    spread = Settings(settings.weights, settings.passes, 2, settings.seed)
    sets = make_sets(2, 3, seed=0)
    assert score(sets, [ABSENT], spread).missing == score(sets, [ABSENT], settings).missing


class Counted:
    """A prompt of nine small pictures that exist only while they are measured."""

    alive = most = 0

    no_text = ""

    def __init__(self, number):
        self.id = self.text = str(number)

    @staticmethod
    def let_go():
        Counted.alive -= 1

    def __len__(self):
        return 9

    def load(self):
        images = [Image.new("RGB", (4, 4), (int(self.id) % 251, 20 * seed, 77)) for seed in range(9)]
        for image in images:
            weakref.finalize(image, Counted.let_go)
        Counted.alive += len(images)
        Counted.most = max(Counted.most, Counted.alive)
        return Loaded([f"{self.id}_{seed}" for seed in range(9)], images, [])


def test_ten_thousand_prompts_of_nine_pictures_are_scored_in_bounded_memory(settings, monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.metrics.compare.LARGEST", 500)
    sets = [Counted(number) for number in range(10_000)]
    scores = score(sets, [QUALITY, DIVERSITY], settings)
    for name in ("quality.bright.score", "diversity.corners.vendi"):
        assert scores.figures[name]["n"]["pictures"] == 90_000
    assert Counted.most <= 18  # of one prompt, and of the one before until it is let go
    found = score(sets, [MOMENTS, FEATURES], settings, Reference(sets[:500]))
    assert found.figures["distribution.dino_v2.precision"]["n"]["compared"] == 500
    fid, kid = (found.figures[f"distribution.inception.{name}"] for name in ("fid", "kid"))
    assert fid["low"] is None and kid["low"] < kid["high"]  # KID is of the kept alone, FID of all
    assert Counted.most <= 18


def test_the_gap_is_recovered_by_what_lies_between(settings):
    teacher = make_sets(8, 4, seed=0)
    dmd = [TensorSet(one.id, one.text, one.images[[0, 0, 0, 1]]) for one in teacher]
    ours = [TensorSet(one.id, one.text, one.images[[0, 0, 1, 2]]) for one in teacher]
    reference = Reference(teacher)
    scores = [score(some, [DIVERSITY, QUALITY], settings, reference) for some in (teacher, dmd, ours)]
    gaps = gaps_recovered(*scores, seed=0)
    assert set(gaps) == {f"diversity.corners.{name}" for name in ("one_minus_cosine", "vendi", "duplicate_rate")}
    for gap in gaps.values():
        assert 0 < gap["value"] < 1 and gap["prompts"] == 8 and gap["preset"] == "corner pixels"
    assert gaps["diversity.corners.vendi"]["low"] < gaps["diversity.corners.vendi"]["high"]
    assert "diversity.corners.vendi: 0." in as_gap_table(gaps)
    assert gaps_recovered(scores[0], scores[1], scores[0], seed=0)["diversity.corners.vendi"]["value"] == 1


@pytest.mark.parametrize(
    ("teacher", "dmd", "told"),
    [
        ([2.0, 2.0], [1.0, 1.0], "0.5  0.5 to 0.5  (prompts: 2)"),
        ([2.0, 1.0], [1.0, 1.9], "no interval: the baseline's loss cannot be told from chance  (prompts: 2)"),
        ([2.0], [1.0], "0.5  no interval: one prompt gives none  (prompts: 1)"),
        ([1.0, 1.0], [2.0, 2.0], "the baseline lost nothing  (prompts: 2)"),
    ],
)
def test_a_share_without_an_interval_says_why(teacher, dmd, told):
    ours = torch.full((len(dmd),), 1.5)
    gap = gap_figure(torch.tensor(teacher), torch.tensor(dmd), ours, seed=0) | {"prompts": len(dmd)}
    assert as_gap_table({"diversity.corners.vendi": gap}).endswith(told)


def test_a_gap_that_depends_on_the_number_of_pictures_leaves_out_prompts_where_it_differs(settings):
    teacher = make_sets(4, 5, seed=0)
    dmd = [TensorSet(one.id, one.text, one.images[[0, 0, 0, 1, 1]]) for one in teacher]
    ours = [TensorSet(one.id, one.text, one.images[[0, 0, 1, 2, 2]]) for one in teacher]
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)  # found, but not usable
    ours[0] = TensorSet("p0", "prompt 0", torch.cat([ours[0].images[:4], white]))

    def compare(sets):
        reference = Reference(teacher)
        scores = [score(some, [DIVERSITY], settings, reference) for some in (teacher, dmd, sets)]
        return gaps_recovered(*scores, seed=0), gap_notes(*scores)

    gaps, notes = compare(ours)
    prompts = {name.rsplit(".", 1)[1]: gap["prompts"] for name, gap in gaps.items()}
    assert prompts == {"one_minus_cosine": 4, "vendi": 3, "duplicate_rate": 3}
    (note,) = notes
    assert note.startswith("diversity.corners.vendi, diversity.corners.duplicate_rate: 1 of 4 prompts are left out")
    assert note in as_gap_table(gaps, notes)
    fewer = [TensorSet(one.id, one.text, one.images[:4]) for one in ours]
    gaps, notes = compare(fewer)
    assert list(gaps) == ["diversity.corners.one_minus_cosine"]
    assert "4 of 4 prompts are left out" in notes[0]


def test_no_gap_where_nothing_was_measured_in_all_three_is_said(settings):
    teacher, others = make_sets(3, 4, seed=0), make_sets(3, 4, seed=1)
    lost = [TensorSet(f"q{one.id}", one.text, one.images) for one in others]
    scores = [score(some, [DIVERSITY], settings) for some in (teacher, others, lost)]
    gaps, notes = gaps_recovered(*scores, seed=0), gap_notes(*scores)
    assert gaps == {} and "no gap: no prompt was measured in all three" in notes[0]
    assert "none: no diversity was measured in all three" in as_gap_table(gaps, notes)


def test_pixel_distance_is_that_of_the_embedded_world_s_metric():
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    images = TensorSet("p", "p", pixels).load().images
    found = pixel_distances(images).mean().item()
    assert math.isclose(found, pairwise_distance(pixels / 255), rel_tol=1e-6)


def test_pixel_distances_are_exact_and_in_the_order_of_their_pairs(monkeypatch):
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    images = TensorSet("p", "p", pixels).load().images
    flat, whole = pixels.flatten(1).long(), pixel_distances(images)
    pairs = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    sums = torch.tensor([(flat[i] - flat[j]).square().sum() for i, j in pairs]).double()
    assert torch.equal(whole, (sums / flat.shape[1]).sqrt() / 255)
    monkeypatch.setattr("dpdmd_pipeline.metrics.measures._BLOCK", 7)
    assert torch.equal(pixel_distances(images), whole)


@pytest.mark.parametrize(
    ("distances", "value", "unusable"),
    [
        ([0.5, math.nan, math.nan, 0.1, 0.2, math.nan], 0.8 / 3, (2,)),  # all pairs of picture 2
        ([0.5, 0.3, math.nan, 0.1, 0.2, 0.7], 0.1, (1, 2)),  # one pair: who is to blame is not known
        ([math.nan] * 6, None, (0, 1, 2, 3)),
    ],
)
def test_pictures_without_finite_distances_are_left_out_with_their_numbers(distances, value, unusable):
    measure = PairDiversity("d", lambda images: torch.tensor(distances))  # (1, 0), (2, 0), (2, 1), (3, 0), ...
    found = measure("", [None] * 4)
    assert found.unusable == unusable
    assert found.values == {} if value is None else math.isclose(found.values["d"], value, rel_tol=1e-6)
