"""Claims that hold for every model family; a family is certified by its entry in SPECIMENS.

The oracle is the family's own diffusers pipeline over the same folder.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import Flux2KleinPipeline, QwenImagePipeline
from safetensors.torch import load_file, save_file
from tests.raising import refuses
from tests.teachers import normalised
from torch import Tensor

import dpdmd_pipeline.backbones
from dpdmd_pipeline.backbones import network_folder
from dpdmd_pipeline.backbones.base import (
    FAMILIES,
    conditioned,
    guidance_arguments,
    guided,
    load_backbone,
    token_limits,
)
from dpdmd_pipeline.backbones.networks import WEIGHTS
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, add_noise, noise_share
from dpdmd_pipeline.dpdmd.sampling import rollout

PROMPTS = ["a red circle", "a blue square", "one green triangle"]  # of different lengths in tokens
RESOLUTION = 32
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
NUM_STEPS = [
    (4, 3.5),
    (8, 3.5),
    (4, 1.0),
]  # divisors of 1000: else DDIM in diffusers steps to t - 1000 // n, off its grid


class Specimen(NamedTuple):
    """Tiny model of a family, and the calls that need it."""

    family: str
    fixture: str  # returns the folder
    grid: str  # of students; equal to the teacher's
    options: dict[str, Any]  # of load_backbone
    components: dict[str, Any]  # arguments of from_pretrained
    call: dict[str, Any]  # of the pipeline's __call__
    to_pipeline: Callable[[Tensor], Tensor] = Tensor.clone  # our latents [B, C, H, W] as the pipeline takes them
    from_pipeline: Callable[..., Tensor] = lambda latents, *_: latents  # and back, for a height and width in pixels


def options(max_sequence_length: int, resolution: int = RESOLUTION) -> dict[str, Any]:
    return {"resolution": resolution, "max_sequence_length": max_sequence_length, "level_range": (0.02, 0.98)}


SPECIMENS = {
    "sd3": Specimen(
        "sd3",
        "decoding_teacher",
        "diffusers",
        options(12),
        {"text_encoder_3": None, "tokenizer_3": None},  # diffusers does not read this from the folder
        {"max_sequence_length": 12},
    ),
    "sdxl": Specimen("sdxl", "tiny_sdxl", "trailing", options(0), {}, {"eta": 0.0}),
    "sdxl with v-prediction": Specimen("sdxl", "tiny_sdxl_v", "trailing", options(0), {}, {"eta": 0.0}),
    "sana": Specimen(
        "sana",
        "tiny_sana",
        "diffusers",
        options(20),
        {},
        {"max_sequence_length": 20, "use_resolution_binning": False},
    ),
    "flux2_klein": Specimen(
        "flux2_klein",
        "tiny_flux2_klein",
        "shifted",
        options(128),
        {},
        {"max_sequence_length": 128},
        from_pipeline=lambda latents, *_: normalised(Flux2KleinPipeline._patchify_latents(latents)),
    ),
    "qwen_image": Specimen(
        "qwen_image",
        "tiny_qwen_image",
        "shifted",
        options(256),
        {},
        {"max_sequence_length": 256},
        lambda latents: QwenImagePipeline._pack_latents(latents, len(latents), *latents.shape[1:]),
        lambda tokens, height, width: QwenImagePipeline._unpack_latents(tokens, height, width, 4).squeeze(2),
    ),
    "z_image": Specimen("z_image", "tiny_z_image", "shifted", options(64), {}, {"max_sequence_length": 64}),
}


@pytest.fixture(scope="module", params=SPECIMENS)
def specimen(request):
    return SPECIMENS[request.param]


@pytest.fixture(scope="module")
def folder(specimen, request):
    return request.getfixturevalue(specimen.fixture)


@pytest.fixture(scope="module")
def backbone(specimen, folder):
    return load_backbone(specimen.family, folder, **specimen.options)


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.load_model().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipeline(specimen, folder):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, **specimen.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def cond(backbone):
    return backbone.encode(PROMPTS)


@pytest.fixture(scope="module")
def uncond(backbone):
    return backbone.encode([""])


def noise(backbone, count=3, seed=0):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))


def assert_same(ours, expected):
    """To 1e-5 of the largest value: an x0 that follows from eps is up to 15 times as large as the latents."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def row(cond, index):
    return {name: value[index : index + 1] for name, value in cond.items()}


# ---- the list of families


