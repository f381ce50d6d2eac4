"""The environments of today's teachers on their cards: checked and estimated from the real models' configurations."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.teachers import make_qwen_tokenizer

from dpdmd_pipeline.backbones.base import pipeline_class
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.datasets.pretrained import INDEX
from dpdmd_pipeline.planning.checks import refusals
from dpdmd_pipeline.planning.gpu import planned_memory, with_micro_batches
from dpdmd_pipeline.planning.plan import Plan
from dpdmd_pipeline.planning.teacher import faulty_parts
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.options import MICRO_BATCHES, TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

CONF = Path(__file__).parents[2] / "conf"
GB = 10**9


class Real(NamedTuple):
    """Configuration of a model on the hub, as far as it differs from the defaults of diffusers' classes."""

    parameters: int  # of the transformer
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: tuple[str, dict[str, Any]]  # class, and what this project reads of its config
    card: int  # bytes that the environment is for


REAL = {
    "z_image": Real(  # Tongyi-MAI/Z-Image
        6_154_908_736,
        {},
        {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        {"shift": 6.0},
        ("Qwen3Model", {"model_type": "qwen3", "hidden_size": 2560}),
        24 * GB,
    ),
    "flux2_klein": Real(  # black-forest-labs/FLUX.2-klein-base-4B
        3_875_544_576,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        {},
        {"use_dynamic_shifting": True},
        ("Qwen3ForCausalLM", {"model_type": "qwen3", "hidden_size": 2560}),
        16 * GB,
    ),
    "qwen_image": Real(  # Qwen/Qwen-Image
        20_430_401_088,
        {},
        {},
        {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
        ("Qwen2_5_VLForConditionalGeneration", {"model_type": "qwen2_5_vl", "hidden_size": 3584}),
        80 * GB,
    ),
}


# GiB that are free on cards of 16, 24, 48 and 80 GB
CARDS = {"flux2_klein": (15.6, 23.6, 47.0), "z_image": (23.6, 47.0), "qwen_image": (79.0,)}


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory) -> tuple[str, Path]:
    """Family, and folder of its configurations alone."""
    folder = tmp_path_factory.mktemp(request.param)
    assert make_configurations(request.param, folder) == REAL[request.param].parameters
    return request.param, folder


def make_configurations(family: str, folder: Path, **changes: Any) -> int:
    """Write the configurations of a real model, with changes to its network; returns the network's parameters.

    The tokenizer is a small one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, kind, tokenizer = REAL[family], pipeline_class(family), make_qwen_tokenizer()
    types = kind._get_signature_types()
    with torch.device("meta"):
        transformer = types["transformer"][0](**model.transformer | changes)
        parts = {"transformer": transformer, "vae": types["vae"][0](**model.vae)}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(**model.scheduler)
    kind(**parts, text_encoder=None, tokenizer=tokenizer).save_config(folder)
    for name, part in parts.items():
        part.save_config(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    name, config = model.text_encoder
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder/config.json").write_text(json.dumps(config))
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"text_encoder": ["transformers", name]}))
    return sum(weight.numel() for weight in transformer.parameters())


def plan(environment: str, teacher: Path, **changes: Any) -> Plan:
    config = ConfigLoader(str(CONF), env=environment, **CONFIG_LOADER_ARGS)["parameters"]
    # where there is no GPU, the options of one are not refused for that: the card is given
    trained = {"train": TrainOptions(**config["train"] | {"device": "cpu"} | changes)}
    anchors = {name: config["anchors"][name] for name in AnchorRecipe.model_fields}
    return Plan(teacher, BackboneOptions(**config["backbone"]), AnchorRecipe(**anchors), trained)


def test_a_teacher_of_today_is_checked_before_its_weights_are_there(real):
    environment, teacher = real
    assert [*faulty_parts(teacher, plan(environment, teacher).backbone, is_complete=False)] == []


@pytest.mark.full_size
def test_an_environment_fits_on_its_card_and_a_larger_one_gets_larger_micro_batches(real):
    environment, teacher = real
    first, sizes = plan(environment, teacher), []
    assert refusals(first, REAL[environment].card) == []
    for free in CARDS[environment]:
        planned = plan(environment, teacher, card_gib=free, checkpoint_background=False)
        vars(planned)["estimates"] = first.estimates  # counted once
        assert refusals(planned) == []
        options = planned.trained["train"]
        options = with_micro_batches(first.estimates, options, planned_memory(options))
        sizes.append([getattr(options, name) for name in MICRO_BATCHES])
        memory = first.estimates.estimate(options.recipe(), options.execution())
        print(f"| {environment} | {free} | {sizes[-1]} | {memory} |", flush=True)  # a row of docs/teachers.md: -s
    assert sizes == sorted(sizes)
