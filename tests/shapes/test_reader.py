"""The reader's accuracy, and the rates at which it accepts faulty pictures.

The rates are those of VALID_BELOW = 0.10 on pictures with known attributes. A residual is an absolute RMS error.
Therefore a pair of low contrast (a green object on grey: .26) tolerates twice the fault of a red one on white; the
accepted faults below have low contrast.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.raising import refuses

from dpdmd_pipeline.shapes.reader import VALID_BELOW, Reading, read
from dpdmd_pipeline.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    LEGAL,
    NUM_MODES,
    POSITIONS,
    RESOLUTION,
    Attributes,
    gallery,
)

ATTRIBUTES = torch.tensor(LEGAL)  # [864, 5], in the order of the gallery
SIZE = (RESOLUTION, RESOLUTION)
TEACHER = Path(__file__).parents[2] / "data" / "06_models" / "shapes_teacher"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def legal_index(reading: Reading) -> torch.Tensor:
    return reading.prompt * NUM_MODES + reading.mode


def valid_rate(images: torch.Tensor) -> float:
    return read(images).valid.float().mean().item()


def backgrounds() -> torch.Tensor:
    """The empty picture of each background, [4, 3, 32, 32]."""
    return torch.tensor(list(BACKGROUNDS.values()))[:, :, None, None].expand(-1, -1, *SIZE)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur with repeated edges; sigma in pixels."""
    reach = 16
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    images = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(images, kernel, groups=3), kernel.mT, groups=3)


def noisy_gallery(sigma: float) -> torch.Tensor:
    return gallery() + sigma * torch.randn(gallery().shape, generator=generator())


# ---- reading


@pytest.mark.parametrize("name", Attributes._fields)
def test_the_confusion_matrix_on_legal_pictures_is_the_identity(name):
    column = Attributes._fields.index(name)
    truth, readings = ATTRIBUTES[:, column], ATTRIBUTES[legal_index(read(gallery()))][:, column]
    count = int(truth.max()) + 1
    confusion = torch.zeros(count, count).index_put_((truth, readings), torch.ones(()), accumulate=True)
    assert torch.equal(confusion, torch.eye(count) * (len(LEGAL) / count))


def test_legal_pictures_are_valid_without_residual():
    reading = read(gallery())
    assert torch.equal(legal_index(reading), torch.arange(len(LEGAL)))
    assert bool((reading.residual == 0).all()) and bool(reading.valid.all())


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.15])
def test_every_attribute_is_read_correctly_through_noise(sigma):
    assert torch.equal(legal_index(read(noisy_gallery(sigma))), torch.arange(len(LEGAL)))


def test_noisy_pictures_stay_valid_up_to_sigma_008():
    assert valid_rate(noisy_gallery(0.08)) == 1
    assert valid_rate(noisy_gallery(0.1)) == 0  # the worst of ~170 windows counts, not the mean


def test_the_residual_is_the_worst_local_error():
    images = gallery()[:4].clone()
    images[:, :, 8:16, 8:16] += 0.2  # one window of the 8x8 grid, stride 2
    assert read(images).residual.tolist() == pytest.approx([0.2] * 4, abs=1e-6)


def test_pictures_are_read_one_by_one():
    images = noisy_gallery(0.2)[::50]
    together = read(images)
    for index, image in enumerate(images):
        alone = read(image[None])
        assert legal_index(alone)[0] == legal_index(together)[index]
        torch.testing.assert_close(alone.residual[0], together.residual[index])