def test_every_file_that_loads_is_a_family_and_every_family_is_tested():
    (folder,) = dpdmd_pipeline.backbones.__path__
    loadable = {path.stem for path in Path(folder).glob("*.py") if "\nload = " in path.read_text()}
    assert loadable == set(FAMILIES) == {specimen.family for specimen in SPECIMENS.values()}


def test_an_unknown_family_is_refused_with_the_choice(tmp_path):
    with refuses(ValueError, "backbone.family is 'sd9'", ", ".join(FAMILIES)):
        load_backbone("sd9", tmp_path)


# ---- levels


def is_on_path(level: NoiseLevel) -> bool:
    """Flow (alpha + sigma = 1) or VP (alpha^2 + sigma^2 = 1)."""
    flow, vp = level.alpha + level.sigma - 1, level.alpha**2 + level.sigma**2 - 1
    return bool((flow.abs() < 1e-6).all() or (vp.abs() < 1e-5).all())


@pytest.mark.parametrize("num_steps", [1, 4, 30])
def test_the_schedule_falls_from_noise_and_ends_clean(backbone, num_steps):
    levels = backbone.schedule(num_steps)
    assert len(levels) == num_steps + 1 and is_on_path(levels)
    assert levels.sigma[0] > 0.99
    assert bool((levels.sigma.diff() < 0).all()) and bool((levels.timestep.diff() < 0).all())
    assert (levels.alpha[-1], levels.sigma[-1]) == (1, 0)
    assert levels.sigma.dtype == levels.alpha.dtype == torch.float32


def test_teacher_and_student_start_at_the_same_level(specimen, backbone, pipeline):
    teacher, student = backbone.schedule(30), backbone.student_schedule(specimen.grid, 4)
    assert teacher.sigma[0] == student.sigma[0] and teacher.timestep[0] == student.timestep[0]
    drawn(specimen, pipeline, noise(backbone), 5, 1.0)  # a pipeline may compute the levels itself
    torch.testing.assert_close(
        backbone.schedule(5).timestep[:-1].float(), pipeline.scheduler.timesteps.float(), rtol=0, atol=1e-4
    )


def test_random_levels_are_per_sample_and_rise_with_their_number(backbone):
    level = backbone.random_level(torch.linspace(0, 1 - 1e-6, 50))
    for value in (level.alpha, level.sigma, level.timestep):
        assert value.shape == (50, 1, 1, 1)
    assert is_on_path(level)
    assert bool((level.sigma.flatten().diff() >= 0).all()) and 0 < level.sigma.min() < level.sigma.max() < 1
    one = backbone.random_level(torch.linspace(0, 1 - 1e-6, 50)[7:8])
    assert one.sigma.item() == level.sigma[7].item()


# ---- conditioning


def test_encoding_is_batch_first_and_prompt_by_prompt(backbone, cond):
    for name, value in cond.items():
        assert len(value) == len(PROMPTS) and value.is_floating_point() and not value.requires_grad
        assert bool(value.isfinite().all()), name
    for index, prompt in enumerate(PROMPTS):
        alone = backbone.encode([prompt])
        assert alone.keys() == cond.keys()
        for name, value in alone.items():
            torch.testing.assert_close(value, row(cond, index)[name], **TOLERANCE)


def test_the_shapes_of_embeddings_are_available_before_encoding(backbone, cond):
    assert backbone.conditioning_shapes() == {name: tuple(value.shape[1:]) for name, value in cond.items()}


def test_every_tokenizer_with_a_text_encoder_has_its_limit(specimen, folder, cond):
    limits = token_limits(specimen.family, folder, specimen.options["max_sequence_length"])
    encoders = {path.name.replace("text_encoder", "tokenizer") for path in folder.glob("text_encoder*")}
    assert limits.keys() == encoders
    assert all(0 < limit.tokens <= cond["prompt_embeds"].shape[1] for limit in limits.values())


def test_the_empty_prompt_has_the_shape_of_any_other(cond, uncond):
    assert uncond.keys() == cond.keys()
    assert all(uncond[name].shape == (1, *value.shape[1:]) for name, value in cond.items())
    assert any(not torch.equal(uncond[name][0], value[0]) for name, value in cond.items())


# ---- denoising


def test_denoise_returns_x0_of_the_latents_shape_in_float32(backbone, model, cond):
    for level in (backbone.schedule(4)[1], backbone.random_level(torch.tensor([0.1, 0.5, 0.9]))):
        x0 = backbone.denoise(model, noise(backbone), level, cond)
        assert x0.shape == (len(PROMPTS), *backbone.latent_shape) and x0.dtype == torch.float32
        assert bool(x0.isfinite().all())


