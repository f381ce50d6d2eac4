"""Tiny random models of the real classes, saved by their own libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dpdmd_pipeline.metrics.passes import Passes

VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# A chat template for one picture, reduced from the published ones.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def passes() -> Passes:
    return Passes("cpu", 2)


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Five random pictures, RGB, 48 pixels wide."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (5, 48, 48, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in pixels]


def save_image_processor(folder: Path, size: int) -> None:
    """Save the processor of the published DINOv2 and CLIP, for smaller pictures."""
    from transformers import BitImageProcessor

    crop = {"height": size, "width": size}
    BitImageProcessor(size={"shortest_edge": size}, crop_size=crop).save_pretrained(folder)


@pytest.fixture(scope="session")
def dino_v2(tmp_path_factory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("weights") / "dinov2"
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**VIT, image_size=28, patch_size=7)).save_pretrained(folder)
    save_image_processor(folder, 28)
    return folder


@pytest.fixture(scope="session")
def dino_v3(tmp_path_factory) -> Path:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    folder = tmp_path_factory.mktemp("weights") / "dinov3"
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**VIT, image_size=32, patch_size=8, num_register_tokens=4)).save_pretrained(folder)
    save_image_processor(folder, 32)
    return folder


@pytest.fixture(scope="session")
def clip_hf(tmp_path_factory) -> Path:
    """A complete CLIP of transformers with its processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    from dpdmd_pipeline.shapes.models import make_tokenizer

    folder = tmp_path_factory.mktemp("weights") / "clip"
    tokenizer = make_tokenizer(77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**VIT, **ends, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**VIT, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    save_image_processor(folder, 32)
    from transformers import AutoImageProcessor

    CLIPProcessor(AutoImageProcessor.from_pretrained(folder), tokenizer).save_pretrained(folder)
    save_image_processor(folder, 32)
    return folder


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory) -> Path:
    """A CLIP of open_clip in its own layout, with open_clip's own tokenizer."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights") / "open_clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_OPEN_CLIP, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


TINY_OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def vision_language(tmp_path_factory) -> Path:
    """A Qwen2.5-VL with two layers and its processor; it knows the words Yes and No."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("weights") / "qwen"
    processor = _processor()
    tokenizer = processor.tokenizer
    marks = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    text = {
        **VIT,
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _processor():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    merges = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    vocabulary = sorted(ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)
    words = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{word}|>" for word in words]})
    pixels = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)
    return Qwen2_5_VLProcessor(pixels, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT)
