"""Our sampler against diffusers alone, on every form of every export."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2KleinPipeline, QwenImagePipeline
from safetensors.torch import load_file
from tests.exporting.conftest import CASES, PROMPTS, SEEDS
from tests.raising import refuses
from tests.teachers import normalised

import dpdmd_pipeline
from dpdmd_pipeline.backbones.tensor_files import save_weights
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.exporting.sample import draw_latents, encode, open_student, sample

FORMS = [
    f"{name}/{form}"
    for name, case in CASES.items()
    for form in ("diffusers", "comfyui", *(["lora"] if case.header.kind == "lora" else []))
]


def latents(exported, form, seeds=SEEDS, prompts=PROMPTS):
    teacher = None if form == "diffusers" else exported.teacher
    runtime = {"device": "cpu", "dtype": "float32"}
    cond = encode(exported.file(form), teacher, prompts, batch_size=1, **runtime)
    return draw_latents(open_student(exported.file(form), teacher, **runtime), cond, seeds)


def as_ours(header, drawn):
    """Latents of a family's pipeline as its network sees them, [B, C, H, W]."""
    if header.family == "flux2_klein":
        return normalised(Flux2KleinPipeline._patchify_latents(drawn))
    if header.family == "qwen_image":
        return QwenImagePipeline._unpack_latents(drawn, *header.sizes[0], 4).squeeze(2)
    return drawn


@pytest.mark.parametrize("job", FORMS)
def test_diffusers_alone_draws_the_latents_of_our_sampler(exports, drawn_by_diffusers, job):
    name, form = job.split("/")
    ours = latents(exports[name], form)
    theirs = as_ours(exports[name].export.student.header, drawn_by_diffusers[job])
    assert ours.std() > 0.1 and not torch.allclose(ours[0], ours[1], atol=0.1)
    # relative to their size: random eps networks at timestep 999 draw latents of up to 50
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.std().item())


# ---- pictures


@pytest.mark.parametrize("name", ["sd3_shifted", "sdxl_renoise"])
def test_a_picture_depends_on_its_prompt_and_seed_alone(exports, name):
    folder = exports[name].file("diffusers")
    prompts, seeds = ["a red circle", "a blue square", "a red circle"], [7, 7, 8]
    together = sample(folder, prompts, seeds, batch_size=2, device="cpu")
    assert together.shape == (3, 3, 32, 32) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1
    alone = sample(folder, prompts[1:2], seeds[1:2], device="cpu")
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1]) and not torch.allclose(together[0], together[2])


def test_the_package_has_sample_and_no_other_lazy_attribute():
    assert dpdmd_pipeline.sample is sample
    with refuses(AttributeError, "'draw'"):
        _ = dpdmd_pipeline.draw


def test_a_moved_file_and_the_teacher_are_enough(exports, tmp_path):
    exported = exports["sd3_lora"]
    moved = tmp_path / "renamed.safetensors"
    moved.write_bytes(exported.file("lora").read_bytes())
    here = sample(exported.file("diffusers"), PROMPTS, SEEDS, device="cpu")
    there = sample(moved, PROMPTS, SEEDS, teacher=exported.teacher, device="cpu")
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


# ---- refusals


def test_a_missing_path_is_reported_first(exports, tmp_path):
    with refuses(FileNotFoundError, str(tmp_path / "export")):
        sample(tmp_path / "export", ["a red circle"], [0], device="cpu")
    with refuses(FileNotFoundError, str(tmp_path / "teacher")):
        sample(exports["sd3_lora"].file("lora"), ["a red circle"], [0], teacher=tmp_path / "teacher", device="cpu")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_damaged_part_of_an_export_is_refused_by_its_path(exports, tmp_path, part):
    folder = shutil.copytree(exports["sd3_shifted"].file("diffusers"), tmp_path / "export")
    (path,) = (folder / part).glob("*.safetensors")
    damage(path)
    with refuses(OSError, str(path), "checksum"):
        sample(folder, PROMPTS, SEEDS, device="cpu")


def test_a_damaged_file_is_refused_by_its_path(exports, tmp_path):
    exported = exports["sd3_lora"]
    path = shutil.copyfile(exported.file("lora"), tmp_path / "lora.safetensors")
    damage(path)
    with refuses(OSError, str(path), "checksum"):
        sample(path, PROMPTS, SEEDS, teacher=exported.teacher, device="cpu")


def damage(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_weights_need_a_teacher_and_a_pipeline_takes_none(exports):
    exported = exports["sd3_shifted"]
    with refuses(ValueError, "teacher="):
        sample(exported.file("comfyui"), PROMPTS, SEEDS)
    with refuses(ValueError, f"teacher={exported.teacher}"):
        sample(exported.file("diffusers"), PROMPTS, SEEDS, teacher=exported.teacher)


def test_prompts_and_seeds_are_equal_in_number(exports):
    for prompts, seeds in ((PROMPTS, [0]), ([], [])):
        with refuses(ValueError, f"{len(prompts)} prompts", f"{len(seeds)} seeds"):
            sample(exports["sd3_shifted"].file("diffusers"), prompts, seeds)


def test_a_teacher_of_another_prediction_is_refused(exports):
    with refuses(ValueError, "'v'", "'eps'"):
        sample(exports["sdxl_v_lora"].file("lora"), PROMPTS, SEEDS, teacher=exports["sdxl_eps"].teacher, device="cpu")


def test_a_student_that_was_not_exported_is_refused_with_the_stage(exports, tmp_path):
    exported = exports["sd3_shifted"]
    header = replace(exported.export.student.header, max_sequence_length=None)
    save_weights(tmp_path / "raw.safetensors", load_file(exported.file("comfyui")), header.metadata())
    with refuses(StageError, "dpdmd.max_sequence_length") as error:
        sample(tmp_path / "raw.safetensors", PROMPTS, SEEDS, teacher=exported.teacher)
    assert error.value.stage == "export"
