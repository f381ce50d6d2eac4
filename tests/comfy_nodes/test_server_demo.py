"""The small student that the pipeline exports draws in ComfyUI with this pack alone, as in Python.

Trained networks enlarge rounding errors: two float32 runs of one differ by 1e-4 and more in some pictures, whether
the second one is ComfyUI's or Python's own in another batch size. So the trained network has a test of its own, against
the same network in float64.
"""

import pytest
import torch
from comfy_server import REPOSITORY, Graph, RefusedError
from safetensors.torch import load_file
from tests.raising import refuses
from workflows import (
    SEED,
    SEEDS,
    assert_close,
    export_small_student,
    load_student,
    model_path,
    require_comfyui,
    sample,
    sd3_units,
)

from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds
from dpdmd_pipeline.exporting.sample import draw_latents, encode, open_student
from dpdmd_pipeline.exporting.sample import sample as sample_in_python

require_comfyui()

TITLE, PROMPT, TRAINED = "shapes-dpdmd-4step", "a red circle", "trained"


@pytest.fixture(scope="module")
def export(server, tmp_path_factory):
    """An export of an untrained student of the embedded world's sizes, copied to where the guide says."""
    folder = tmp_path_factory.mktemp("export")
    export_small_student(folder, model_path(server, ""), TITLE)
    return folder / "diffusers"


def pictures(server, **options):
    graph, path = Graph(), server.file(".safetensors")
    prompt = graph.add("DPDMDDemoPrompt", pipeline_name=TITLE, text=PROMPT)
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=len(SEEDS))
    latents = sample(graph, load_student(graph, f"diffusion_models/{TITLE}.safetensors"), prompt, latent, seed=SEED)
    vae = graph.add("DPDMDDemoVAE", **{"pipeline_name": TITLE, "enlarge": 8} | options)
    image = graph.add("VAEDecode", samples=latents, vae=vae)
    graph.add("TestSaveImage", image=image, path=path)
    server.run(graph)
    return load_file(path)["image"]


def test_its_pictures_equal_those_of_the_training_project(server, export):
    images = pictures(server)
    assert images.shape == (len(SEEDS), 256, 256, 3)
    expected = sample_in_python(export, [PROMPT] * len(SEEDS), SEEDS)
    assert_close(images[:, ::8, ::8].movedim(-1, 1), expected, 1e-5)
    assert torch.equal(images[:, ::8, ::8].repeat_interleave(8, 1).repeat_interleave(8, 2), images)


def test_a_pipeline_that_is_not_there_is_refused_and_the_server_goes_on(server, export):
    with refuses(RefusedError, "none"):
        pictures(server, pipeline_name="none")
    assert pictures(server, enlarge=1).shape == (len(SEEDS), 32, 32, 3)


@torch.no_grad()
def test_with_trained_weights_it_is_as_exact_as_the_training_project(server, tmp_path):
    """Errors against float64 of both, in the median over pictures; a wrong formula would raise ComfyUI's alone."""
    export_small_student(tmp_path, model_path(server, ""), TRAINED, REPOSITORY / "data/06_models/shapes_teacher")
    folder, seeds, errors = tmp_path / "diffusers", [*range(100, 116)], []
    student = open_student(folder, None, "cpu", "float32")
    exact = open_student(folder, None, "cpu", "float32").network.double()
    for prompt in (PROMPT, "a green triangle"):
        graph = Graph()
        latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=len(seeds))
        loader = load_student(graph, f"diffusion_models/{TRAINED}.safetensors")
        text = graph.add("DPDMDDemoPrompt", pipeline_name=TRAINED, text=prompt)
        nodes = sd3_units(server.latents(graph, sample(graph, loader, text, latent, seed=seeds[0])))
        cond = encode(folder, None, [prompt] * len(seeds), 8, "cpu", "float32")
        expected = noise_from_seeds(seeds, student.backbone.latent_shape).double()
        for level, end in zip((1.0, 0.75, 0.5, 0.25), (0.75, 0.5, 0.25, 0.0), strict=True):
            velocity = exact(
                hidden_states=expected,
                timestep=torch.full((len(seeds),), 1000 * level),
                encoder_hidden_states=cond["prompt_embeds"].double(),
                pooled_projections=cond["pooled_embeds"].double(),
            ).sample
            expected = expected + (end - level) * velocity
        errors += [
            (latents - expected).abs().amax((1, 2, 3)) for latents in (nodes, draw_latents(student, cond, seeds))
        ]
    comfyui, python = (torch.cat(errors[side::2]).median().item() for side in (0, 1))
    print(f"median error: ComfyUI {comfyui:.1e}, Python {python:.1e}")
    assert comfyui <= 1e-5 and python <= 1e-5 and comfyui <= 3 * python
