"""`doctor`: tell what this machine has and which environments fit it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

GIB = 2**30
TIGHT = 0.95  # share of its GB that a card has at least
ON_CPU = ("base", "ci", "shapes_sdxl")
CARDS = {  # GB of GPU memory for each environment of a real teacher, by the estimate; a test compares the README
    "sd35_lora_16gb": 12,
    "sdxl_lora_16gb": 16,
    "flux2_klein": 16,
    "z_image": 24,
    "qwen_image": 80,
    "sd35": 80,
    "sdxl": 96,
}
EXTRAS = {  # optional parts: a module of each, and what it is for
    "metrics": ("torchmetrics", "published metrics"),
    "hub": ("datasets", "prompts of a dataset of the hub"),
    "track": ("tensorboard", "TensorBoard"),
    "quant": ("torchao", "a base of adapters in fewer bits"),
    "8bit": ("bitsandbytes", "optimizers in 8 bits"),
    "iqa": ("pyiqa", "quality without a reference"),
}
WEIGHTS = Path("data/06_models/metrics")


def doctor() -> None:
    """Tell what this machine has, and what fits it."""
    import torch

    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    weights = sorted(path.name for path in WEIGHTS.glob("*/")) if WEIGHTS.is_dir() else []
    extras = {name: find_spec(module) is not None for name, (module, _) in EXTRAS.items()}
    facts = {
        "Python": f"{platform.python_version()}, torch {torch.__version__}",
        "GPU": "; ".join(f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in cards) or _no_gpu(torch),
        "memory": f"{memory:.0f} GiB, {os.cpu_count()} cores",
        "disk": f"{shutil.disk_usage(Path.cwd()).free / GIB:.0f} GiB are free in {Path.cwd()}",
        "installed": ", ".join(name for name, is_there in extras.items() if is_there) or "no optional part",
        "missing": "; ".join(_install(name) for name, is_there in extras.items() if not is_there) or "no optional part",
        "weights": ", ".join(weights) or f"no metric has weights in {WEIGHTS}; the embedded world needs none",
    }
    for name, text in [*facts.items(), *_environments(min((card.total_memory for card in cards), default=0))]:
        print(f"{name:10} {text}")


def _no_gpu(torch) -> str:
    return f"none that torch sees; torch was built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}"


def _install(name: str) -> str:
    return f"pip install 'dpdmd-pipeline[{name}]' ({EXTRAS[name][1]})"


def fitting(gpu_bytes: int) -> list[str]:
    """Environments for a card of so many bytes; those of the embedded world run on any machine."""
    return [*ON_CPU, *(name for name, size in CARDS.items() if gpu_bytes >= TIGHT * size * 1e9)]


def _environments(gpu_bytes: int) -> Iterator[tuple[str, str]]:
    fit = fitting(gpu_bytes)
    yield "fit here", ", ".join(fit)
    if large := [f"{name} ({size} GB)" for name, size in CARDS.items() if name not in fit]:
        yield "not here", f"they need a larger GPU, by the estimate: {', '.join(large)}"
    yield "next", f"kedro run --env {fit[-1] if gpu_bytes else 'ci'} --pipeline=distill"
