"""Table of families and properties in Markdown: a mark where a test of the property has a case of the family.

python tests/contract_table.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from dpdmd_pipeline.backbones import FAMILIES

LINE, SHARED = "pipelines/train/test_environments.py", "backbones/test_contract.py"
SERVER = "comfy_nodes/test_server_families.py"
# property: file::start of the test's name; @family for a test that has no cases
PROPERTIES = {
    "our sampler is diffusers' pipeline to 1e-5: guided and not, prompts of unequal length": [
        f"{SHARED}::test_denoise_and_step_give_the_latents"
    ],
    "the same at another picture size": [f"{SHARED}::test_pictures_of_another_size"],
    "decoded pictures are the pipeline's": [f"{SHARED}::test_decode_gives_the_pictures"],
    "a real configuration is checked before its weights are there": [
        "planning/test_full_size.py::test_a_teacher_of_today"
    ],
    "memory is estimated from the configuration alone": [
        "planning/test_memory_families.py::test_a_family_is_estimated"
    ],
    "from prompt files to report and export, bfloat16, whole and LoRA": [
        f"{LINE}::test_a_family_of_today_goes",
        f"{LINE}::test_a_teacher_with_t5_goes@sd3",
        f"{LINE}::test_sdxl_goes@sdxl",
    ],
    "two processes have the student of one, float32": [
        "training/test_launch.py::test_two_processes_have_the_student_of_one",
        "training/test_launch.py::test_two_processes_with_half@sd3",
    ],
    "sharded networks have the whole one's loss and gradients": [
        "training/test_sharding.py::test_a_sharded_network_has"
    ],
    "diffusers alone draws the export, whole and (not SANA) LoRA": ["exporting/test_sample.py::test_diffusers_alone"],
    "ComfyUI draws the whole student": [
        f"{SERVER}::test_a_student_gives",
        "comfy_nodes/test_server_sampling.py::test_a_students_own_schedule@sd3",
        "comfy_nodes/test_server_sampling.py::test_the_renoising_sdxl_student@sdxl",
    ],
    "ComfyUI draws the LoRA": [
        f"{SERVER}::test_a_student_gives",
        "comfy_nodes/test_server_files.py::test_an_sd3_lora@sd3",
        "comfy_nodes/test_server_files.py::test_an_sdxl_lora@sdxl",
    ],
}


def collected() -> list[str]:
    """Ids of all tests, those that need a ComfyUI too."""
    files = sorted({test.partition("::")[0] for tests in PROPERTIES.values() for test in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", "", *(f"tests/{f}" for f in files)]
    environment = {"COMFYUI_PATH": "."} | os.environ  # it is not started
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return re.findall(r"^tests/(\S+::.+)$", result.stdout, re.MULTILINE)


def table(ids: list[str]) -> str:
    rows = ["| property | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
    for name, tests in PROPERTIES.items():
        found = defaultdict(int)
        for test in tests:
            start, _, only = test.partition("@")
            cases = [case for case in ids if case.startswith(start)]
            if not cases:
                raise SystemExit(f"no test {start}: correct PROPERTIES")
            for family in FAMILIES:
                found[family] += any(family in case.partition("[")[2] for case in cases) if not only else only == family
        rows.append(f"| {name} | " + " | ".join("yes" if found[family] else "" for family in FAMILIES) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(collected()))
