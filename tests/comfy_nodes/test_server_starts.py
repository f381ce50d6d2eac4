"""Teacher Start on a real ComfyUI: equal to two stock samplers, to our own sampler, and one message for bad input."""

from pathlib import Path

import pytest
import torch
from comfy_server import Graph, RefusedError
from safetensors.torch import load_file
from tests.raising import refuses
from workflows import (
    HEADER,
    SD3_MODULES,
    SD3_SHAPE,
    SDXL_HEADER,
    SDXL_SCALE,
    SDXL_SHAPE,
    SEED,
    SEEDS,
    TRAINED,
    assert_close,
    comfyui_version,
    conditioning,
    load_stock,
    load_student,
    merge_lora,
    random_lora,
    require_comfyui,
    respell,
    sample_with_parts,
    save_weights,
    scheduler,
    sd3_denoiser,
    sd3_units,
)

from dpdmd_pipeline.dpdmd.noise import flow_schedule
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

require_comfyui()

SDXL_MODULES = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "time_embedding.linear_1"]
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
TABLE = (1 / (1 - BETAS).cumprod(0) - 1).sqrt().tolist()  # sigma of SDXL's timesteps
FOREIGN = ["Flux", "FluxSchnell", "QwenImage", "Lumina2", "ZImage"]


@pytest.fixture(scope="module")
def few_step(tiny_sd3, tiny_sdxl):
    """The few-step networks: another network of each family."""
    return {
        "sd3": merge_lora(tiny_sd3, random_lora(tiny_sd3, SD3_MODULES), 1.0),
        "sdxl": merge_lora(tiny_sdxl, random_lora(tiny_sdxl, SDXL_MODULES), 1.0),
    }


@pytest.fixture(scope="module")
def sd3_pair(server, sd3_file, few_step):
    """Files of a base model and of a few-step model with a header."""
    name = save_weights(server, "diffusion_models/few_sd3.safetensors", few_step["sd3"].state_dict(), HEADER)
    return sd3_file, name


@pytest.fixture(scope="module")
def sdxl_pair(server, sdxl_file, few_step):
    """The same for SDXL."""
    name = save_weights(server, "diffusion_models/few_sdxl.safetensors", few_step["sdxl"].state_dict(), SDXL_HEADER)
    return sdxl_file, name


class Start:
    """A workflow with two models, the prompts and a latent, and ways to finish it."""

    def __init__(self, server, load, prompt, latent):
        self.server, self.graph = server, Graph()
        self.base, self.few_step = load(self.graph)
        self.positive = conditioning(server, self.graph, prompt)
        self.negative = conditioning(server, self.graph, {key: value.flip(-1) for key, value in prompt.items()})
        self.latent = self.graph.add("TestLatent", path=server.tensor_file(**latent))

    def sigmas(self, values):
        text = ",".join(repr(float(value)) for value in values)
        return self.graph.add("ManualSigmasForTests", text=text, path="")

    def node(self, kind="DPDMDTeacherStart", **inputs):
        """Teacher Start, or its guider; an input of None is left out."""
        values = {"teacher_steps": 3, "landing": 1, "teacher_cfg": 3.5, "base_model": self.base}
        values |= {"few_step_model": self.few_step, "positive": self.positive, "negative": self.negative}
        if kind == "DPDMDTeacherStart":
            values |= {"seed": SEED, "method": "auto", "per_image_seed": True, "latent_image": self.latent}
        return self.graph.add(kind, **{key: value for key, value in (values | inputs).items() if value is not None})

    def stock_chain(self, teacher_sigmas, student_sigmas):
        """Two of ComfyUI's own samplers: the base model with guidance, then the few-step model."""
        add = self.graph.add
        euler = add("KSamplerSelect", sampler_name="euler")
        first = add(
            "SamplerCustomAdvanced",
            noise=add("RandomNoise", noise_seed=SEED),
            guider=add("CFGGuider", model=self.base, cfg=3.5, positive=self.positive, negative=self.negative),
            sampler=euler,
            sigmas=teacher_sigmas,
            latent_image=self.latent,
        )
        return add(
            "SamplerCustomAdvanced",
            noise=add("DisableNoise"),
            guider=add("BasicGuider", model=self.few_step, conditioning=self.positive),
            sampler=euler,
            sigmas=student_sigmas,
            latent_image=first,
        )

    def latents(self, output):
        return self.server.latents(self.graph, output)


