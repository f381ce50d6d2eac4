"""The presets on tiny models of the real classes, from the folder of weights to the table."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from dpdmd_pipeline.metrics.measures import NO_ANSWER
from dpdmd_pipeline.scoring import published as w
from dpdmd_pipeline.scoring.preset import AXES, Settings
from dpdmd_pipeline.scoring.presets import PRESETS, choose
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference
from dpdmd_pipeline.scoring.sets import TensorSet
from dpdmd_pipeline.scoring.table import as_table

WITH_WEIGHTS = (
    "diversity.pixels,diversity.dino_v2,diversity.dino_v2_patch,diversity.dino_v3,diversity.dino_v3_patch,"
    "diversity.clip,diversity.clip_raw_cls,diversity.lpips_squeeze,alignment.clip_score,alignment.vqa_score,"
    "alignment.geneval_vqa,preference.pickscore,distribution.dino_v2"
)

TESTS = Path(__file__).parents[1]
DOCUMENTED = TESTS.parent / "docs/metrics.md"
SHIPPED_CLIP = TESTS.parent / "data/06_models/shapes_clip"
SET = TensorSet("p", "a dog", torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8))


def test_all_presets_with_weights_give_figures_and_the_others_name_the_missing_ones(tmp_path, passes, request):
    from torchvision.models import squeezenet1_1

    for name, weights in (
        ("dino_v2", w.DINO_V2),
        ("dino_v3", w.DINO_V3),
        ("open_clip_folder", w.CLIP_L),
        ("clip_hf", w.CLIP_L_HF),
        ("clip_hf", w.PICKSCORE),
        ("vision_language", w.QWEN_VL),
    ):
        shutil.copytree(request.getfixturevalue(name), tmp_path / weights.folder)
    (tmp_path / w.HUB).mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), tmp_path / w.HUB / str(w.SQUEEZENET.files[0]))

    pixels = torch.randint(256, (2, 3, 3, 40, 40), dtype=torch.uint8)
    sets = [TensorSet(str(number), text, pixels[number]) for number, text in enumerate(("a red cat", "two dogs"))]
    parts = {text: {"include": [{"class": "cat", "count": 1}]} for text in ("a red cat", "two dogs")}
    settings = Settings(tmp_path, passes, processes=1, seed=0, parts=parts)
    lacking = choose("diversity.lpips,preference.hps_v2_1,quality,distribution.inception,quality.visualquality_r1")
    scores = score(sets, [*choose(WITH_WEIGHTS), *lacking], settings, Reference(sets))

    measured = {name.rsplit(".", 1)[0] for name in scores.figures}
    assert measured == set(WITH_WEIGHTS.split(","))
    assert set(scores.missing) == {preset.full_name for preset in lacking}
    assert all("hf download" in reason or "curl" in reason for reason in scores.missing.values())
    assert not scores.faults
    for name, figure in scores.figures.items():
        assert figure["value"] is not None and figure["preset"], name
    pooled, patches = (scores.figures[f"diversity.{name}.vendi"]["value"] for name in ("dino_v2", "dino_v2_patch"))
    assert 1 < pooled < 3 and 1 < patches < 3 and pooled != patches
    assert scores.figures["diversity.dino_v2.duplicate_rate"]["value"] is not None
    assert "hf download xswu/HPSv2" in as_table(scores)


@pytest.mark.parametrize(
    ("name", "content", "processes"),
    [
        ("model.safetensors", None, 1),  # truncated
        ("model.safetensors", None, 2),
        ("model.safetensors", b"<html>404</html>", 1),
        ("config.json", b'{"model_type": ', 1),
        ("preprocessor_config.json", b"\xff\xfe", 1),
    ],
)
def test_a_damaged_file_of_weights_is_named_and_costs_its_metric_only(
    tmp_path, passes, dino_v2, name, content, processes
):
    file = shutil.copytree(dino_v2, tmp_path / w.DINO_V2.folder) / name
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    settings = Settings(tmp_path, passes, processes, seed=0)
    scores = score([SET], choose("diversity.dino_v2,diversity.pixels"), settings)
    reason = scores.missing["diversity.dino_v2"]
    assert reason.startswith(f"{file} ") and "\n" not in reason and "hf download facebook/dinov2-base" in reason
    assert list(scores.figures) == ["diversity.pixels.mean_distance"]


def test_weights_of_another_model_cost_their_metric_only(tmp_path, passes, open_clip_folder):
    folder = shutil.copytree(open_clip_folder, tmp_path / w.CLIP_L.folder)
    (folder / "open_clip_config.json").write_text('{"model_cfg": {}}')
    scores = score([SET], choose("diversity.clip,diversity.pixels"), Settings(tmp_path, passes, 1, seed=0))
    assert list(scores.missing) == ["diversity.clip"] and list(scores.figures) == ["diversity.pixels.mean_distance"]


def test_a_model_whose_answers_do_not_parse_is_missing(tmp_path, passes, vision_language, monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.metrics.questions._RATING_TOKENS", 4)
    shutil.copytree(vision_language, tmp_path / w.VISUALQUALITY_R1.folder)
    scores = score([SET], choose("quality.visualquality_r1"), Settings(tmp_path, passes, 1, seed=0))
    assert "3 of 3" in scores.missing["quality.visualquality_r1"]
    assert len(scores.faults[f"{NO_ANSWER} (quality.visualquality_r1)"]) == 3


@pytest.mark.parametrize(
    ("text", "side", "facts"),
    [("a red dog", 32, r"'a red dog' \(dog\)"), ("a red circle", 40, "40 x 40.*32 x 32")],
)
def test_the_embedded_world_s_clip_judges_no_other_world(tmp_path, passes, text, side, facts):
    settings = Settings(tmp_path, passes, 1, seed=0, elsewhere={w.CLIP_SHAPES.folder: SHIPPED_CLIP})
    sets = [TensorSet("p", text, torch.randint(256, (3, 3, side, side), dtype=torch.uint8))]
    scores = score(sets, choose("alignment.clip_shapes,diversity.clip_shapes,diversity.pixels"), settings)
    assert re.search(facts, scores.missing["alignment.clip_shapes"])
    assert ("diversity.clip_shapes" in scores.missing) == (side != 32)
    assert "diversity.pixels.mean_distance" in scores.figures


def test_the_docs_list_every_metric_with_existing_tests():
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in DOCUMENTED.read_text().splitlines()]
    tests_of = {row[0]: row[2] for row in rows if len(row) == 3 and row[0].split(".")[0] in AXES}
    assert list(tests_of) == [preset.full_name for preset in PRESETS]
    for name, cell in tests_of.items():
        for file, test in re.findall(r"(\w+/\w+\.py)::(\w+)", cell):
            assert f"def {test}(" in (TESTS / file).read_text(), name
        assert cell.count("::") == len(re.findall(r"/\w+\.py::test_", cell)) > 0, name
