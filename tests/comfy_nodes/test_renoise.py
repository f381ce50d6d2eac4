"""The re-noise sampler equals the formula in the package's own coordinates."""

from types import SimpleNamespace

import pytest
import torch
from comfy_nodes.noise import BatchStream, ImageStreams
from comfy_nodes.sampling import sample_renoise

from dpdmd_pipeline.dpdmd.noise import add_noise, flow_schedule, vp_schedule

SHAPE = (4, 6, 10)
ALPHAS_CUMPROD = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
LEVELS = {"flow": flow_schedule([1.0, 0.7, 0.2, 0.0]), "vp": vp_schedule(4, ALPHAS_CUMPROD)}


class Model:
    """A network with ComfyUI's rule of adding noise, as deeply nested as ComfyUI nests it."""

    def __init__(self, kind):
        def noise_scaling(sigma, noise, x0):
            return (1 - sigma) * x0 + sigma * noise if kind == "flow" else x0 + sigma * noise

        self.inner_model = SimpleNamespace(
            inner_model=SimpleNamespace(model_sampling=SimpleNamespace(noise_scaling=noise_scaling))
        )
        self.sigmas = []

    def __call__(self, x, sigma, **extra_args):
        self.sigmas.append(sigma[0].item())
        return torch.tanh(x) * extra_args.get("gain", 1.0)


def comfy_sigmas(kind):
    levels = LEVELS[kind]
    return levels.sigma if kind == "flow" else levels.sigma / levels.alpha


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_each_step_adds_the_next_noise_of_each_pictures_generator(kind):
    levels, generators = LEVELS[kind], [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    def fresh():
        return torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators])

    def denoise(latents, level):
        return torch.tanh(latents if kind == "flow" else latents / level.alpha)  # ComfyUI's x is latents / alpha

    start = latents = fresh()
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        x0 = denoise(latents, level)
        latents = add_noise(x0, fresh(), following)
    x = start if kind == "flow" else start / levels.alpha[0]
    latents = sample_renoise(Model(kind), x, comfy_sigmas(kind), {"seed": 7}, disable=True)
    torch.testing.assert_close(latents, x0, rtol=1e-5, atol=1e-6)


def test_the_network_is_called_once_per_step_and_the_callback_sees_each():
    model, states = Model("flow"), []
    streams = ImageStreams([7, 8])
    sample_renoise(model, torch.zeros(2, *SHAPE), LEVELS["flow"].sigma, {"gain": 2.0}, states.append, True, streams)
    assert model.sigmas == pytest.approx([1.0, 0.7, 0.2])
    assert [state["i"] for state in states] == [0, 1, 2]
    assert all({"x", "denoised", "sigma", "sigma_hat"} <= state.keys() for state in states)


def test_the_streams_argument_decides_the_noise():
    x, sigmas = torch.randn(3, *SHAPE), LEVELS["flow"].sigma
    by_batch = sample_renoise(Model("flow"), x, sigmas, disable=True, streams=BatchStream(7, 3))
    by_image = sample_renoise(Model("flow"), x, sigmas, disable=True, streams=ImageStreams([7, 8, 9]))
    assert not torch.equal(by_batch, by_image)
