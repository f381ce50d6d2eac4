"""Patches of other nodes on a student, inside a real ComfyUI: negative prompts, values per picture, wrappers."""

from pathlib import Path

import pytest
from comfy_server import Graph, RefusedError
from safetensors.torch import load_file
from tests.raising import refuses
from workflows import (
    SD3_SHAPE,
    SDXL_SHAPE,
    SEED,
    TRAILING,
    assert_close,
    conditioning,
    draw,
    empty_latent,
    load_stock,
    load_student,
    require_comfyui,
    sample,
    sample_with_parts,
    scheduler,
)

require_comfyui()

GUIDANCE = {
    "NAGuidance": {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
}


# ---- a negative prompt


def guided(server, graph, file, patch):
    """A tiny SDXL with a patch, without one for None."""
    if patch is not None and patch not in server.get("object_info"):
        pytest.skip(f"this version of ComfyUI has no {patch}")
    model = load_stock(graph, file)
    return model if patch is None else graph.add(patch, model=model, **GUIDANCE[patch])


@pytest.mark.parametrize("patch", GUIDANCE)
def test_a_patch_that_compares_with_a_negative_prompt_gives_comfyuis_own_picture(server, sdxl_file, sdxl_prompt, patch):
    graph = Graph()
    model, prompt = guided(server, graph, sdxl_file, patch), conditioning(server, graph, sdxl_prompt)
    negative = conditioning(server, graph, {key: -value for key, value in sdxl_prompt.items()})
    latent, sigmas = empty_latent(server, graph, SDXL_SHAPE), scheduler(graph, model, steps=4, schedule=TRAILING)
    guider = graph.add("CFGGuider", model=model, positive=prompt, negative=negative, cfg=1.0)
    theirs = sample_with_parts(graph, latent, guider=guider, sigmas=sigmas)
    inputs = {"sigmas": sigmas, "method": "deterministic"}
    mine = sample(graph, model, prompt, latent, negative=negative, **inputs)
    plain = sample(graph, load_stock(graph, sdxl_file), prompt, latent, negative=negative, **inputs)
    paths = [server.file(".safetensors") for _ in range(2)]
    for path, result in zip(paths, (theirs, plain), strict=True):
        graph.add("TestSaveLatent", latent=result, path=path)
    latents = server.latents(graph, mine)
    theirs, plain = (load_file(path)["samples"] for path in paths)
    assert_close(latents, theirs, 1e-5 * theirs.abs().max().item())
    assert (latents - plain).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize("patch", GUIDANCE)
def test_such_a_patch_without_a_negative_prompt_is_refused(server, sdxl_file, sdxl_prompt, patch):
    with refuses(RefusedError, "negative", "patch"):
        draw(
            server,
            lambda graph: guided(server, graph, sdxl_file, patch),
            sdxl_prompt,
            shape=SDXL_SHAPE,
            schedule=TRAILING,
        )


def test_without_such_a_patch_a_negative_prompt_costs_and_changes_nothing(server, sd3_student, sd3_prompt):
    results = []
    for prompts in (["positive"], ["positive", "negative"]):
        graph, calls = Graph(), server.file(".calls")
        model = graph.add("TestCountCalls", model=load_student(graph, sd3_student), seconds=0.0, path=calls)
        prompt = conditioning(server, graph, sd3_prompt)
        inputs = {"negative": prompt} if "negative" in prompts else {}
        latent = sample(graph, model, prompt, empty_latent(server, graph, SD3_SHAPE, 1), **inputs)
        results.append((server.latents(graph, latent), Path(calls).read_text()))
    assert results[0][0].equal(results[1][0]) and results[0][1] == results[1][1]


# ---- values per picture


@pytest.mark.parametrize("form", ["function", "attention", "apply_model"])
def test_a_patch_with_a_value_per_picture_reaches_every_picture(server, sdxl_file, sdxl_prompt, form):
    def patched(values):
        return lambda graph: graph.add(
            "TestScalePictures", model=load_stock(graph, sdxl_file), form=form, values=values, path=""
        )

    inputs = {"shape": SDXL_SHAPE, "method": "deterministic", "schedule": TRAILING}
    batch = draw(server, patched("0.5,1,1.5"), sdxl_prompt, **inputs)
    for index, value in enumerate(["0.5", "1", "1.5"]):
        (alone,) = draw(server, patched(value), sdxl_prompt, count=1, seed=SEED + index, **inputs)
        assert_close(batch[index], alone, 1e-5 * alone.abs().max().item())


# ---- wrappers under Teacher First Step


def first_step(server, graph, sd3_prompt, student, teacher, sigmas):
    prompt = conditioning(server, graph, sd3_prompt)
    models = {"student": student, "teacher": teacher}
    guider = graph.add(
        "DPDMDFirstStepGuider", **models, positive=prompt, negative=prompt, teacher_steps=1, teacher_cfg=3.5
    )
    return sample_with_parts(graph, empty_latent(server, graph, SD3_SHAPE, 1), guider=guider, sigmas=sigmas)


@pytest.mark.parametrize("form", ["predict_noise", "calc_cond_batch", "apply_model"])
@pytest.mark.parametrize(("role", "calls"), [("student", 3), ("teacher", 1)])
def test_a_wrapper_works_in_the_steps_of_its_own_model(server, sd3_student, sd3_file, sd3_prompt, form, role, calls):
    graph, path = Graph(), server.file(".calls")
    models = {"student": load_student(graph, sd3_student), "teacher": load_stock(graph, sd3_file)}
    sigmas = scheduler(graph, models["student"])
    models[role] = graph.add("TestWrap", model=models[role], form=form, path=path)
    server.latents(graph, first_step(server, graph, sd3_prompt, **models, sigmas=sigmas))
    assert Path(path).read_text().split() == [form] * calls


@pytest.mark.parametrize("form", ["outer_sample", "sampler_sample"])
def test_a_student_with_a_wrapper_of_whole_runs_is_refused(server, sd3_student, sd3_file, sd3_prompt, form):
    graph = Graph()
    student, teacher = load_student(graph, sd3_student), load_stock(graph, sd3_file)
    sigmas = scheduler(graph, student)
    student = graph.add("TestWrap", model=student, form=form, path=server.file(".calls"))
    with refuses(RefusedError, "student", "test", "whole runs"):
        server.latents(graph, first_step(server, graph, sd3_prompt, student, teacher, sigmas))
