"""A tiny CLIP of the embedded world: open_clip's real classes, small, with a vocabulary of the world's words.

With it the CLIP path (score and diversity) runs offline; the exact reader stays the judge. Its captions describe all
attributes of a picture, unlike the prompts: a CLIP without words for positions could not distinguish them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpdmd_pipeline.shapes.world import COLOURS, FREE, FREE_WORDS, LEGAL, RESOLUTION, SHAPES, Attributes, captions

CONTEXT_LENGTH = 16
_PAD, _UNKNOWN, _END = "<pad>", "<unknown>", "<end>"


def full_caption(attributes: Attributes) -> str:
    """All attributes in words, as in "a small red circle at the top left on black"."""
    position, radius, background = (FREE_WORDS[name][getattr(attributes, name)] for name in FREE)
    colour, shape = list(COLOURS)[attributes.colour], SHAPES[attributes.shape]
    return f"a {radius} {colour} {shape} at the {position} on {background}"


def full_captions() -> list[str]:
    """One caption for each legal picture, in the order of LEGAL; all differ."""
    return [full_caption(attributes) for attributes in LEGAL]


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word; any other word is the unknown token."""
    words = sorted({word for text in [*captions(), *full_captions()] for word in text.split()})
    vocabulary = [_PAD, _UNKNOWN, *words, _END]  # end last: open_clip pools at the highest id
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, _UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, len(vocabulary) - 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        model_max_length=CONTEXT_LENGTH,
    )


def _model_config(vocab_size: int) -> dict[str, Any]:
    """Config from which open_clip builds the model and its preprocessing."""
    vision = {"image_size": RESOLUTION, "patch_size": 8, "width": 96, "layers": 2, "head_width": 32, "mlp_ratio": 2.0}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocab_size, "width": 64, "heads": 2, "layers": 1}
    text["hf_tokenizer_name"] = "tokenizer.json"  # any name works: open_clip uses the tokenizer in the same folder
    return {
        "model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
    }


def make_clip(folder: Path, seed: int) -> open_clip.CLIP:
    """Make an untrained model, and write its config and tokenizer, but not its weights, to the folder."""
    tokenizer = make_word_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(_model_config(len(tokenizer)), indent=2) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False)


def save_clip(model: open_clip.CLIP, folder: Path) -> None:
    """Write the weights to the folder of `make_clip`."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