def zeros(shape, count=1):
    return {"samples": torch.zeros(count, *shape)}


def sd3_start(server, pair, prompt, latent=None, load=load_student):
    def models(graph):
        return load_stock(graph, pair[0]), load(graph, pair[1])

    return Start(server, models, prompt, latent or zeros(SD3_SHAPE))


def assert_equal_to_stock(latents, stock):
    """Relative to the latents' size: those of SDXL are hundreds."""
    assert_close(latents, stock, 1e-6 * max(1.0, stock.abs().max().item()))


# ---- equal to two stock samplers


@pytest.mark.parametrize(("landing", "steps"), [(1, 3), (2, 4), (3, 1)])
def test_it_equals_two_stock_samplers_on_split_sigmas(server, sd3_pair, sd3_prompt, landing, steps):
    start = sd3_start(server, sd3_pair, sd3_prompt)
    teacher = torch.linspace(1, TRAINED[landing], steps + 1)
    stock = start.latents(start.stock_chain(start.sigmas(teacher), start.sigmas(TRAINED[landing:])))
    node = start.node(landing=landing, teacher_steps=steps, per_image_seed=False)
    assert_equal_to_stock(start.latents(node), stock)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_it_equals_two_stock_samplers_on_a_table_of_timesteps(server, sdxl_pair, sdxl_prompt, prediction):
    def models(graph):
        for name in sdxl_pair:
            model = load_stock(graph, name)
            if prediction == "v":
                model = graph.add("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
            yield model

    start = Start(server, models, sdxl_prompt, zeros(SDXL_SHAPE))
    teacher, student = ([TABLE[step] for step in steps] for steps in ((999, 916, 832, 749), (749, 499, 249)))
    student.append(0.0)
    stock = start.latents(start.stock_chain(start.sigmas(teacher), start.sigmas(student)))
    inputs = {"sigmas": start.sigmas(teacher[:1] + student), "method": "deterministic", "per_image_seed": False}
    assert_equal_to_stock(start.latents(start.node(**inputs)), stock)


@pytest.mark.parametrize("family", FOREIGN)
def test_it_equals_two_stock_samplers_for_families_that_this_project_does_not_train(server, sd3_prompt, family):
    if family == "ZImage" and comfyui_version() == "0.3.64":
        pytest.skip("this ComfyUI has no Z-Image")

    def models(graph):
        return [graph.add("TestTinyModel", family=family, seed=seed, path="") for seed in (1, 2)]

    mask = {"attention_mask": torch.ones(1, 20, dtype=torch.int)} if family in ("Lumina2", "ZImage") else {}
    start = Start(server, models, sd3_prompt | mask, zeros(SD3_SHAPE))
    sigmas = start.graph.add("BasicScheduler", model=start.few_step, scheduler="simple", steps=4, denoise=1.0)
    high_low = start.graph.add("SplitSigmas", sigmas=sigmas, step=1)
    path = server.file(".safetensors")
    start.graph.add("TestSaveSigmas", sigmas=high_low, path=path)
    server.run(start.graph)
    teacher = torch.linspace(*load_file(path)["sigmas"].tolist(), 4)
    stock = start.latents(start.stock_chain(start.sigmas(teacher), [high_low[0], 1]))
    node = start.latents(start.node(sigmas=sigmas, per_image_seed=False))
    assert_equal_to_stock(node, stock)
    assert (node - start.latents(start.node(sigmas=sigmas, per_image_seed=False, teacher_steps=1))).abs().max() > 1e-3


def test_the_guider_in_the_advanced_sampler_equals_the_node(server, sd3_pair, sd3_prompt):
    start = sd3_start(server, sd3_pair, sd3_prompt, zeros(SD3_SHAPE, 2))
    guider = start.node("DPDMDTeacherStartGuider")
    parts = sample_with_parts(start.graph, start.latent, guider=guider, sigmas=scheduler(start.graph, start.few_step))
    assert_close(start.latents(parts), start.latents(start.node()), 1e-5)


# ---- equal to our own sampler


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_equals_our_own_samplers(server, sd3_pair, sd3_file, tiny_sd3, few_step, sd3_prompt, kind):
    def models(graph):
        base = load_stock(graph, sd3_file)
        if kind == "full":
            return base, load_student(graph, sd3_pair[1])
        header = HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "4"}
        lora = respell(random_lora(tiny_sd3, SD3_MODULES), "transformer.")
        name = save_weights(server, "loras/few_step.safetensors", lora, header)
        return base, load_student(graph, name, base_model=base)

    start = Start(server, models, sd3_prompt, zeros(SD3_SHAPE, 3))
    negative = {key: value.flip(-1) for key, value in sd3_prompt.items()}

    def guided(latents, level):
        cond, uncond = (sd3_denoiser(tiny_sd3, prompt)(latents, level) for prompt in (sd3_prompt, negative))
        return uncond + 3.5 * (cond - uncond)

    with torch.no_grad():
        teacher = flow_schedule([*torch.linspace(1, TRAINED[2], 5).tolist(), 0.0])[:-1]
        latents = rollout(guided, noise_from_seeds(SEEDS, SD3_SHAPE), teacher)
        expected = rollout(sd3_denoiser(few_step["sd3"], sd3_prompt), latents, flow_schedule(TRAINED)[2:])
    for _again in range(2):
        assert_close(sd3_units(start.latents(start.node(landing=2, teacher_steps=4))), expected, 1e-5)


