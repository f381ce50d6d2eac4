"""Features on disk, without a network."""

import torch
from PIL import Image

from dpdmd_pipeline.metrics.features import CachedFeatures


def test_a_truncated_file_is_computed_again(tmp_path, photos):
    calls = []

    def embed(images):
        calls.append(len(images))
        return torch.arange(len(images) * 2.0).view(-1, 2)

    cached = CachedFeatures(embed, tmp_path, "net")
    first = cached(photos)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert torch.equal(cached(photos), first) and torch.equal(cached(photos), first)
    assert calls == [5, 5]


def test_features_belong_to_pictures_in_their_order_and_to_one_network(tmp_path, photos):
    def embed(images):
        return torch.tensor([[float(sum(image.getpixel((0, 0))))] for image in images])

    cached = CachedFeatures(embed, tmp_path, "net")
    assert torch.equal(cached(photos).flip(0), cached(photos[::-1]))
    turned = [Image.frombytes("RGB", (24, 96), image.tobytes()) for image in photos]  # the same bytes, another shape
    CachedFeatures(embed, tmp_path, "other")(photos)
    cached(turned)
    assert len(list(tmp_path.iterdir())) == 4
