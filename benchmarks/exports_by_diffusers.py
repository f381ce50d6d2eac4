"""Distils both embedded teachers, full and LoRA, in one process and in two; diffusers must draw each export like us.

    python benchmarks/exports_by_diffusers.py [student updates]

Each student goes through the stages as a user starts them. Two samplers then draw latents from its exports: the code of
the model card, in a fresh process without this package, and `dpdmd_pipeline`'s own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

import commands
from dpdmd_pipeline.exporting.sample import draw_latents, encode, open_student
from record import record


class World(NamedTuple):
    """Folders of an embedded world's teacher and exports, and the denoiser's attribute in its pipeline."""

    teacher: str
    exports: str
    network: str


WORLDS = {
    "base": World("data/06_models/shapes_teacher", "data/06_models/export", "transformer"),
    "shapes_sdxl": World("data/06_models/shapes_sdxl_teacher", "data/06_models/shapes_sdxl/export", "unet"),
}
PROMPTS, SEEDS = ["a red circle", "a blue square"], [0, 1]
ALLOWED = 1e-5  # of the largest latent

DRAW = """
import json, sys
from safetensors.torch import load_file, save_file
latents = {}
for name, code in json.load(open(sys.argv[1])).items():
    space = {"load_file": load_file}
    exec(code, space)
    latents[name] = space["images"].contiguous()
assert not any(module.startswith("dpdmd") for module in sys.modules)
save_file(latents, sys.argv[2])
"""


def kedro(project: Path, *arguments: str) -> None:
    """Run Kedro as a user does."""
    commands.run([*commands.KEDRO, "run", *arguments], project)


def files(exported: Path) -> dict[str, Path]:
    """Form of the export -> its path."""
    single_files = {path.parent.name: path for path in exported.glob("*/*.safetensors")}
    return {"diffusers": exported / "diffusers", **single_files}


def codes(exported: Path, teacher: Path, network: str) -> dict[str, str]:
    """Form -> code that draws it: the model card's own; ComfyUI's file is loaded into diffusers' pipeline."""
    card = (exported / "README.md").read_text()
    code = {}
    for form, title in (("diffusers", "diffusers"), ("lora", "LoRA")):
        if form in files(exported):
            block = re.search(rf"### {title}\n\n```python\n(.*?)```", card, re.DOTALL)
            code[form] = _adapt(block[1], exported, teacher)
    load = f"pipe.{network}.load_state_dict(load_file({str(files(exported)['comfyui'])!r}))\nimages ="
    return {**code, "comfyui": code["diffusers"].replace("images =", load, 1)}


def _adapt(code: str, exported: Path, teacher: Path) -> str:
    """The card's code with this machine's folders and our prompts; it returns latents instead of pictures."""
    code = code.replace("path/to/teacher", str(teacher)).replace("generator=[", 'output_type="latent", generator=[')
    code = code.replace('["a prompt", "another"]', json.dumps(PROMPTS))
    return f"import os\nos.chdir({str(exported)!r})\n{code}"


def draw_with_diffusers(jobs: dict[str, str]) -> dict[str, torch.Tensor]:
    """Run each form's code in one fresh process; returns its latents."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "jobs.json", Path(folder) / "latents.safetensors"
        inputs.write_text(json.dumps(jobs))
        command = [sys.executable, "-I", "-c", DRAW, str(inputs), str(outputs)]
        subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
        return load_file(outputs)


def draw_with_ours(path: Path, teacher: Path | None) -> torch.Tensor:
    """Latents of an export from this package's sampler."""
    cond = encode(path, teacher, PROMPTS, len(PROMPTS), "cpu", "float32")
    return draw_latents(open_student(path, teacher, "cpu", "float32"), cond, SEEDS)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((one - other).abs().max() / one.abs().max())


def distil(project: Path, env: str, roles: str, processes: int, updates: int, target: Path) -> None:
    """Train and export one student; its export is moved to `target`."""
    options = f"train.roles={roles},train.max_steps={updates},train.launch.processes={processes}"
    kedro(project, "--env", env, "--pipelines", "train", "--nodes", "train_student", "--params", options)
    kedro(project, "--env", env, "--pipelines", "export", "--params", options)
    (project / WORLDS[env].exports).rename(target)
    for state in (project / "data/06_models").rglob(".train_state"):
        shutil.rmtree(state)  # or the next run would reuse this student


def main(updates: int) -> None:
    """Compare all students of both worlds."""
    measured: dict[str, object] = {"student turns": updates}
    with tempfile.TemporaryDirectory() as folder:
        project = commands.copy_project(folder)
        for env in WORLDS:
            for stage in ("prompts", "anchors"):
                kedro(project, "--env", env, "--pipelines", stage)
            for roles in ("full", "lora"):
                measured |= _compare(project, env, roles, updates)
    measured["differences are"] = "the largest of the latents', as a share of the largest latent"
    record("exports_by_diffusers", measured)


def _compare(project: Path, env: str, roles: str, updates: int) -> dict[str, float]:
    """Largest differences: diffusers against our sampler, form by form, and two processes against one."""
    world, differences, ours = WORLDS[env], {}, {}
    for processes in (1, 2):
        exported = project.parent / f"{env}-{roles}-{processes}"
        distil(project, env, roles, processes, updates, exported)
        theirs = draw_with_diffusers(codes(exported, project / world.teacher, world.network))
        for form, path in files(exported).items():
            name = f"{env}, {roles}, processes: {processes}, {form}"
            ours[processes] = draw_with_ours(path, None if form == "diffusers" else project / world.teacher)
            differences[name] = difference(ours[processes], theirs[form])
            if not differences[name] <= ALLOWED:
                raise SystemExit(f"Error: diffusers and our sampler draw different latents: {differences}")
    return {**differences, f"{env}, {roles}: two processes against one": difference(ours[1], ours[2])}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
