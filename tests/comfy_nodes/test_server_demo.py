"""The small student that the pipeline exports draws in ComfyUI with this pack alone, as in Python."""

import shutil

import pytest
import torch
from comfy_server import Graph, RefusedError
from safetensors.torch import load_file
from tests.raising import refuses
from workflows import SEED, SEEDS, assert_close, load_student, model_path, require_comfyui, sample

from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.exporting.formats import Export, Licence, Student
from dpdmd_pipeline.exporting.sample import sample as sample_in_python

require_comfyui()

TITLE, PROMPT = "shapes-dpdmd-4step", "a red circle"


@pytest.fixture(scope="module")
def export(server, tmp_path_factory):
    """An export of an untrained student of the embedded world's sizes, copied to where the guide says."""
    from dpdmd_pipeline.shapes.models import make_pipeline

    folder = tmp_path_factory.mktemp("export")
    make_pipeline(max_length=12, shift=1.0, seed=0).save_pretrained(folder / "teacher")
    weights = make_pipeline(max_length=12, shift=1.0, seed=1).transformer.state_dict()
    header = StudentHeader("sd3", [1.0, 0.75, 0.5, 0.25, 0.0], shift=1.0, resolution=32, max_sequence_length=0)
    student, licence = Student(header, weights, None), Licence("apache-2.0", None, None)
    forms = ["diffusers", "comfyui"]
    export = Export(student, folder / "teacher", TITLE, forms, "float32", licence, None, {}, measure="")
    export.write(folder)
    file = model_path(server, f"diffusion_models/{TITLE}.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / export.files["comfyui"], file)
    shutil.copytree(folder / "diffusers", model_path(server, f"diffusers/{TITLE}"))
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