def test_a_renoising_student_goes_on_with_fresh_noise_of_each_picture(server, sdxl_pair, sdxl_prompt):
    """The method is the header's; a picture is the same in a batch and alone."""

    def models(graph):
        return load_stock(graph, sdxl_pair[0]), load_student(graph, sdxl_pair[1])

    batch, alone = (Start(server, models, sdxl_prompt, zeros(SDXL_SHAPE, count)) for count in (2, 1))
    pictures = batch.latents(batch.node())
    assert torch.equal(pictures[1:], alone.latents(alone.node(seed=SEED + 1)))
    euler = batch.latents(batch.node(method="deterministic"))
    assert (pictures - euler).abs().max() * SDXL_SCALE > 0.1


# ---- what it costs and keeps


def test_the_base_model_is_called_only_in_its_own_steps(server, sd3_pair, sd3_prompt):
    start, calls = sd3_start(server, sd3_pair, sd3_prompt), [server.file(".calls") for _ in range(2)]
    models = [
        start.graph.add("TestCountCalls", model=model, seconds=0.0, path=path)
        for model, path in zip((start.base, start.few_step), calls, strict=True)
    ]
    inputs = {"base_model": models[0], "few_step_model": models[1], "teacher_cfg": 1.0, "negative": None}
    start.latents(start.node(**inputs))
    levels = [[line.split()[0] for line in Path(path).read_text().splitlines()] for path in calls]
    assert levels == [["1", "0.966667", "0.933333"], ["0.9", "0.6", "0.3"]]


def test_a_masked_picture_keeps_what_is_outside_the_mask(server, sd3_pair, sd3_prompt):
    generator = torch.Generator().manual_seed(3)
    picture = torch.randn(1, *SD3_SHAPE, generator=generator)
    mask = torch.zeros(1, 8 * SD3_SHAPE[1], 8 * SD3_SHAPE[2])
    mask[..., : 4 * SD3_SHAPE[2]] = 1.0
    start = sd3_start(server, sd3_pair, sd3_prompt, {"samples": picture, "noise_mask": mask})
    latents = start.latents(start.node())
    kept = SD3_SHAPE[2] // 2
    assert_close(latents[..., kept:], picture[..., kept:], 1e-5)
    assert (latents[..., :kept] - picture[..., :kept]).abs().max() > 0.1


