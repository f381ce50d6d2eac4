"""Exported students of tiny random teachers, and latents that diffusers alone draws with the card's own code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.backbones.student_file import save_lora, save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.dpdmd.noise import flow_sigmas
from dpdmd_pipeline.exporting.formats import Export, Licence, read_student

PROMPTS = ["a prompt", "another"]  # of the card's code
SEEDS = [0, 1]
RESOLUTION = 32
WIDE = [[32, 64], [32, 32]]  # two sizes, the first one not square
RANK, ALPHA = 4, 6.0  # a scale that is not 1, so that forgetting it shows
TRAILING = [999, 749, 499, 249]


@dataclass(frozen=True)
class Case:
    """A student to export.

    Attributes:
        teacher: fixture of its teacher's folder.
        header: of the student.
        length: T5's (or Gemma's) tokens.
        resolution: of the training; exports draw at the first size.
    """

    teacher: str
    header: StudentHeader
    length: int = 0
    resolution: int | list[list[int]] = RESOLUTION


def flow(family: str, sigmas: list[float], **facts: Any) -> StudentHeader:
    return StudentHeader(family, sigmas, shift=facts.pop("shift", 3.0), **facts)


def vp(prediction: str, timesteps: list[int], **facts: Any) -> StudentHeader:
    return StudentHeader("sdxl", prediction=prediction, timesteps=timesteps, **facts)


LORA = {"kind": "lora", "lora_rank": RANK, "lora_alpha": ALPHA}
SHIFTED, SHIFTED_6 = (flow_sigmas(4, shift, "shifted").tolist() for shift in (3.0, 6.0))
CASES = {
    "sd3_shifted": Case("shifted_teacher", flow("sd3", SHIFTED)),
    "sd3_official": Case("shifted_teacher", flow("sd3", flow_sigmas(4, 3.0, "diffusers").tolist()), 7),
    "sd3_explicit": Case("shifted_teacher", flow("sd3", [0.98, 0.9, 0.6, 0.0]), resolution=WIDE),
    "sd3_lora": Case("shifted_teacher", flow("sd3", SHIFTED, **LORA)),
    "sdxl_eps": Case("tiny_sdxl", vp("eps", TRAILING)),
    "sdxl_v_lora": Case("tiny_sdxl_v", vp("v", TRAILING, **LORA)),
    "sdxl_uneven": Case("tiny_sdxl", vp("eps", [999, 700, 120]), resolution=WIDE),
    "sdxl_renoise": Case("tiny_sdxl", vp("eps", TRAILING, sampler="renoise")),
    "sana_renoise": Case("tiny_sana", flow("sana", SHIFTED, sampler="renoise"), 9, WIDE),
    "flux2_klein_lora": Case("tiny_flux2_klein", flow("flux2_klein", SHIFTED_6, shift=6.0, **LORA), 100, WIDE),
    "qwen_image_lora": Case("tiny_qwen_image", flow("qwen_image", [1.0, 0.9, 0.75, 0.5, 0.0], **LORA), 200, WIDE),
    "z_image_lora": Case("tiny_z_image", flow("z_image", SHIFTED_6, shift=6.0, **LORA), 40, WIDE),
}


@pytest.fixture(scope="session")
def shifted_teacher(tiny_teacher, edited):
    """The tiny SD3 teacher with SD3.5's shift."""
    return edited(tiny_teacher, "scheduler/scheduler_config.json", shift=3.0)


def train(case: Case, teacher: Path, folder: Path) -> None:
    """Write a student whose weights or adapter differ from the teacher's."""
    options = {"resolution": RESOLUTION, "max_sequence_length": case.length, "level_range": (0.02, 0.98)}
    model = load_backbone(case.header.family, teacher, **options).load_model()
    generator = torch.Generator().manual_seed(1)
    if case.header.kind == "full":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        save_student(folder, model, case.header)
    else:
        save_lora(folder, adapter(model, generator), case.header)


def adapter(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A random LoRA on every attention, feed-forward, convolution and time layer that trainers adapt."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    targets = r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|net\.2|proj_in|proj_out|conv1|conv2|time_emb_proj)"
    targets += r"|.*\.(linear_in|to_qkv_mlp_proj)"  # of Klein
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    state = get_peft_model_state_dict(inject_adapter_in_model(config, model))
    return {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


@dataclass(frozen=True)
class Exported:
    """An export, its case and its teacher."""

    case: Case
    teacher: Path
    folder: Path
    export: Export

    def file(self, form: str) -> Path:
        return self.folder / self.export.files[form]


def export_options(**changes: Any) -> dict[str, Any]:
    return {
        "title": "tiny",
        "formats": ["diffusers", "comfyui", "lora"],
        "dtype": "float32",
        "licence": Licence("apache-2.0", None, None),
        "base_model": None,
        "metrics": {},
        "measure": "`kedro run`",
        **changes,
    }


@pytest.fixture(scope="session")
def exports(request, tmp_path_factory) -> dict[str, Exported]:
    """Every case, trained and exported."""
    students = {}
    for name, case in CASES.items():
        teacher, trained = request.getfixturevalue(case.teacher), tmp_path_factory.mktemp("trained")
        train(case, teacher, trained)
        folder = tmp_path_factory.mktemp(name)
        student = read_student(trained, teacher, case.header.family, case.resolution, case.length)
        export = Export(student=student, teacher=teacher, **export_options())
        export.write(folder)
        students[name] = Exported(case, teacher, folder, export)
    return students


# ---- diffusers alone


def jobs(exports: dict[str, Exported]) -> dict[str, dict[str, str]]:
    """Folder and code per case and form: the card's own code, and for ComfyUI's file a plain load."""
    jobs_by_name = {}
    for name, exported in exports.items():
        code = dict(zip(exported.export.files.keys() - {"comfyui"}, ["", ""], strict=False))
        card = (exported.folder / "README.md").read_text()
        for form, title in (("diffusers", "diffusers"), ("lora", "LoRA")):
            if form in code:
                code[form] = re.search(rf"### {title}\n\n```python\n(.*?)```", card, re.DOTALL)[1]
        network = "unet" if (exported.teacher / "unet").is_dir() else "transformer"
        weights = f"load_file({str(exported.file('comfyui'))!r})"
        if exported.case.header.family == "flux2_klein":  # in the spelling of its authors
            weights = f"from_authors({weights})"
        load = f"pipe.{network}.load_state_dict({weights})\nimages ="
        code["comfyui"] = code["diffusers"].replace("images =", load, 1)
        for form, text in code.items():
            text = text.replace("path/to/teacher", str(exported.teacher))
            text = text.replace("generator=[", 'output_type="latent", generator=[')
            jobs_by_name[f"{name}/{form}"] = {"folder": str(exported.folder), "code": text}
    return jobs_by_name


DRAW = """
import json, os, sys
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as from_authors
from safetensors.torch import load_file, save_file
drawn = {}
for name, job in json.load(open(sys.argv[1])).items():
    os.chdir(job["folder"])
    space = {"from_authors": from_authors, "load_file": load_file}
    exec(job["code"], space)
    drawn[name] = space["images"].contiguous()
assert not any(module.startswith("dpdmd") for module in sys.modules)
save_file(drawn, sys.argv[2])
"""


@pytest.fixture(scope="session")
def drawn_by_diffusers(exports, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Latents of every job, drawn in a new process that does not import this package."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "jobs.json").write_text(json.dumps(jobs(exports)))
    command = [sys.executable, "-I", "-c", DRAW, str(folder / "jobs.json"), str(folder / "drawn.safetensors")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return load_file(folder / "drawn.safetensors")
