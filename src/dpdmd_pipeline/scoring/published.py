"""Published weights of the metrics, and how to fetch them.

Sizes are of the published files, rounded; licences as their pages name them.
"""

from __future__ import annotations

from functools import partial

from dpdmd_pipeline.scoring.weights import Weights

# Large models are sharded, with an index.
MODEL_FILE = ("model.safetensors", "model.safetensors.index.json")


def hub_model(folder: str, source: str, licence: str, size_mb: int, *more: str) -> Weights:
    """A transformers model of the Hub with its preprocessing, without its weights in other formats."""
    files = ("config.json", ("preprocessor_config.json", "processor_config.json"), MODEL_FILE, *more)
    excludes = " ".join(f"--exclude '{ending}'" for ending in ("*.bin", "*.h5", "*.msgpack", "*.onnx"))
    fetch = f"hf download {source} --local-dir {{folder}} {excludes}"
    return Weights(folder, files, source, licence, size_mb, fetch)


def url_file(folder: str, url: str, licence: str, size_mb: int, before: str = "") -> Weights:
    """One file at an address, and a shell command that its reader needs `before`."""
    name = url.rsplit("/", 1)[1]
    return Weights(folder, (name,), url, licence, size_mb, f"{before}curl -fL --create-dirs -o {{folder}}/{name} {url}")


DINO_V2 = hub_model("dinov2-base", "facebook/dinov2-base", "Apache-2.0", 346)
DINO_V3 = hub_model(
    "dinov3-vitl16", "facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 licence, access on request", 1213
)
CLIP_L = Weights(
    "clip-vit-large-patch14-openclip",
    ("open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")),
    "timm/vit_large_patch14_clip_224.openai",
    "MIT",
    1710,
    "hf download timm/vit_large_patch14_clip_224.openai --local-dir {folder} --include 'open_clip*' "
    "--include '*token*' --include vocab.json --include merges.txt --exclude '*.bin'",
)
CLIP_L_HF = hub_model("clip-vit-large-patch14", "openai/clip-vit-large-patch14", "MIT", 1710)
CLIP_SHAPES = Weights(
    "shapes_clip",
    ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"),
    "the embedded world",
    "Apache-2.0",
    1,
    stage="clip",
)
PICKSCORE = hub_model("pickscore", "yuvalkirstain/PickScore_v1", "see its model card", 3945, "tokenizer_config.json")
HPS_V2_1 = Weights(
    "hps_v2.1",
    ("HPS_v2.1_compressed.pt",),
    "xswu/HPSv2",
    "Apache-2.0",
    1972,
    "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir {folder}",
)
QWEN_VL = hub_model("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "Apache-2.0", 16600, "tokenizer_config.json")
VISUALQUALITY_R1 = hub_model(
    "visualquality-r1-7b", "TianheWu/VisualQuality-R1-7B", "MIT", 16600, "tokenizer_config.json"
)
INCEPTION = url_file(
    "inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "Apache-2.0",
    96,
)
# torch.hub's own layout, which torchvision and torchmetrics use.
HUB = "hub/checkpoints"
ALEXNET = url_file(HUB, "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "BSD-3-Clause", 244)
SQUEEZENET = url_file(HUB, "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", "BSD-3-Clause", 5)
_ARNIQA = "https://github.com/miccunifi/ARNIQA/releases/download/weights"
ARNIQA = url_file(HUB, f"{_ARNIQA}/ARNIQA.pth", "Apache-2.0", 110)
ARNIQA_KONIQ = url_file(HUB, f"{_ARNIQA}/regressor_koniq10k.pth", "Apache-2.0", 1)

# pyiqa's files lie beside torch.hub's.
_PYIQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
_pyiqa_file = partial(url_file, "hub/pyiqa", before="pip install 'dpdmd-pipeline[iqa]' && ")
MANIQA = _pyiqa_file(f"{_PYIQA}/MANIQA_PIPAL-ae6d356b.pth", "Apache-2.0", 544)
TOPIQ = _pyiqa_file(f"{_PYIQA}/cfanet_nr_koniq_res50-9a73138b.pth", "PolyForm-Noncommercial-1.0.0", 140)
CLIPIQA_PLUS = _pyiqa_file(f"{_PYIQA}/CLIP-IQA%2B_learned_prompts-603f3273.pth", "see pyiqa", 1)
# CLIP-IQA+ has learned prompts for this CLIP; its own file does not contain it.
_OPENAI = "https://openaipublic.azureedge.net/clip/models"
CLIP_RN50 = url_file(
    "hub/clip", f"{_OPENAI}/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt", "MIT", 256
)
