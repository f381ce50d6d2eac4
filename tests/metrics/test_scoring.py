"""Every path of `score`, with embedders of which the answer is known."""

import json
import math
import weakref
from functools import partial

import pytest
import torch
from PIL import Image

from dpdmd_pipeline.metrics.diversity import one_minus_cosine, vendi_score
from dpdmd_pipeline.metrics.measures import PairDiversity, PictureScores, SetDiversity, SetFeatures, pixel_distances
from dpdmd_pipeline.metrics.pictures import FileSet, Loaded, TensorSet
from dpdmd_pipeline.metrics.pixels import pairwise_distance
from dpdmd_pipeline.metrics.presets import Preset, Settings
from dpdmd_pipeline.metrics.score import Reference, Scores, gaps_recovered, score, workers
from dpdmd_pipeline.metrics.table import as_gap_table, as_record, as_table
from dpdmd_pipeline.metrics.weights import DINO_V2


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
    assert any("unequal numbers of pictures" in note for note in scores.notes)
    table = as_table(scores)
    assert "2 x prompt with fewer than 2 usable pictures: alone, nothing" in table and "2 of 4" in table
    assert json.loads(json.dumps(as_record(scores), allow_nan=False))["faults"]["empty file"]["count"] == 1


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
    scores = score(make_sets(3, 4, seed=0), [DIVERSITY], settings, reference)
    assert scores.faults["empty file"] == [str(tmp_path / "gone.png")]


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
    fewer = score(make_sets(30, 3, seed=0), [DIVERSITY], settings, teacher)
    assert "diversity.corners.duplicate_rate" not in fewer.figures
    assert any("the reference has 4 pictures a prompt, not 3" in note for note in fewer.notes)


def test_a_cosine_of_one_s_own_counts_near_duplicates_without_a_reference(settings):
    always = Settings(settings.weights, settings.passes, 1, 0, duplicates_above=-1.0)
    scores = score(make_sets(2, 3, seed=0), [DIVERSITY], always)
    assert scores.figures["diversity.corners.duplicate_rate"]["value"] == 1


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
    assert near["distribution.inception.kid"]["n"]["subset"] == 180
    for name in ("recall", "coverage"):
        figures = near[f"distribution.dino_v2.{name}"], far[f"distribution.dino_v2.{name}"]
        assert figures[0]["low"] > figures[1]["high"]
        assert figures[0]["n"] == {"prompts": 30, "pictures": 180, "reference_pictures": 180, "compared": 180}


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
    scores = score(sets, [QUALITY], settings)
    assert scores.figures["quality.bright.score"]["n"]["pictures"] == 90_000
    assert Counted.most <= 18  # of one prompt, and of the one before until it is let go
    found = score(sets[:500], [MOMENTS, FEATURES], settings, Reference(sets[:500]))
    assert found.figures["distribution.dino_v2.precision"]["n"]["compared"] == 500
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
        assert 0 < gap["value"] < 1 and gap["prompts"] == 8
    assert gaps["diversity.corners.vendi"]["low"] < gaps["diversity.corners.vendi"]["high"]
    assert "diversity.corners.vendi: 0." in as_gap_table(gaps)
    assert gaps_recovered(scores[0], scores[1], scores[0], seed=0)["diversity.corners.vendi"]["value"] == 1


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
