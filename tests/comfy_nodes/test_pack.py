"""The pack stands alone: its imports, their time, and a repository that works as a pack."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACK = REPOSITORY / "comfy_nodes"
TORCH_ONLY = sorted(path.stem for path in PACK.glob("[!_]*.py"))
ALLOWED = {"torch", "safetensors", "tqdm", "tokenizers", "transformers", "PIL"}  # every ComfyUI requires them
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server"}


def imports_of(path):
    """Top-level names of all modules that a file imports anywhere, except its own package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(PACK.rglob("*.py")), ids=lambda path: str(path.relative_to(PACK)))
def test_a_module_imports_only_what_every_comfyui_has(path):
    allowed = ALLOWED | COMFYUI if path.parent.name == "nodes" else ALLOWED
    assert imports_of(path) <= allowed | set(sys.stdlib_module_names)


def test_nodes_use_nothing_of_comfyuis_extras():
    assert not any("comfy_extras" in path.read_text() for path in PACK.rglob("*.py"))


def test_importing_the_torch_only_modules_takes_a_fifth_of_a_second_and_loads_nothing_of_the_pipeline():
    code = (
        "import sys, time, torch, safetensors.torch, tqdm.auto\n"  # a running ComfyUI has these
        "start = time.process_time()\n"
        f"import comfy_nodes, {', '.join(f'comfy_nodes.{name}' for name in TORCH_ONLY)}\n"
        "print(time.process_time() - start)\n"
        "foreign = {'kedro', 'dvc', 'diffusers', 'accelerate', 'dpdmd_pipeline', 'comfy'}\n"
        "print(sorted(foreign & {name.split('.')[0] for name in sys.modules}))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    seconds, foreign = answer.stdout.splitlines()
    assert float(seconds) <= 0.2 and foreign == "[]"


def test_the_repository_can_be_cloned_into_custom_nodes_and_still_be_tested():
    """Its root is a package for ComfyUI; elsewhere it defines nothing."""
    code = "import runpy; print(sorted(k for k in runpy.run_path('__init__.py') if k[0] != '_'))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a clone")
def test_make_pack_writes_the_pack_as_a_repository_of_its_own(tmp_path):
    def run(*command, **options):
        return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout

    clone = tmp_path / "clone"
    run("git", "clone", "--quiet", "--depth=1", REPOSITORY.as_uri(), str(clone))
    run("make", "pack", cwd=clone)
    listed = run("git", "ls-tree", "-r", "--name-only", "comfy-pack", cwd=clone).splitlines()
    assert listed == run("git", "ls-files", cwd=clone / "comfy_nodes").splitlines() and "__init__.py" in listed