# ---- refusals


@pytest.mark.parametrize(
    ("inputs", "facts"),
    [
        ({"landing": 4}, ("landing", "4", "1 to 3")),
        ({"negative": None}, ("teacher_cfg", "3.5", "negative")),
        ({"sigmas": [1.0, 0.0]}, ("1, 0", "one step")),
        ({"sigmas": [1.0, 0.9, 0.95, 0.0]}, ("must fall",)),
        ({"sigmas": [1.5, 0.9, 0.0]}, ("1.5", "above 1")),
        ({"swapped": True}, ("base_model", "student of 4 steps")),
        ({"same": True}, ("same weights", "LoRA")),
        ({"other": "sdxl"}, ("base_model", "few_step_model", "sd3 flow", "sdxl eps")),
        ({"other": "Flux"}, ("base_model", "few_step_model", "sd3 flow SD3", "Flux flow Flux")),
        ({"other": "format"}, ("base_model", "few_step_model", "sd3 flow SD3", "sd3 flow Flux")),
        ({"other": "none"}, ("no DP-DMD header", "sigmas")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_message_in_the_node(server, sd3_pair, sd3_file, sdxl_file, sd3_prompt, inputs, facts):
    start, inputs = sd3_start(server, sd3_pair, sd3_prompt), dict(inputs)
    other = {
        "sdxl": lambda: load_stock(start.graph, sdxl_file),
        "format": lambda: start.graph.add("TestLatentFormat", model=start.base, path=""),
        "none": lambda: start.graph.add("TestPatch", model=start.base, path=""),
    }
    if inputs.pop("swapped", False):
        inputs |= {"base_model": start.few_step, "few_step_model": start.base}
    elif inputs.pop("same", False):
        inputs["few_step_model"] = start.base
    elif kind := inputs.pop("other", None):
        tiny = {"family": kind, "seed": 1, "path": ""}
        model = other[kind]() if kind in other else start.graph.add("TestTinyModel", **tiny)
        inputs |= {"few_step_model": model} if kind == "none" else {"base_model": model}
    if "sigmas" in inputs:
        inputs["sigmas"] = start.sigmas(inputs["sigmas"])
    with refuses(RefusedError, *facts):
        start.latents(start.node(**inputs))
    assert_server_works(server, sd3_pair, sd3_prompt)


def test_models_with_different_text_encoders_are_refused(server, sd3_pair, sd3_prompt):
    def models(graph):
        return [graph.add("TestTinyModel", family=family, seed=1, path="") for family in ("Lumina2", "OtherText")]

    start = Start(server, models, sd3_prompt, zeros(SD3_SHAPE))
    with refuses(RefusedError, "text encoders", "cap_feat_dim", "32", "48"):
        start.latents(start.node(sigmas=start.sigmas(TRAINED)))
    assert_server_works(server, sd3_pair, sd3_prompt)


def test_the_guider_refuses_what_the_node_refuses(server, sd3_pair, sd3_prompt):
    for inputs, facts in (
        ({"landing": 4}, ("landing", "4", "1 to 3")),
        ({"negative": None}, ("teacher_cfg", "negative")),
    ):
        start = sd3_start(server, sd3_pair, sd3_prompt)
        guider = start.node("DPDMDTeacherStartGuider", **inputs)
        sigmas = scheduler(start.graph, start.few_step)
        with refuses(RefusedError, *facts):
            start.latents(sample_with_parts(start.graph, start.latent, guider=guider, sigmas=sigmas))
    assert_server_works(server, sd3_pair, sd3_prompt)


def assert_server_works(server, pair, prompt):
    start = sd3_start(server, pair, prompt)
    assert start.latents(start.node(teacher_steps=1)).isfinite().all()
