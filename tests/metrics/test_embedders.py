import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.raising import refuses

from dpdmd_pipeline.metrics.embedders import Inception, Lpips, OpenClipVision, TransformersVision
from dpdmd_pipeline.metrics.libraries import hub_folder
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.scoring.published import ALEXNET, SQUEEZENET


def hidden_states(kind, folder, photos):
    """Output of the library's own model, and the model."""
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**processor(images=photos, return_tensors="pt")), model


@pytest.mark.parametrize("family", ["dino_v2", "dino_v3"])
def test_dino_pooled_is_the_normalised_class_token(family, photos, passes, request):
    folder = request.getfixturevalue(family)
    features = TransformersVision(folder, "pooled", passes)(photos)
    expected = hidden_states("AutoModel", folder, photos)[0].last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(("family", "registers"), [("dino_v2", 0), ("dino_v3", 4)])
def test_the_cosine_of_patch_embeddings_is_the_mean_cosine_at_the_same_position(
    family, registers, photos, passes, request
):
    folder = request.getfixturevalue(family)
    features = TransformersVision(folder, "patches", passes)(photos)
    patches = hidden_states("AutoModel", folder, photos)[0].last_hidden_state[:, 1 + registers :]
    assert patches.shape[1] == 16
    expected = F.cosine_similarity(patches[0], patches[1], dim=-1).mean()
    torch.testing.assert_close(F.cosine_similarity(features[0], features[1], dim=0), expected)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))


def test_patches_notice_a_shifted_object_unlike_a_histogram(dino_v2, photos, passes):
    shifted = photos[0].transform(photos[0].size, 0, (1, 0, 7, 0, 1, 0))
    one, two = TransformersVision(dino_v2, "patches", passes)([photos[0], shifted])
    assert F.cosine_similarity(one, two, dim=0) < 0.999


def test_raw_clip_is_the_token_before_the_last_norm(clip_hf, photos, passes):
    features = TransformersVision(clip_hf, "raw_cls", passes)(photos)
    states, model = hidden_states("CLIPVisionModel", clip_hf, photos)
    torch.testing.assert_close(features, states.last_hidden_state[:, 0])
    assert not torch.allclose(features, states.pooler_output, atol=1e-3)


def test_open_clip_is_its_projected_embedding(open_clip_folder, photos, passes):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    model.eval()
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(photo) for photo in photos]))
    torch.testing.assert_close(OpenClipVision.of(open_clip_folder, passes)(photos), expected)


@pytest.mark.parametrize("family", ["dino_v2", "open_clip_folder"])
def test_features_are_bit_identical_for_any_batch_size(family, photos, request):
    folder = request.getfixturevalue(family)

    def embed(batch_size, pictures):
        passes = Passes("cpu", batch_size)
        embedder = (
            OpenClipVision.of(folder, passes) if "clip" in family else TransformersVision(folder, "pooled", passes)
        )
        return embedder(pictures)

    whole = embed(5, photos)
    assert torch.equal(embed(1, photos), whole)
    assert torch.equal(torch.cat([embed(2, photos[:3]), embed(4, photos[3:])]), whole)
    assert torch.equal(embed(3, photos[::-1]).flip(0), whole)


def test_a_file_without_some_of_the_weights_is_refused(dino_v2, tmp_path, passes):
    folder = shutil.copytree(dino_v2, tmp_path / "damaged")
    state = load_file(folder / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"\b1\b.*Dinov2Model.*layernorm.weight"):
        TransformersVision(folder, "pooled", passes)


def test_an_open_clip_folder_without_weights_is_refused(open_clip_folder, tmp_path, passes):
    (tmp_path / "open_clip_config.json").write_text((open_clip_folder / "open_clip_config.json").read_text())
    with refuses((ValueError, OSError), str(tmp_path)):
        OpenClipVision.of(tmp_path, passes)


def test_an_open_clip_file_that_does_not_fit_is_refused(open_clip_folder, tmp_path, passes):
    folder = shutil.copytree(open_clip_folder, tmp_path / "other")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 8
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with refuses(ValueError, str(folder)):
        OpenClipVision.of(folder, passes)


def test_inception_is_torch_fidelity_s(tmp_path, photos, passes):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchvision.transforms.functional import pil_to_tensor

    file = tmp_path / "inception.pth"
    torch.save(random_inception(), file)
    reference = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file)).eval()
    pixels = torch.stack([pil_to_tensor(photo) for photo in photos[:2]])
    with torch.no_grad():
        expected = reference(pixels)[0]
    torch.testing.assert_close(Inception(file, passes)(photos[:2]), expected, rtol=1e-4, atol=1e-4)


def random_inception() -> dict[str, torch.Tensor]:
    """Weights with the network's shapes: batch norms of unit variance, the rest small."""
    from unittest.mock import patch

    from torch_fidelity import feature_extractor_inceptionv3 as module

    # the class always loads weights: patch the loading to get its shapes
    with patch.object(module.FeatureExtractorInceptionV3, "load_state_dict"), patch.object(module.torch, "load"):
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "none")
    torch.manual_seed(0)
    return {
        name: torch.randn(value.shape) * 0.05 if name.endswith("conv.weight") else value
        for name, value in network.state_dict().items()
    }


@pytest.mark.parametrize(
    ("network", "model", "needed"), [("alex", "alexnet", ALEXNET), ("squeeze", "squeezenet1_1", SQUEEZENET)]
)
def test_lpips_is_torchmetrics_of_every_pair(network, model, needed, tmp_path, photos, passes):
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference
    from torchvision import models
    from torchvision.transforms.functional import to_tensor

    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(getattr(models, model)().state_dict(), checkpoints / str(needed.files[0]))
    before = torch.hub.get_dir()
    distances = Lpips(network, tmp_path, 48, passes)(photos[:3])
    assert torch.hub.get_dir() == before
    pixels = [to_tensor(photo)[None] for photo in photos]
    with hub_folder(tmp_path), torch.no_grad():
        expected = [
            reference(pixels[j], pixels[i], net_type=network, normalize=True) for i, j in ((1, 0), (2, 0), (2, 1))
        ]
    torch.testing.assert_close(distances, torch.stack(expected))
    assert Lpips(network, tmp_path, 48, passes)([photos[0], photos[0]]).item() == 0
