"""LoRA students: every spelling of their keys is read, and one that does not fit the base model is refused."""

import pytest
import torch
from comfy_nodes.header import StudentHeader, read_header
from tests.raising import refuses

from comfy_nodes import lora, weights


def factors(module, rank=2, size=(6, 3), names=("lora_A.weight", "lora_B.weight")):
    return {f"{module}.{names[0]}": torch.ones(rank, size[1]), f"{module}.{names[1]}": torch.ones(size[0], rank)}


def test_a_lora_that_the_package_writes_is_read_here(tmp_path):
    from dpdmd_pipeline.backbones import student_file

    timesteps = [999, 749, 499, 249]
    header = student_file.StudentHeader(
        family="sdxl",
        kind="lora",
        prediction="v",
        sampler="renoise",
        timesteps=timesteps,
        lora_rank=2,
        lora_alpha=4.0,
    )
    student_file.save_lora(tmp_path, factors("down.0.to_q"), header)
    state, metadata = weights.load_state(str(tmp_path / student_file.ADAPTER), "student")
    header = read_header(metadata, "student")
    assert (header.family, header.kind, header.prediction, header.sampler) == ("sdxl", "lora", "v", "renoise")
    assert list(header.timesteps) == timesteps and header.steps == 4
    modules = lora.with_alphas(lora.lora_modules(state, header.family, "student"), header, "student")
    assert modules["lora_unet_down_0_to_q"]["alpha"] == 4


@pytest.mark.parametrize(
    ("family", "module", "expected"),
    [
        ("sd3", "transformer.blocks.0.to_q", "transformer.blocks.0.to_q"),
        ("sd3", "base_model.model.blocks.0.to_q", "transformer.blocks.0.to_q"),
        ("sd3", "base_model.model.transformer.blocks.0.to_q", "transformer.blocks.0.to_q"),
        ("sd3", "blocks.0.to_q", "transformer.blocks.0.to_q"),
        ("sdxl", "unet.down.0.to_q", "lora_unet_down_0_to_q"),
        ("sdxl", "base_model.model.down.0.to_q", "lora_unet_down_0_to_q"),
        ("sdxl", "down.0.to_q", "lora_unet_down_0_to_q"),
        ("sdxl", "lora_unet_down_0_to_q", "lora_unet_down_0_to_q"),
        ("sdxl", "diffusion_model.input.0.to_q", "diffusion_model.input.0.to_q"),
    ],
)
def test_every_spelling_of_a_module_becomes_the_one_that_comfyui_reads(family, module, expected):
    for names in (
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
    ):
        state = factors(module, names=names) | {f"{module}.alpha": torch.tensor(4.0)}
        assert lora.is_lora(state)
        modules = lora.lora_modules(state, family, "x")
        assert modules.keys() == {expected} and modules[expected].keys() == {"lora_down", "lora_up", "alpha"}


def test_a_full_student_is_no_lora():
    assert not lora.is_lora(["a.weight", "b.bias"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (factors("a") | {"clip.weight": torch.ones(2)}, r"x .*1 keys.*\(clip.weight\)"),
        (factors("a") | {"b.lora_A.weight": torch.ones(2, 2)}, r"x .*one factor of 1 modules \(transformer.b\)"),
        (factors("a") | {"b.lora_A.weight": torch.tensor(1.0)}, r"x .*1 factors.*\(b.lora_A.weight\)"),
        (factors("a", rank=0), r"x .*2 factors.*\(a.lora_A.weight, a.lora_B.weight\)"),
        (factors("a") | {"c.alpha": torch.tensor(1.0)}, r"one factor of 1 modules \(transformer.c\)"),
    ],
)
def test_a_lora_with_unknown_keys_or_one_factor_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        lora.lora_modules(state, "sd3", "x")


LORA = {"family": "sdxl", "kind": "lora", "prediction": "eps", "sampler": "renoise", "timesteps": (999, 0)}


def test_alpha_comes_from_the_file_else_from_the_header_else_it_is_the_rank():
    header = StudentHeader(**LORA, lora_rank=64, lora_alpha=128.0)
    modules = lora.lora_modules(factors("a", rank=4) | {"a.alpha": torch.tensor(3.0)} | factors("b"), "sdxl", "x")
    completed = lora.with_alphas(modules, header, "x")
    assert completed["lora_unet_a"]["alpha"] == 3 and completed["lora_unet_b"]["alpha"] == 2 * 128 / 64
    assert "alpha" not in lora.with_alphas(modules, None, "x")["lora_unet_b"]


def test_a_header_without_a_rank_means_the_rank_of_the_factors():
    modules = lora.lora_modules(factors("a", rank=4) | factors("b", rank=4), "sdxl", "x")
    completed = lora.with_alphas(modules, StudentHeader(**LORA, lora_alpha=8.0), "x")
    assert [parts["alpha"].item() for parts in completed.values()] == [8, 8]


@pytest.mark.parametrize(
    ("header", "facts"),
    [
        ({"lora_rank": 4}, ["dpdmd.lora_alpha"]),
        ({}, ["dpdmd.lora_alpha"]),
        ({"lora_alpha": 8.0}, ["lora_rank", "[2, 4]"]),
    ],
)
def test_a_lora_of_unknown_strength_is_refused(header, facts):
    modules = lora.lora_modules(factors("a", rank=4) | factors("b", rank=2), "sdxl", "x")
    with refuses(ValueError, "x:", "2 modules", "lora_unet_a", *facts):
        lora.with_alphas(modules, StudentHeader(**LORA, **header), "x")


def test_a_lora_that_does_not_fit_the_base_model_is_refused():
    modules = lora.lora_modules(factors("a") | factors("b"), "sd3", "x")
    shapes = {"transformer.a": (6, 3), "transformer.b": (6, 3)}
    lora.check_lora(modules, shapes, "x")
    with refuses(ValueError, "x: none of its 2 modules", "(transformer.a,"):
        lora.check_lora(modules, {}, "x")
    with refuses(ValueError, "x:", "lacks 1 modules (transformer.b)"):
        lora.check_lora(modules, {"transformer.a": (6, 3)}, "x")
    with refuses(ValueError, "x: transformer.b", "[6, 3]", "[6, 4]"):
        lora.check_lora(modules, shapes | {"transformer.b": (6, 4)}, "x")


def test_a_lora_of_a_convolution_fits_its_weight():
    state = {"a.lora_A.weight": torch.ones(2, 3, 3, 3), "a.lora_B.weight": torch.ones(6, 2, 1, 1)}
    lora.check_lora(lora.lora_modules(state, "sdxl", "x"), {"lora_unet_a": (6, 3, 3, 3)}, "x")
