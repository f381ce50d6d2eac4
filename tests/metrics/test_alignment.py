from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from tests.metrics.conftest import TINY_OPEN_CLIP
from tests.raising import refuses

from dpdmd_pipeline.metrics.alignment import PickScore, clip_score, hps_score, unknown_words
from dpdmd_pipeline.shapes.world import NUM_PROMPTS, caption

SHIPPED_CLIP = Path(__file__).parents[2] / "data/06_models/shapes_clip"


def test_the_clip_score_is_a_hundred_cosines_and_never_below_zero(open_clip_folder, photos, passes):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")
    cosines = []
    for text in ("a red circle", "two dogs", "9 7", "sky", "on a mat the cat sat and slept", "!?"):
        with torch.no_grad():
            image = model.eval().encode_image(torch.stack([preprocess(photo) for photo in photos]))
            cosines.append(F.cosine_similarity(image, model.encode_text(tokenizer([text]))))
        scores = clip_score(open_clip_folder, passes)(text, photos)
        torch.testing.assert_close(scores, 100 * cosines[-1].clamp(min=0), rtol=1e-4, atol=1e-4)
    assert (torch.cat(cosines) < 0).any()


def test_hps_is_a_plain_cosine_of_the_padded_picture(open_clip_folder, photos, passes, tmp_path, monkeypatch):
    # open_clip's own table of architectures, with a small one added
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-h", TINY_OPEN_CLIP)
    state = open_clip.create_model(f"local-dir:{open_clip_folder}").state_dict()
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS.pt")
    score = hps_score("tiny-h", tmp_path / "HPS.pt", passes)
    wide = photos[0].resize((96, 48))
    pixels = score.embed.preprocess(wide)
    assert pixels.shape == (3, 32, 32)
    black = (0 - torch.tensor(open_clip.OPENAI_DATASET_MEAN)) / torch.tensor(open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(pixels[:, :8], black[:, None, None].expand(3, 8, 32))  # nothing is cropped
    with torch.no_grad():
        image, text = score.model.encode_image(pixels[None]), score.model.encode_text(score.tokenizer(["a dog"]))
    torch.testing.assert_close(score("a dog", [wide]), F.cosine_similarity(image, text))


def test_pickscore_is_the_logit_that_clip_gives(clip_hf, photos, passes):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_hf).eval(), CLIPProcessor.from_pretrained(clip_hf)
    with torch.no_grad():
        logits = model(**processor(text=["a red circle"], images=photos, return_tensors="pt")).logits_per_image[:, 0]
    torch.testing.assert_close(PickScore(clip_hf, passes)("a red circle", photos), logits, rtol=1e-4, atol=1e-5)


def test_an_absent_hps_file_is_an_error_not_a_random_model(passes, tmp_path):
    with refuses((ValueError, OSError), "HPS.pt"):
        hps_score("ViT-B-32", tmp_path / "HPS.pt", passes)


def test_a_text_counts_as_cut_if_the_encoder_reads_only_a_part(open_clip_folder, clip_hf, passes):
    for score, word in ((clip_score(open_clip_folder, passes), "cat "), (PickScore(clip_hf, passes), "a ")):
        assert [score.cut_at(word * count) for count in (1, 75, 76, 200)] == [None, None, 77, 77]
    shipped = clip_score(SHIPPED_CLIP, passes)
    assert [shipped.cut_at("red " * count) for count in (1, 15, 16, 40)] == [None, None, 16, 16]


def test_only_words_that_a_tokenizer_does_not_know_are_listed(open_clip_folder, passes):
    shipped = clip_score(SHIPPED_CLIP, passes).tokenizer
    assert unknown_words(shipped, "A red circle") == [] and unknown_words(shipped, "a Dog, red") == ["Dog", ","]
    assert unknown_words(clip_score(open_clip_folder, passes).tokenizer, "a dög, 犬") == []
    assert not any(unknown_words(shipped, caption(number)) for number in range(NUM_PROMPTS))
