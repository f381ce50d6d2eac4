"""The presets on tiny models of the real classes, from the folder of weights to the table."""

import shutil

import torch

from dpdmd_pipeline.metrics import weights as w
from dpdmd_pipeline.metrics.pictures import TensorSet
from dpdmd_pipeline.metrics.presets import Settings, choose
from dpdmd_pipeline.metrics.score import Reference, score
from dpdmd_pipeline.metrics.table import as_table

WITH_WEIGHTS = (
    "diversity.pixels,diversity.dino_v2,diversity.dino_v2_patch,diversity.dino_v3,diversity.dino_v3_patch,"
    "diversity.clip,diversity.clip_raw_cls,diversity.lpips_squeeze,alignment.clip_score,alignment.vqa_score,"
    "alignment.geneval_vqa,preference.pickscore,distribution.dino_v2"
)


def test_all_presets_with_weights_give_figures_and_the_others_say_what_they_lack(tmp_path, passes, request):
    from torchvision.models import squeezenet1_1

    for name, needed in (
        ("dino_v2", w.DINO_V2),
        ("dino_v3", w.DINO_V3),
        ("open_clip_folder", w.CLIP_L),
        ("clip_hf", w.CLIP_L_HF),
        ("clip_hf", w.PICKSCORE),
        ("vision_language", w.QWEN_VL),
    ):
        shutil.copytree(request.getfixturevalue(name), tmp_path / needed.folder)
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
    assert all("fetch with: " in reason for reason in scores.missing.values())
    assert not scores.faults
    for name, figure in scores.figures.items():
        assert figure["value"] is not None and figure["preset"], name
    pooled, patches = (scores.figures[f"diversity.{name}.vendi"]["value"] for name in ("dino_v2", "dino_v2_patch"))
    assert 1 < pooled < 3 and 1 < patches < 3 and pooled != patches
    assert scores.figures["diversity.dino_v2.duplicate_rate"]["value"] is not None
    assert "hf download xswu/HPSv2" in as_table(scores)
