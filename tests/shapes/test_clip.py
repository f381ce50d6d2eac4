import open_clip
import torch

from dpdmd_pipeline.shapes.clip import CONTEXT_LENGTH, full_captions, make_clip, make_word_tokenizer, save_clip
from dpdmd_pipeline.shapes.world import LEGAL, captions, gallery


def test_every_legal_picture_has_its_own_caption():
    texts = full_captions()
    assert len(set(texts)) == len(LEGAL)
    assert texts[0] == "a small red circle at the top left on black"


def test_the_tokenizer_has_every_word_and_ends_at_the_highest_id():
    tokenizer = make_word_tokenizer()
    ids = tokenizer([*captions(), *full_captions()], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape[1] == CONTEXT_LENGTH
    assert not (ids == tokenizer.unk_token_id).any()
    assert (ids.amax(1) == tokenizer.eos_token_id).all() and tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer("a red zebra").input_ids[2] == tokenizer.unk_token_id


def test_open_clip_loads_a_saved_clip_and_preprocesses_the_world_exactly(tmp_path):
    model = make_clip(tmp_path, seed=0).eval()
    save_clip(model, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3e6
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", require_pretrained=True)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(captions()[:3])
    from torchvision.transforms.functional import to_pil_image

    picture = (gallery()[5] * 255).round() / 255
    torch.testing.assert_close(preprocess(to_pil_image(picture)), picture * 2 - 1, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(loaded.eval().encode_image(gallery()[:2]), model.encode_image(gallery()[:2]))
        assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))


def test_the_seed_determines_the_initial_weights(tmp_path):
    one, two, other = (make_clip(tmp_path, seed).visual.proj for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
