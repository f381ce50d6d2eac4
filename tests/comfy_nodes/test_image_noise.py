"""Noise of the pack: a seed gives the same noise in every batch, and the package draws the same."""

import pytest
import torch
from comfy_nodes.noise import BatchStream, ImageStreams, PerImageNoise, image_seeds, streams_of
from tests.raising import refuses

from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds

SHAPE = (4, 6, 10)


def test_start_noise_equals_the_packages():
    assert torch.equal(ImageStreams([7, 8, 9]).draw(SHAPE), noise_from_seeds([7, 8, 9], SHAPE))


def test_later_draws_are_the_next_numbers_of_the_same_generator():
    streams, generator = ImageStreams([7, 8]), torch.Generator().manual_seed(8)
    for _draw in range(3):
        assert torch.equal(streams.draw(SHAPE)[1], torch.randn(*SHAPE, generator=generator))


def test_a_picture_is_the_same_alone_and_in_any_batch():
    batch = ImageStreams(image_seeds(7, 4)).draw(SHAPE)
    assert torch.equal(batch[2], ImageStreams(image_seeds(9, 1)).draw(SHAPE)[0])
    assert torch.equal(batch[[3, 1]], ImageStreams(image_seeds(7, 2, [3, 1])).draw(SHAPE))


def test_seeds_count_up_and_wrap_around():
    assert image_seeds(5, 3) == (5, 6, 7)
    assert image_seeds(2**64 - 1, 3) == (2**64 - 1, 0, 1)


def test_an_index_for_another_number_of_pictures_is_refused():
    for make in (image_seeds, BatchStream):
        with refuses(ValueError, "batch_index", "2", "3"):
            make(5, 3, [0, 1])


@pytest.mark.parametrize("make", [image_seeds, BatchStream, streams_of])
def test_a_seed_that_is_no_whole_number_is_refused(make):
    with refuses(ValueError, "seed is 2.5"):
        make(2.5, 3)


def test_the_noise_of_a_latent_needs_a_whole_seed():
    with refuses(ValueError, "seed is 2.5"):
        PerImageNoise(2.5).generate_noise({"samples": torch.zeros(2, *SHAPE)})


def test_the_stream_of_a_batch_is_comfyuis_own_noise():
    batch = BatchStream(7, 3).draw(SHAPE)
    assert torch.equal(batch, torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(BatchStream(7, 2, [2, 0]).draw(SHAPE), batch[[2, 0]])


def test_the_noise_of_a_latent_has_its_shape_and_its_index():
    noise = PerImageNoise(7)
    start = noise.generate_noise({"samples": torch.zeros(2, *SHAPE), "batch_index": [4, 0]})
    assert torch.equal(start, noise_from_seeds([11, 7], SHAPE))
    assert noise.seed == 7  # for ComfyUI
    assert torch.equal(streams_of(noise.seed, 2).draw(SHAPE), start)  # for the re-noise sampler


class Nested:
    """ComfyUI's samples of several kinds, such as pictures and sound."""

    is_nested = True

    def __init__(self, parts):
        self.parts = parts

    def unbind(self):
        return self.parts


def test_nested_latents_get_nested_noise_that_belongs_to_each_picture():
    def draw(seed, count):
        samples = Nested([torch.zeros(count, *SHAPE), torch.zeros(count, 8, 5)])
        return PerImageNoise(seed).generate_noise({"samples": samples}).unbind()

    batch = draw(7, 3)
    assert [part.shape for part in batch] == [(3, *SHAPE), (3, 8, 5)]
    for part, alone in zip(batch, draw(9, 1), strict=True):
        assert torch.equal(part[2], alone[0])


def test_noise_of_half_precision_latents_is_not_rounded():
    start = PerImageNoise(7).generate_noise({"samples": torch.zeros(2, *SHAPE, dtype=torch.float16)})
    assert torch.equal(start, noise_from_seeds([7, 8], SHAPE))


def test_a_plain_seed_counts_up_from_picture_0():
    assert torch.equal(streams_of(7, 2).draw(SHAPE), noise_from_seeds([7, 8], SHAPE))


def test_one_noise_serves_latents_of_several_sizes():
    noise = PerImageNoise(7)
    for count in (3, 1):
        assert len(noise.generate_noise({"samples": torch.zeros(count, *SHAPE)})) == count
        assert torch.equal(streams_of(noise.seed, count).draw(SHAPE), noise_from_seeds(range(7, 7 + count), SHAPE))
