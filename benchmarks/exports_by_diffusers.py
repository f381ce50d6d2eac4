"""Distils both embedded teachers, full and LoRA, in one process and in two; diffusers must draw the same with each.

    python benchmarks/exports_by_diffusers.py [student turns]

Each student goes through the stages as its user starts them. Its exports are then drawn by a fresh process that knows
nothing of this package, with the code of their own model card, and by `dpdmd_pipeline`'s sampler.
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

from dpdmd_pipeline.exporting.sample import draw_latents, encode, open_student
from record import copy_project, record


class World(NamedTuple):
    """Where one embedded world has its teacher and its exports, and how the pipeline calls the denoiser."""

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
drawn = {}
for name, code in json.load(open(sys.argv[1])).items():
    space = {"load_file": load_file}
    exec(code, space)
    drawn[name] = space["images"].contiguous()
assert not any(module.startswith("dpdmd") for module in sys.modules)
save_file(drawn, sys.argv[2])
"""


def kedro(project: Path, *arguments: str) -> None:
    """One run as its user starts it."""
    command = [sys.executable, "-m", "kedro", "run", *arguments]
    done = subprocess.run(command, cwd=project, env=os.environ | {"DO_NOT_TRACK": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"Error: kedro run {' '.join(arguments)} failed in {project}:\n{done.stdout}{done.stderr}")


def files(exported: Path) -> dict[str, Path]:
    """Form -> where it lies."""
    found = {path.parent.name: path for path in exported.glob("*/*.safetensors")}
    return {"diffusers": exported / "diffusers", **found}


def codes(exported: Path, teacher: Path, network: str) -> dict[str, str]:
    """Form -> code that draws it: the card's own, and for ComfyUI's file plain loading of its keys."""
    card = (exported / "README.md").read_text()
    found = {}
    for form, title in (("diffusers", "diffusers"), ("lora", "LoRA")):
        if form in files(exported):
            block = re.search(rf"### {title}\n\n```python\n(.*?)```", card, re.DOTALL)
            found[form] = _latents_of(block[1], exported, teacher)
    load = f"pipe.{network}.load_state_dict(load_file({str(files(exported)['comfyui'])!r}))\nimages ="
    return {**found, "comfyui": found["diffusers"].replace("images =", load, 1)}


def _latents_of(code: str, exported: Path, teacher: Path) -> str:
    """The card's code with this machine's folders, our prompts, and latents in place of pictures."""
    code = code.replace("path/to/teacher", str(teacher)).replace("generator=[", 'output_type="latent", generator=[')
    code = code.replace('["a prompt", "another"]', json.dumps(PROMPTS))
    return f"import os\nos.chdir({str(exported)!r})\n{code}"


def drawn_by_diffusers(jobs: dict[str, str]) -> dict[str, torch.Tensor]:
    """Latents of every export, from a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        asked, drawn = Path(folder) / "jobs.json", Path(folder) / "drawn.safetensors"
        asked.write_text(json.dumps(jobs))
        command = [sys.executable, "-I", "-c", DRAW, str(asked), str(drawn)]
        subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
        return load_file(drawn)


def drawn_by_us(path: Path, teacher: Path | None) -> torch.Tensor:
    """Latents of an export by this package's sampler."""
    cond = encode(path, teacher, PROMPTS, len(PROMPTS), "cpu", "float32")
    return draw_latents(open_student(path, teacher, "cpu", "float32"), cond, SEEDS)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((one - other).abs().max() / one.abs().max())


def distil(project: Path, env: str, roles: str, processes: int, turns: int, kept: Path) -> None:
    """Train and export one student; its export is moved to `kept`."""
    options = f"train.roles={roles},train.max_steps={turns},train.launch.processes={processes}"
    kedro(project, "--env", env, "--pipelines", "train", "--nodes", "train_student", "--params", options)
    kedro(project, "--env", env, "--pipelines", "export", "--params", options)
    (project / WORLDS[env].exports).rename(kept)
    for state in (project / "data/06_models").rglob(".train_state"):
        shutil.rmtree(state)  # or two processes would find the student that one has finished


def main(turns: int) -> None:
    measured: dict[str, object] = {"student turns": turns}
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(folder)
        for env in WORLDS:
            for stage in ("prompts", "anchors"):
                kedro(project, "--env", env, "--pipelines", stage)
            for roles in ("full", "lora"):
                measured |= _compare(project, env, roles, turns)
    measured["differences are"] = "the largest of the latents', as a share of the largest latent"
    record("exports_by_diffusers", measured)


def _compare(project: Path, env: str, roles: str, turns: int) -> dict[str, float]:
    """Largest differences: diffusers against our sampler, form by form, and two processes against one."""
    world, found, ours = WORLDS[env], {}, {}
    for processes in (1, 2):
        kept = project.parent / f"{env}-{roles}-{processes}"
        distil(project, env, roles, processes, turns, kept)
        drawn = drawn_by_diffusers(codes(kept, project / world.teacher, world.network))
        for form, path in files(kept).items():
            name = f"{env}, {roles}, processes: {processes}, {form}"
            ours[processes] = drawn_by_us(path, None if form == "diffusers" else project / world.teacher)
            found[name] = difference(ours[processes], drawn[form])
            if not found[name] <= ALLOWED:
                raise SystemExit(f"Error: diffusers draws other latents than our sampler: {found}")
    return {**found, f"{env}, {roles}: two processes against one": difference(ours[1], ours[2])}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
