"""Scores of drawn pictures: any metric, each cached by itself, and no number without a measurement."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.commands.cli import arena
from tests.commands.cli import score as score_command
from tests.pipelines.conftest import cached
from tests.pipelines.conftest import evaluate_options as evaluate_options_of
from tests.raising import refuses
from torchvision.transforms.functional import pil_to_tensor

from dpdmd_pipeline.datasets.picture_folder import PictureFolderDataset
from dpdmd_pipeline.datasets.sharded import LazyShards
from dpdmd_pipeline.metrics.diversity import pairwise_distance
from dpdmd_pipeline.metrics.shapes import judge
from dpdmd_pipeline.pipelines.evaluate import scoring
from dpdmd_pipeline.pipelines.evaluate.nodes import (
    draw_grids,
    lay_out_pictures,
    make_metrics,
    make_summary,
    score_images,
    warn_about_missing_weights,
)
from dpdmd_pipeline.scoring.folders import find_pictures
from dpdmd_pipeline.scoring.published import CLIP_SHAPES
from dpdmd_pipeline.shapes.world import NUM_MODES, NUM_PROMPTS, caption, gallery

SHIPPED = Path(__file__).parents[3] / "data/06_models/shapes_clip"
CHOSEN = {row: caption(row) for row in range(3)}
TEXTS = list(CHOSEN.values())
CLIP = ["diversity.clip_shapes", "alignment.clip_shapes"]
PER_PROMPT = 6
HASHES = {name: f"{number:064x}"[::-1] for number, name in enumerate(("teacher", "dmd", "dp_dmd"), 1)}


def evaluate_options(**changes):
    return evaluate_options_of(**{"images_per_prompt": PER_PROMPT, **changes})


def pictures_of(model: int) -> torch.Tensor:
    """Slightly noisy pictures of 72, 2 or 24 modes, uint8 [prompts, n, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(model)
    world = gallery().view(NUM_PROMPTS, NUM_MODES, 3, 32, 32)[: len(CHOSEN)]
    modes = torch.randint((72, 2, 24)[model], (len(CHOSEN), PER_PROMPT), generator=generator)
    clean = torch.stack([world[prompt, modes[prompt]] for prompt in range(len(CHOSEN))])
    return ((clean + 0.02 * torch.randn(clean.shape, generator=generator)).clamp(0, 1) * 255).round().to(torch.uint8)


def shard(model: int, prompts: list[int]) -> dict[str, torch.Tensor]:
    count = len(prompts) * PER_PROMPT
    return {
        "model": torch.full((count,), model),
        "prompt": torch.tensor(prompts).repeat_interleave(PER_PROMPT),
        "seed": torch.arange(count),
        "image": pictures_of(model)[prompts].flatten(0, 1),
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The cache of the catalog, with one shard per model."""
    return drawn(tmp_path_factory.mktemp("drawn"), [(model, [0, 1, 2]) for model in range(3)])


def drawn(folder, contents, fingerprint="of the tests"):
    """Cache with one shard per (model, prompts)."""
    shards = {f"{number:05d}": lambda content=content: shard(*content) for number, content in enumerate(contents)}
    manifest = {"nfe": {"teacher": 60, "dmd": 4, "dp_dmd": 4}, "models": HASHES}
    return cached(folder / "images", LazyShards(shards, fingerprint, manifest))


@pytest.fixture
def score(images, tmp_path):
    def score_with(images=images, state="state", clip=SHIPPED, **changes):
        folders = [tmp_path / name for name in (state, "weights")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return score_images(images, CHOSEN, *folders, clip, evaluate_options(**changes))

    return score_with


def files(tmp_path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "state").glob("*.json")}


# ---- figures


def test_the_exact_figures_are_those_of_the_reader_s_own_function(score, images):
    metrics = make_metrics(images, score(), evaluate_options())
    for number, name in enumerate(("teacher", "dmd", "dp_dmd")):
        pictures = pictures_of(number) / 255
        expected = judge(list(pictures), TEXTS, seed=0)
        assert metrics[name]["quality"] == expected["quality"]
        distance = expected["diversity"].pop("pairwise_distance")
        diversity = dict(metrics[name]["diversity"])
        assert diversity.pop("pairwise_distance") == pytest.approx(distance, rel=1e-6)
        assert diversity == expected["diversity"]
        assert metrics[name]["n"] == {"prompts": 3, "per_prompt": PER_PROMPT}
        assert metrics[name]["nfe"] == images.manifest["nfe"][name]
        assert not metrics[name]["figures"] and not metrics[name]["missing"]


def test_a_started_student_is_scored_like_the_others_and_recovers_no_gap(tmp_path, score, images):
    manifest = {"nfe": {**images.manifest["nfe"], "dmd_start": 9}, "models": {**HASHES, "dmd_start": HASHES["dmd"]}}
    shards = {
        f"{number}": lambda n=number: {**shard(n % 3, [0, 1, 2]), "model": torch.full((18,), n)} for number in range(4)
    }
    four = cached(tmp_path / "four", LazyShards(shards, "four", manifest))
    three, metrics = (make_metrics(drawn, score(drawn), evaluate_options()) for drawn in (images, four))
    started = metrics.pop("dmd_start")
    assert metrics == three and "gap_recovered" not in started
    assert started == {**three["teacher"], "nfe": 9, "model": three["dmd"]["model"]}  # made of the teacher's pictures
    assert make_summary({**metrics, "dmd_start": started}) == make_summary(three)


def test_the_metrics_hold_the_hash_of_each_model(score, images):
    metrics = make_metrics(images, score(), evaluate_options())
    assert all(metrics[name]["model"] and HASHES[name].startswith(metrics[name]["model"]) for name in HASHES)
    assert len({metrics[name]["model"] for name in HASHES}) == 3


def test_every_gap_has_an_interval_its_prompts_and_its_protocol(score, images):
    scores = score(by=CLIP)
    ours = make_metrics(images, scores, evaluate_options(by=CLIP))["dp_dmd"]
    assert ours["gap_recovered"].keys() == ours["diversity"].keys()
    assert ours["gap_recovered"]["effective_modes"] == scores["gaps"]["diversity.shapes.effective_modes"]
    assert ours["gaps"].keys() == {name for name in ours["figures"] if name.startswith("diversity.")}
    for gap in (*ours["gap_recovered"].values(), *ours["gaps"].values()):
        assert gap["prompts"] == 3 and gap["preset"]
        assert gap["value"] is None or gap["low"] is None or gap["low"] <= gap["value"] <= gap["high"]


def test_each_model_has_the_presets_of_the_exact_figures_once(score, images):
    metrics = make_metrics(images, score(), evaluate_options())
    protocols = {preset.full_name: preset.protocol for preset in scoring.requested_presets(evaluate_options())}
    assert protocols.keys() == {"quality.shapes", "diversity.shapes", "diversity.pixels"}
    assert all(metrics[name]["exact_presets"] == protocols for name in ("teacher", "dmd", "dp_dmd"))


def test_another_metric_has_its_full_name_count_interval_and_protocol(score, images):
    scores = score(by=CLIP)
    metrics = make_metrics(images, scores, evaluate_options(by=CLIP))
    names = {f"diversity.clip_shapes.{name}" for name in ("one_minus_cosine", "vendi", "duplicate_rate")}
    names |= {"alignment.clip_shapes.score"}
    for of_model in (metrics[name] for name in ("teacher", "dmd", "dp_dmd")):
        assert set(of_model["figures"]) == names
        for figure in of_model["figures"].values():
            assert figure["low"] <= figure["value"] <= figure["high"] and "open_clip" in figure["preset"]
            assert figure["n"] == {"prompts": 3, "pictures": 18, "prompts_not_measured": 0}
    vendi = [metrics[name]["figures"]["diversity.clip_shapes.vendi"]["value"] for name in ("dmd", "dp_dmd", "teacher")]
    assert vendi[0] < vendi[1] < vendi[2]
    assert metrics["teacher"]["figures"]["alignment.clip_shapes.score"]["value"] > 50
    digest = CLIP_SHAPES.digest(SHIPPED)
    assert metrics["dmd"]["weights"] == {name: {"shapes_clip": digest} for name in CLIP} and len(digest) == 64
    assert 0 < metrics["dp_dmd"]["gaps"]["diversity.clip_shapes.vendi"]["value"] < 1
    assert metrics["rank_correlation"]["diversity.clip_shapes.vendi"]["value"] > 0.5
    assert metrics["rank_correlation"]["diversity.clip_shapes.vendi"]["n"] == {"prompts": 3, "models": 3}
    json.dumps(metrics, allow_nan=False)


def test_the_summary_holds_the_main_numbers_of_the_metrics(score, images):
    metrics = make_metrics(images, score(by=CLIP), evaluate_options(by=CLIP))
    summary = make_summary(metrics)
    for name in ("teacher", "dmd", "dp_dmd"):
        numbers = dict(summary[name])
        assert numbers.pop("aligned") == metrics[name]["quality"]["aligned"]["value"]
        assert numbers.pop("modes") == metrics[name]["diversity"]["effective_modes"]["value"]
        assert numbers.pop("evaluations") == metrics[name]["nfe"]
        assert list(numbers) == (["gap"] if name == "dp_dmd" else [])
    assert summary["dp_dmd"]["gap"] == metrics["dp_dmd"]["gap_recovered"]["effective_modes"]["value"]
    assert all(type(value) in (int, float) for numbers in summary.values() for value in numbers.values())


def test_without_the_reader_the_summary_holds_the_first_diversity_that_all_models_have(score, images):
    by = ["diversity.pixels", *CLIP]
    metrics = make_metrics(images, score(judge=None, by=by), evaluate_options(judge=None, by=by))
    summary = make_summary(metrics)
    name = "diversity.clip_shapes.one_minus_cosine"
    assert {model: list(numbers) for model, numbers in summary.items()} == {
        "teacher": [name, "evaluations"], "dmd": [name, "evaluations"], "dp_dmd": [name, "evaluations", "gap"]
    }  # fmt: skip
    assert summary["dmd"][name] == metrics["dmd"]["figures"][name]["value"]
    assert summary["dp_dmd"]["gap"] == metrics["dp_dmd"]["gaps"][name]["value"]
    for model in ("teacher", "dmd", "dp_dmd"):
        pixels = metrics[model]["figures"]["diversity.pixels.mean_distance"]
        metrics[model]["figures"] = {"diversity.pixels.mean_distance": pixels}
    metrics["dp_dmd"]["gaps"]["diversity.pixels.mean_distance"]["value"] = None
    assert list(make_summary(metrics)["dp_dmd"]) == ["diversity.pixels.mean_distance", "evaluations"]


def test_the_summary_of_nothing_measured_holds_the_evaluations_alone(score, images):
    by = ["preference.pickscore"]
    metrics = make_metrics(images, score(judge=None, by=by), evaluate_options(judge=None, by=by))
    assert make_summary(metrics) == {
        "teacher": {"evaluations": 60}, "dmd": {"evaluations": 4}, "dp_dmd": {"evaluations": 4}
    }  # fmt: skip


def test_scores_are_bit_identical_over_batch_sizes_processes_and_shards(score, tmp_path):
    expected = score(by=CLIP)
    assert score(state="processes", by=CLIP, metric_processes=2, metric_batch_size=7) == expected
    contents = [(model, [prompt]) for model in range(3) for prompt in range(3)]
    assert score(images=drawn(tmp_path, contents), state="shards", by=CLIP) == expected


def test_attributes_are_counted_over_the_correct_pictures_of_each_model(score):
    attributes = score()["attributes"]
    for of_model in attributes.values():
        assert {name: sum(counts.values()) for name, counts in of_model.items()} == dict.fromkeys(of_model, 18)
    # DMD's two modes differ in another attribute
    assert sum(count > 0 for count in attributes["dmd"]["position"].values()) == 1
    assert sum(count > 0 for count in attributes["teacher"]["position"].values()) > 4


def test_distributions_are_compared_with_the_teacher_s_which_has_no_score_itself(score):
    scores = score(judge=None, by=["distribution.inception"])
    assert not scores["models"]["teacher"]["missing"]
    assert set(scores["models"]["dmd"]["missing"]) == {"distribution.inception"}


# ---- the cache of scores


def test_another_metric_does_not_measure_the_others_again(score, tmp_path, caplog):
    caplog.set_level("INFO")
    score(by=CLIP[1:])
    before = files(tmp_path)
    caplog.clear()
    scores = score(by=CLIP)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.split("-")[0] for name in after.keys() - before.keys()} == {CLIP[0]}
    assert (
        sum("reused" in line for line in caplog.messages) == len(before)
        and sum("measured" in line for line in caplog.messages) == 3
    )
    assert scores == score(state="fresh", by=CLIP)


def test_features_serve_the_next_metric_and_those_of_other_pictures_are_deleted(score, tmp_path):
    (tmp_path / "state/features_of_before").mkdir(parents=True)
    score(by=CLIP[:1])
    (folder,) = (tmp_path / "state").glob("features_*")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    score(by=CLIP)  # another metric of the same network
    assert before and {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_student_s_near_duplicates_are_judged_by_the_cached_teacher(score, tmp_path):
    whole = score(by=CLIP)
    for path in (tmp_path / "state").glob("diversity.clip_shapes-d*"):
        path.unlink()
    assert score(by=CLIP) == whole


def test_other_pictures_weights_or_seeds_are_measured_anew(images, tmp_path):
    def path(pictures="a", clip=SHIPPED, **changes):
        settings = scoring.make_settings(tmp_path, clip, evaluate_options(**changes))
        return scoring.ScoreCache(tmp_path, pictures, settings).path("dmd", *scoring.choose(CLIP[0]))

    other = shutil.copytree(SHIPPED, tmp_path / "other")
    assert path(clip=other) == path()
    weights = other / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert len({path(), path(pictures="b"), path(clip=other), path(seed=1)}) == 4
    assert path(metric_batch_size=5, metric_processes=2, grid_columns=1, batch_size=1) == path()


def test_a_damaged_record_is_measured_again(score, tmp_path):
    whole = score()
    for path in (tmp_path / "state").iterdir():
        path.write_text(path.read_text()[:40])
    assert score() == whole


# ---- missing weights and wrong options


def test_missing_weights_are_reported_before_drawing_and_cost_no_other_metric(score, images, tmp_path, caplog):
    by = ["diversity", "preference.pickscore"]
    options = evaluate_options(judge=None, by=by)
    warn_about_missing_weights(tmp_path, SHIPPED, options)
    assert all(word in caplog.text for word in ("preference.pickscore", "yuvalkirstain/PickScore_v1", "hf download"))
    scores = score(judge=None, by=by)
    metrics = make_metrics(images, scores, options)
    for name in ("teacher", "dmd", "dp_dmd"):
        assert list(metrics[name]["figures"]) == ["diversity.pixels.mean_distance"]
        assert set(metrics[name]["missing"]) == {
            "diversity.dino_v2",
            "diversity.dino_v2_patch",
            "diversity.clip",
            "diversity.lpips",
            "preference.pickscore",
        }
        assert not metrics[name]["quality"] and not metrics[name]["diversity"]
        assert not metrics[name]["exact_presets"]
    assert metrics["rank_correlation"] == {} and scores["attributes"] == {}
    assert {path.name.split("-")[0] for path in (tmp_path / "state").glob("*.json")} == {"diversity.pixels"}
    pixels = metrics["dmd"]["figures"]["diversity.pixels.mean_distance"]["value"]
    distances = [pairwise_distance(pictures / 255) for pictures in pictures_of(1)]
    assert pixels == pytest.approx(sum(distances) / 3, rel=1e-6)


def test_no_path_of_a_machine_is_written_into_the_metrics(score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reason = score(judge=None, by=["preference.pickscore"])["models"]["dmd"]["missing"]["preference.pickscore"]
    assert "weights/pickscore" in reason and str(tmp_path) not in reason


def test_an_unknown_metric_is_refused_before_drawing(tmp_path):
    with refuses(ValueError, "beauty"):
        warn_about_missing_weights(tmp_path, SHIPPED, evaluate_options(by=["beauty"]))


def test_options_that_measure_nothing_are_refused():
    with refuses(ValueError, "judge=null and by=[]"):
        evaluate_options(judge=None, by=[])


# ---- grids


def test_grids_have_the_requested_rows_columns_and_size(images):
    grids = draw_grids(images, CHOSEN, evaluate_options(grid_prompts=2, grid_columns=3, grid_tile=16))
    for grid in grids:
        scale = grid.width // (3 * 17)
        assert grid.size == (3 * 17 * scale, 2 * 17 * scale)


# ---- pictures


def saved(folder, images, **changes):
    dataset = PictureFolderDataset(filepath=str(folder / "pictures"))
    dataset.save(lay_out_pictures(images, CHOSEN, evaluate_options(**changes)))
    return dataset.load()


def test_score_reads_the_saved_pictures_with_their_prompts_counts_and_pixels(images, tmp_path):
    folder = saved(tmp_path, images, save_pictures=True)
    assert sorted(path.name for path in folder.iterdir()) == ["dmd", "dp_dmd", "teacher"]
    for number, name in enumerate(("teacher", "dmd", "dp_dmd")):
        sets, strays = find_pictures(folder / name)
        assert not strays and {one.text: len(one) for one in sets} == dict.fromkeys(TEXTS, PER_PROMPT)
        for one in sets:
            pixels = torch.stack([pil_to_tensor(image) for image in one.load().images])
            assert torch.equal(pixels, pictures_of(number)[TEXTS.index(one.text)])


def test_saved_pictures_give_the_same_figures_and_an_arena(score, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(SHIPPED.parents[2])  # where the command looks for the CLIP
    expected = score(by=CLIP[1:])["models"]["dmd"]["figures"]
    folder = saved(tmp_path, images, save_pictures=True)
    command = [str(folder / "dmd"), "--by", "quality.shapes,alignment.clip_shapes", "--json", str(tmp_path / "x.json")]
    score_command([*command, "--weights", str(tmp_path)])
    figures = json.loads((tmp_path / "x.json").read_text())["figures"]
    assert figures and all(
        figure["value"] == pytest.approx(expected[name]["value"]) for name, figure in figures.items()
    )
    arena([str(folder / "dmd"), str(folder / "dp_dmd"), "--out", str(tmp_path / "arena.html")])
    shown = capsys.readouterr().out
    assert "9 questions" in shown and "3 prompts" in shown


def test_pictures_are_saved_only_on_request(images, tmp_path):
    assert [path.name for path in saved(tmp_path, images).iterdir()] == ["empty.txt"]
