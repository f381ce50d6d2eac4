"""The small student that the pipeline exports draws in ComfyUI with this pack alone, as in Python."""

import pytest
import torch
from comfy_server import Graph, RefusedError
from safetensors.torch import load_file
from tests.raising import refuses
from workflows import SEED, SEEDS, assert_close, export_small_student, load_student, model_path, require_comfyui, sample

from dpdmd_pipeline.exporting.sample import sample as sample_in_python

require_comfyui()

TITLE, PROMPT = "shapes-dpdmd-4step", "a red circle"


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