def test_levels_per_sample_equal_calls_sample_by_sample(backbone, model, cond, uncond):
    level, latents = backbone.random_level(torch.tensor([0.1, 0.5, 0.9])), noise(backbone)
    together = backbone.denoise(model, latents, level, cond)
    together_guided = guided(backbone, model, cond, uncond, 3.5)(latents, level)
    for index in range(len(PROMPTS)):
        scalar = NoiseLevel(*(value[index].squeeze() for value in vars(level).values()))
        for own_level in (level[index : index + 1], scalar):
            sample = latents[index : index + 1], own_level
            alone = conditioned(backbone, model, row(cond, index))(*sample)
            assert_same(together[index : index + 1], alone)
            alone = guided(backbone, model, row(cond, index), uncond, 3.5)(*sample)
            assert_same(together_guided[index : index + 1], alone)


def test_prompt_and_level_matter(backbone, model, cond):
    latents, levels = noise(backbone, 1).expand(2, -1, -1, -1), backbone.schedule(4)
    pair = {name: value[:2] for name, value in cond.items()}
    first, second = backbone.denoise(model, latents, levels[1], pair)
    assert not torch.allclose(first, second)
    assert not torch.allclose(backbone.denoise(model, latents, levels[2], pair)[0], first)


def test_gradients_reach_weights_and_latents(backbone, cond):
    model, latents = backbone.load_model(), noise(backbone).requires_grad_()
    backbone.denoise(model, latents, backbone.schedule(4)[1], cond).square().sum().backward()
    assert latents.grad.abs().sum() > 0
    assert sum(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters()) > 10


def test_guidance_at_scale_1_is_no_guidance(backbone, model, cond, uncond):
    latents, level = noise(backbone), backbone.schedule(4)[1]
    plain = conditioned(backbone, model, cond)(latents, level)
    assert torch.equal(guided(backbone, model, cond, uncond, 1)(latents, level), plain)
    same = backbone.guide(plain, noise(backbone, seed=1), 1.0, latents, level)
    torch.testing.assert_close(same, plain, **TOLERANCE)


def test_guidance_grows_with_its_scale(backbone, model, cond, uncond):
    latents, level = noise(backbone), backbone.schedule(4)[1]
    plain = conditioned(backbone, model, cond)(latents, level)
    distance = [(guided(backbone, model, cond, uncond, s)(latents, level) - plain).norm() for s in (1.0, 2.0, 3.5)]
    assert distance[0] < distance[1] < distance[2]


def test_guidance_in_two_calls_is_guidance_in_one(backbone, model, cond, uncond):
    latents = noise(backbone)
    for level in (backbone.schedule(4)[1], backbone.random_level(torch.tensor([0.1, 0.5, 0.9]))):
        joint, separate = (
            guided(backbone, model, cond, uncond, 3.5, batch=batch)(latents, level) for batch in ("joint", "apart")
        )
        assert_same(separate, joint)


@pytest.mark.parametrize("batch", ["joint", "apart"])
def test_a_sample_is_guided_inside_the_interval_only(backbone, model, cond, uncond, batch):
    latents, level = noise(backbone), backbone.random_level(torch.tensor([0.1, 0.5, 0.9]))
    low, middle, high = noise_share(level).flatten().tolist()
    ends = {(0.0, low): [0], (low, middle): [0, 1], (middle, middle + 1e-6): [1], ((middle + high) / 2, 1.0): [2]}
    everywhere = guided(backbone, model, cond, uncond, 3.5, batch=batch)(latents, level)
    nowhere = conditioned(backbone, model, cond)(latents, level)
    for interval, inside in {**ends, (0.0, 1.0): [0, 1, 2]}.items():
        x0 = guided(backbone, model, cond, uncond, 3.5, interval=interval, batch=batch)(latents, level)
        for index in range(3):
            assert_same(x0[index], (everywhere if index in inside else nowhere)[index])
            assert not torch.allclose(everywhere[index], nowhere[index])


# ---- against the pipeline


def drawn(specimen, pipeline, latents, num_steps, scale, kind="latent", size=(RESOLUTION, RESOLUTION)):
    """Pictures or latents of the family's own pipeline."""
    images = pipeline(
        prompt=list(PROMPTS),  # Z-Image's writes its chat template into the list
        num_inference_steps=num_steps,
        latents=specimen.to_pipeline(latents),
        height=size[0],
        width=size[1],
        output_type=kind,
        **guidance_arguments(specimen.family, scale),
        **specimen.call,
    ).images
    return specimen.from_pipeline(images, *size) if kind == "latent" else images


