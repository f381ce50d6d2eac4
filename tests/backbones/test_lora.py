"""Adapters against peft: the sum, and the key formats of files."""

import pytest
import torch
from tests.raising import refuses
from torch import nn

from dpdmd_pipeline.backbones.lora import add_lora, kohya_from_peft, peft_from_file, transformer_from_peft


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(3, 5, 3)
        self.blocks = nn.ModuleList([nn.Linear(5, 7)])

    def forward(self, pictures):
        return self.blocks[0](self.proj_in(pictures).movedim(1, -1))


@pytest.fixture
def adapted():
    """A plain network, the same under peft with a random adapter of scale 2.5, and the adapter's state."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, other = Network(), Network()
        other.load_state_dict(plain.state_dict())
        config = LoraConfig(r=4, lora_alpha=10, target_modules=["proj_in", "blocks.0"], init_lora_weights=False)
        other = inject_adapter_in_model(config, other)
    return plain, other, get_peft_model_state_dict(other)


def test_the_sum_is_the_network_under_peft(adapted):
    plain, under_peft, state = adapted
    pictures = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        without = plain(pictures)
        add_lora(plain.state_dict(), state, 10 / 4)
        assert not torch.allclose(plain(pictures), without, atol=0.1)
        torch.testing.assert_close(plain(pictures), under_peft(pictures), rtol=1e-5, atol=1e-5)


def test_the_sum_with_bfloat16_weights_is_formed_in_float32():
    weights = {"0.weight": torch.full((1, 1), 256.0, dtype=torch.bfloat16)}  # here bfloat16 counts in twos
    add_lora(weights, {"0.lora_A.weight": torch.full((1, 1), 1.5), "0.lora_B.weight": torch.ones(1, 1)}, 1.0)
    assert weights["0.weight"].item() == 258


def test_reading_undoes_each_key_format(adapted):
    plain, _, state = adapted
    modules = [name for name, _ in plain.named_modules()]
    for tensors in (kohya_from_peft(state, alpha=10), transformer_from_peft(state, scale=1.0), state):
        read = peft_from_file(tensors, modules)
        assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_the_transformer_format_carries_the_scale_in_one_factor(adapted):
    *_, state = adapted
    tensors = transformer_from_peft(state, scale=2.5)
    assert set(tensors) == {f"transformer.{name}" for name in state}
    torch.testing.assert_close(tensors["transformer.blocks.0.lora_B.weight"], 2.5 * state["blocks.0.lora_B.weight"])
    assert torch.equal(tensors["transformer.blocks.0.lora_A.weight"], state["blocks.0.lora_A.weight"])


def test_kohyas_format_has_one_word_per_module_with_its_alpha(adapted):
    *_, state = adapted
    words = {name.split(".")[0] for name in kohya_from_peft(state, alpha=10)}
    assert words == {"lora_unet_proj_in", "lora_unet_blocks_0"}
    assert kohya_from_peft(state, alpha=10)["lora_unet_blocks_0.alpha"].item() == 10


def test_an_adapter_of_another_shape_is_refused_with_both(adapted):
    plain, _, state = adapted
    state["blocks.0.lora_A.weight"] = torch.zeros(4, 9)
    with refuses(ValueError, "blocks.0", "[7, 9]", "[7, 5]"):
        add_lora(plain.state_dict(), state, 1.0)
