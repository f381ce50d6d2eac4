"""A real ComfyUI for the server tests, and the tiny networks that go into it."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from comfy_server import REPOSITORY, ComfyServer
from workflows import HEADER, save_weights


@pytest.fixture(scope="session")
def comfyui():
    """The checkout in COMFYUI_PATH. A wrong path fails instead of skipping the tests."""
    path = Path(os.environ["COMFYUI_PATH"])
    if not (path / "main.py").is_file():
        pytest.fail(f"COMFYUI_PATH is {path}, which has no ComfyUI: set it to a checkout, the folder of main.py")
    return path


@pytest.fixture(scope="session")
def start_server(comfyui, tmp_path_factory):
    """A context manager: a ComfyUI with options, a pack and the test nodes, run by COMFY_PYTHON if that is set."""

    @contextmanager
    def start(pack, *options):
        python = os.environ.get("COMFY_PYTHON", sys.executable)
        running = ComfyServer(comfyui, python, tmp_path_factory.mktemp("comfyui"), pack, options)
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.stop()

    return start


@pytest.fixture(scope="session")
def server(start_server):
    """A running ComfyUI with this pack, shared by all tests that do not change it."""
    with start_server(REPOSITORY / "comfy_nodes") as running:
        yield running


@pytest.fixture(scope="session")
def tiny_sd3():
    """A tiny SD3.5-Medium: dual attention in the first layer, normalised queries and keys, random weights."""
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=16,
            pos_embed_max_size=32,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=64,
            caption_projection_dim=128,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ).eval()


@pytest.fixture(scope="session")
def tiny_sdxl():
    """A tiny SDXL UNet of the sizes that the test nodes add to ComfyUI; random weights."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 1),
            attention_head_dim=(1, 2),  # in diffusers this is the number of heads; each is 64 wide
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=32 + 6 * 256,
        ).eval()


@pytest.fixture(scope="session")
def tiny_flux():
    """A tiny FLUX.1-dev of one block of each kind; random weights."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=128,
            num_attention_heads=1,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
        ).eval()


def noise(*shape, seed=0):
    """Gaussian numbers [*shape] from their own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def sd3_prompt():
    """Embeddings of one prompt, of the sizes of `tiny_sd3`."""
    return {"prompt_embeds": noise(1, 20, 32, seed=1), "pooled_embeds": noise(1, 16, seed=2)}


@pytest.fixture(scope="session")
def sdxl_prompt():
    """Embeddings of one prompt, of the sizes of `tiny_sdxl`."""
    return {"prompt_embeds": noise(1, 20, 64, seed=1), "pooled_embeds": noise(1, 32, seed=2)}


@pytest.fixture(scope="session")
def sd3_file(server, tiny_sd3):
    """The tiny SD3 as a stock file without a header."""
    return save_weights(server, "diffusion_models/sd3.safetensors", tiny_sd3.state_dict())


@pytest.fixture(scope="session")
def sd3_student(server, tiny_sd3):
    """The tiny SD3 as a student with its own schedule."""
    return save_weights(server, "diffusion_models/sd3_student.safetensors", tiny_sd3.state_dict(), HEADER)


@pytest.fixture(scope="session")
def sdxl_file(server, tiny_sdxl):
    """The tiny SDXL without a header."""
    return save_weights(server, "diffusion_models/sdxl.safetensors", tiny_sdxl.state_dict())