@pytest.mark.parametrize(("num_steps", "scale"), NUM_STEPS)
def test_denoise_and_step_give_the_latents_of_the_pipeline(
    specimen, backbone, model, pipeline, cond, uncond, num_steps, scale
):
    latents = noise(backbone)
    expected = drawn(specimen, pipeline, latents, num_steps, scale)
    with torch.no_grad():
        ours = rollout(guided(backbone, model, cond, uncond, scale), latents, backbone.schedule(num_steps))
    assert_same(ours, expected)
    assert (expected - latents).abs().max() > 0.1  # the network has an effect


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_pictures_of_another_size_are_those_of_the_pipeline(specimen, backbone, model, pipeline, cond, uncond, size):
    other = backbone.at(size)
    latents = noise(other)
    expected = drawn(specimen, pipeline, latents, 4, 3.5, size=size)
    with torch.no_grad():
        ours = rollout(guided(other, model, cond, uncond, 3.5), latents, other.schedule(4))
    assert_same(ours, expected)
    assert other.decode(latents[:1]).shape[2:] == size and other.sizes == [size]
    assert backbone.sizes == [(RESOLUTION, RESOLUTION)]  # unchanged


def test_sizes_that_no_patch_divides_are_refused_with_the_nearest(specimen, folder, backbone):
    for size in [(33, 32), (32, 1)]:
        facts = [f"{size[0]} x {size[1]}", "multiples of"]
        with refuses(ValueError, "size", *facts):
            backbone.at(size)
        with refuses(ValueError, "backbone.resolution", *facts):
            load_backbone(specimen.family, folder, **{**specimen.options, "resolution": [[32, 32], [*size]]})


def test_another_size_has_the_levels_of_an_adapter_of_its_own(specimen, folder, backbone):
    own = load_backbone(specimen.family, folder, **{**specimen.options, "resolution": [[32, 64]]})
    uniform = torch.tensor([0.1, 0.9])
    for one, other in [(own.schedule(4), backbone.at((32, 64)).schedule(4))] + [
        (own.random_level(uniform), backbone.at((32, 64)).random_level(uniform))
    ]:
        assert torch.equal(one.sigma, other.sigma) and torch.equal(one.timestep, other.timestep)


def test_decode_gives_the_pictures_of_the_pipeline(specimen, backbone, pipeline):
    latents = noise(backbone)
    clean, expected = (drawn(specimen, pipeline, latents, 4, 3.5, kind) for kind in ("latent", "pt"))
    images = backbone.decode(clean)
    assert images.shape == (len(PROMPTS), 3, RESOLUTION, RESOLUTION)
    torch.testing.assert_close(images, expected, **TOLERANCE)


def test_pictures_lie_between_0_and_1_and_have_no_gradient(backbone):
    images = backbone.decode(100 * noise(backbone))
    assert images.min() >= 0 and images.max() <= 1 and images.dtype == torch.float32
    assert not images.requires_grad


# ---- networks


def test_a_saved_student_loads_as_it_was(backbone, cond, tmp_path):
    student = backbone.load_model().eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    student.save_pretrained(tmp_path / "student")
    loaded = backbone.load_model(tmp_path / "student").eval()
    level = backbone.schedule(4)[1]
    with torch.no_grad():
        latents = add_noise(noise(backbone), noise(backbone, seed=1), level)
        assert torch.equal(*(backbone.denoise(net, latents, level, cond) for net in (student, loaded)))


def test_the_prediction_type_fits_the_path(backbone):
    levels = backbone.schedule(4)
    is_flow = bool(((levels.alpha + levels.sigma - 1).abs() < 1e-6).all())
    assert backbone.prediction in ({"flow"} if is_flow else {"eps", "v"})


def test_a_network_for_training_has_float32_weights_whatever_the_precision(specimen, folder):
    backbone = load_backbone(specimen.family, folder, **specimen.options, dtype=torch.bfloat16)
    assert torch.bfloat16 in {parameter.dtype for parameter in backbone.load_model().parameters()}
    assert {parameter.dtype for parameter in backbone.load_model(float32=True).parameters()} == {torch.float32}


def test_each_load_is_a_network_of_its_own(backbone):
    first, second = backbone.load_model(), backbone.load_model()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()


