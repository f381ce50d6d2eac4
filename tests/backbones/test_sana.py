"""Special to SANA: an instruction before the prompt, a mask, a scaled timestep, two names of one shift."""

import shutil

import pytest
import torch
from tests.raising import refuses

from dpdmd_pipeline.backbones.base import token_limits
from dpdmd_pipeline.backbones.sana import Sana, load
from dpdmd_pipeline.dpdmd.noise import flow_level

OPTIONS = {"resolution": 32, "max_sequence_length": 20, "level_range": (0.02, 0.98)}


@pytest.fixture(scope="module")
def backbone(tiny_sana):
    return Sana(tiny_sana, **OPTIONS)


def noise(seed=0):
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_prompt_is_truncated_at_the_token_limit(tiny_sana, backbone):
    """Tokens beyond the limit change nothing; the last token within it does."""
    from transformers import AutoTokenizer

    ((name, limit),) = token_limits("sana", tiny_sana, OPTIONS["max_sequence_length"]).items()
    tokenizer = AutoTokenizer.from_pretrained(tiny_sana / name)
    texts = ["a" * length for length in range(limit.tokens - 2, limit.tokens + 3)]
    counts = limit.count(tokenizer, [f" {text.upper()} " for text in texts])  # as the pipeline strips and lowers them
    assert counts == [len(text) for text in texts]
    embeds = backbone.encode(texts)["prompt_embeds"]
    for shorter, longer, tokens in zip(embeds, embeds[1:], counts[1:], strict=False):
        assert torch.equal(shorter, longer) == (tokens > limit.tokens)


def test_prompts_have_the_instruction_of_the_pipelines_call_and_the_empty_one_has_none(tiny_sana, backbone):
    from diffusers import SanaPipeline

    pipeline, encodings = SanaPipeline.from_pretrained(tiny_sana), []
    encode = pipeline.encode_prompt
    pipeline.encode_prompt = lambda *args, **kwargs: encodings.append(encode(*args, **kwargs)) or encodings[-1]
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "latent"}
    pipeline(
        "a red circle", num_inference_steps=1, guidance_scale=4.5, max_sequence_length=20, latents=noise()[:1], **call
    )
    embeds, mask, empty_embeds, empty_mask = encodings[0]
    cond = backbone.encode(["", "a red circle", ""])  # the order must survive
    for row, expected, expected_mask in (
        (0, empty_embeds, empty_mask),
        (1, embeds, mask),
        (2, empty_embeds, empty_mask),
    ):
        torch.testing.assert_close(cond["prompt_embeds"][row], expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(cond["prompt_mask"][row], expected_mask[0].float())
    assert bool((cond["prompt_mask"] == 0).any())  # otherwise the mask is not tested


def test_padding_is_masked(backbone):
    cond, level, model = backbone.encode(["a"] * 2), backbone.schedule(4)[1], backbone.load_model()
    other = {**cond, "prompt_embeds": cond["prompt_embeds"] + (1 - cond["prompt_mask"])[..., None]}
    with torch.no_grad():
        torch.testing.assert_close(*(backbone.denoise(model, noise(), level, c) for c in (cond, other)))


def test_denoise_is_latents_minus_sigma_times_the_networks_velocity(backbone):
    model, cond = backbone.load_model(), backbone.encode(["a red circle", "a blue square"])
    sigma = torch.tensor([0.8, 0.3])
    with torch.no_grad():
        velocity = model(
            noise(),
            timestep=1000 * sigma * 0.5,  # the timestep_scale of the tiny network
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_mask"],
            return_dict=False,
        )[0]
        x0 = backbone.denoise(model, noise(), flow_level(sigma.view(-1, 1, 1, 1)), cond)
    torch.testing.assert_close(x0, noise() - sigma.view(-1, 1, 1, 1) * velocity)


def test_the_shift_is_read_under_either_samplers_name(tiny_sana, backbone, tmp_path):
    from diffusers import DPMSolverMultistepScheduler

    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sana, folder)
    # the published config of SANA
    DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    assert Sana(folder, **OPTIONS).shift == backbone.shift == 3.0
    torch.testing.assert_close(backbone.student_schedule("shifted", 4).sigma, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    torch.testing.assert_close(backbone.student_schedule([1.0, 0.5], 2).sigma, torch.tensor([1, 0.5, 0]))


@pytest.mark.parametrize(
    ("file", "values", "fact"),
    [
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
    ],
)
def test_a_folder_of_another_kind_is_refused(tiny_sana, edited, file, values, fact):
    with pytest.raises(ValueError, match=fact):
        load(edited(tiny_sana, file, **values), **OPTIONS)


def test_a_diffusion_scheduler_is_refused(tiny_sana, tmp_path):
    from diffusers import DDIMScheduler

    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sana, folder)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    with refuses(ValueError, "flow_prediction"):
        load(folder, **OPTIONS)


@pytest.mark.parametrize("options", [{"resolution": 30}, {"max_sequence_length": 0}])
def test_options_that_do_not_fit_are_refused(tiny_sana, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"backbone.{name} (is )?{options[name]}"):
        load(tiny_sana, **OPTIONS | options)


def test_the_grid_must_have_as_many_levels_as_steps(backbone):
    with refuses(ValueError, "2", "num_steps=4"):
        backbone.student_schedule([1.0, 0.5], 4)