def test_every_legal_picture_survives_the_teachers_autoencoder():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(TEACHER, subfolder="vae")
    with torch.no_grad():
        latents = vae.encode(gallery() * 2 - 1).latent_dist.mode()
        reading = read((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    assert bool(reading.valid.all())
    assert reading.residual.max() < 0.5 * VALID_BELOW  # measured .042
    assert torch.equal(legal_index(reading), torch.arange(len(LEGAL)))


# ---- faults that are always refused


def test_uniform_noise_is_invalid():
    assert valid_rate(torch.rand(1000, 3, *SIZE, generator=generator())) == 0


@pytest.mark.parametrize("sigma", [1, 2, 4, 8])
def test_blobs_are_invalid(sigma):
    blobs = blurred(torch.randn(1000, 3, *SIZE, generator=generator()), sigma)
    low, high = blobs.amin((1, 2, 3), keepdim=True), blobs.amax((1, 2, 3), keepdim=True)
    assert valid_rate((blobs - low) / (high - low)) == 0
    assert valid_rate((0.5 + 0.25 * blobs / blobs.std((1, 2, 3), keepdim=True)).clamp(0, 1)) == 0


def test_empty_pictures_are_invalid():
    assert read(backgrounds()).residual.min() > 1.5 * VALID_BELOW  # measured .184, on grey
    assert valid_rate(torch.rand(2000, 3, 1, 1, generator=generator()).expand(-1, -1, *SIZE)) == 0


def two_objects(count: int) -> torch.Tensor:
    """Legal pictures with a second object at another position, on the same background."""
    pictures, rng = [], generator()
    while len(pictures) < count:
        first, second = torch.randint(len(LEGAL), (2,), generator=rng).tolist()
        base, added = LEGAL[first], LEGAL[second]
        if base.position != added.position and base.background == added.background:
            empty = backgrounds()[added.background]
            drawn = (gallery()[second] - empty).abs().amax(0)  # soft at the rim
            mask = drawn / drawn.max()
            pictures.append((1 - mask) * gallery()[first] + mask * empty + (gallery()[second] - empty))
    return torch.stack(pictures)


def test_two_objects_are_invalid():
    reading = read(two_objects(1000))
    assert not reading.valid.any()
    assert reading.residual.min() > 0.14  # measured .148, over 33,000 pairs


def halves(side: str) -> torch.Tensor:
    """Every legal picture with one half of its object missing, [864, 3, 32, 32]."""
    grid = torch.arange(RESOLUTION) + 0.5
    centre = torch.tensor(POSITIONS)[ATTRIBUTES[:, 2]]
    axis, sign = {"top": (0, -1), "bottom": (0, 1), "left": (1, -1), "right": (1, 1)}[side]
    erased = sign * (grid - centre[:, axis, None]) > 0
    erased = erased[:, None, :, None] if axis == 0 else erased[:, None, None, :]
    return torch.where(erased, backgrounds()[ATTRIBUTES[:, 4]], gallery())


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
def test_half_objects_are_invalid(side):
    assert valid_rate(halves(side)) == 0


# ---- faults that are mostly refused: bounds on measured rates


@pytest.mark.parametrize(
    ("share", "any_pair", "same_prompt"), [(0.5, 0.01, 0.03), (0.6, 0.02, 0.05), (0.7, 0.09, 0.14)]
)
def test_few_blends_of_two_legal_pictures_are_valid(share, any_pair, same_prompt):
    """Averages of two modes. Measured: .005, .009, .068 for any pair; .017, .034, .119 for one prompt."""
    first, second = torch.randint(len(LEGAL), (2, 4000), generator=generator())
    for partner, bound in (
        (second, any_pair),
        (first // NUM_MODES * NUM_MODES + second % NUM_MODES, same_prompt),
    ):
        differs = first != partner
        images = share * gallery()[first[differs]] + (1 - share) * gallery()[partner[differs]]
        assert valid_rate(images) < bound


@pytest.mark.parametrize(
    ("name", "rate"), [("colour", 0), ("position", 0.010), ("background", 0.333), ("radius", 0.271), ("shape", 0.573)]
)
def test_an_even_blend_in_one_attribute_passes_at_the_measured_rate(name, rate):
    """Between two radii, shapes or similar backgrounds the visible difference is too small."""
    column, pairs = Attributes._fields.index(name), []
    for index, attributes in enumerate(LEGAL):
        for value in range(attributes[column] + 1, int(ATTRIBUTES[:, column].max()) + 1):
            pairs.append((index, LEGAL.index(attributes._replace(**{name: value}))))
    first, second = torch.tensor(pairs).T
    assert valid_rate(0.5 * gallery()[first] + 0.5 * gallery()[second]) == pytest.approx(rate, abs=0.005)


@pytest.mark.parametrize(
    ("sigma", "low", "high"),
    [(0.7, 1, 1), (1, 0.85, 0.88), (2, 0.25, 0.27), (3, 0.04, 0.06), (4, 0.01, 0.03), (8, 0, 0)],
)
def test_stronger_blur_is_refused_more_often(sigma, low, high):
    """Sigma in pixels, objects 8 or 13 pixels wide. From sigma 3 on mostly green on grey, blue on purple pass."""
    assert low <= valid_rate(blurred(gallery(), sigma)) <= high


def test_blurred_pictures_of_clear_contrast_are_invalid():
    contrast = (
        torch.tensor(list(COLOURS.values()))[ATTRIBUTES[:, 0]]
        - torch.tensor(list(BACKGROUNDS.values()))[ATTRIBUTES[:, 4]]
    )
    clear = contrast.square().mean(1).sqrt() > 0.4
    assert clear.float().mean() > 0.4
    assert valid_rate(blurred(gallery(), 3)[clear]) == 0


# ---- refusals


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 64, 64), (2, 32, 32, 3)])
def test_pictures_of_another_shape_are_refused(shape):
    with refuses(ValueError, "[N, 3, 32, 32]") as error:
        read(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