# ---- networks that are refused


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the teacher, and the folder of its network."""
    copy = shutil.copytree(folder, tmp_path / "teacher")
    return copy, network_folder(copy)


def without_a_key(weights):
    return {name: weights[name] for name in sorted(weights)[4:]}


def with_another_key(weights):
    return {**weights, **{f"added.{name}": torch.zeros(1) for name in "abcd"}}


def with_another_shape(weights):
    name = min(weights)
    return {**weights, name: torch.zeros(3, 2, 1)}


@pytest.mark.parametrize(
    "change, message",
    [
        (without_a_key, r"4 missing \(\S+, \S+, \S+ and 1 more\)$"),
        (with_another_key, r"4 unknown \(added\.a, added\.b, added\.c and 1 more\)$"),
        (with_another_shape, r"1 resized \(\S+ \[3, 2, 1\] instead of \[[0-9, ]+\]\)$"),
    ],
)
@pytest.mark.parametrize("float32", [False, True])
def test_a_network_with_a_key_too_many_or_too_few_is_refused(specimen, copied, change, message, float32):
    teacher, network = copied
    save_file(change(load_file(network / WEIGHTS)), network / WEIGHTS)
    backbone = load_backbone(specimen.family, teacher, **specimen.options)
    with pytest.raises(ValueError, match=message) as refusal:
        backbone.load_model(float32=float32)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_text_encoder_or_autoencoder_without_some_weights_is_refused(specimen, copied, part):
    teacher, _ = copied
    (path,) = (teacher / part).glob("*.safetensors")
    weights = load_file(path)
    save_file(without_a_key(weights), path, {"format": "pt"})
    backbone = load_backbone(specimen.family, teacher, **specimen.options)
    with refuses(ValueError, str(teacher / part), "4 weights", *sorted(weights)[:3]):
        backbone.encode(PROMPTS) if part == "text_encoder" else backbone.decode(torch.zeros(1, *backbone.latent_shape))


def test_a_network_in_several_files_loads_if_its_keys_fit(specimen, copied, model):
    teacher, network = copied
    (network / WEIGHTS).unlink()
    model.save_pretrained(network, max_shard_size="100KB")
    backbone = load_backbone(specimen.family, teacher, **specimen.options)
    loaded = backbone.load_model().state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    last = max(network.glob("*.safetensors"))
    save_file(with_another_key(load_file(last)), last)
    with refuses(ValueError, "4 unknown (added.a,"):
        backbone.load_model()
    save_file(load_file(last), network / WEIGHTS)
    with refuses(ValueError, f"both {WEIGHTS} and an index"):
        backbone.load_model()


def test_a_pickled_network_is_refused_without_being_opened(specimen, copied):
    teacher, network = copied
    (network / WEIGHTS).unlink()
    (network / "diffusion_pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")  # ends the process that unpickles it
    with refuses(ValueError, "diffusion_pytorch_model.bin", ".safetensors"):
        load_backbone(specimen.family, teacher, **specimen.options).load_model()


def test_a_half_precision_variant_does_not_replace_the_network(specimen, copied):
    teacher, network = copied
    variant = "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(network / WEIGHTS, network / variant)
    load_backbone(specimen.family, teacher, **specimen.options).load_model()  # beside the network it is ignored
    (network / WEIGHTS).unlink()
    with refuses(FileNotFoundError, f"{WEIGHTS}", f"{variant}"):
        load_backbone(specimen.family, teacher, **specimen.options).load_model()


def test_a_network_of_another_class_is_refused_before_its_weights(specimen, copied):
    teacher, network = copied
    config = json.loads((network / "config.json").read_text())
    (network / "config.json").write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}))
    with refuses(ValueError, "FluxTransformer2DModel", "backbone.family"):
        load_backbone(specimen.family, teacher, **specimen.options)


@pytest.mark.parametrize("other", ["decoding_teacher", "tiny_sdxl", "tiny_sana"])
def test_a_teacher_of_another_family_is_refused_in_one_line(specimen, request, other):
    if other.removeprefix("tiny_") in specimen.family or (other, specimen.family) == ("decoding_teacher", "sd3"):
        load_backbone(specimen.family, request.getfixturevalue(other), **specimen.options)
        return
    with refuses((ValueError, OSError), "backbone.family") as refusal:
        load_backbone(specimen.family, request.getfixturevalue(other), **specimen.options)
    assert "\n" not in str(refusal.value)
