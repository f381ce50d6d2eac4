"""`comfy-install`: install the node pack into a ComfyUI."""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from dpdmd_pipeline.publishing import writing

PACK = Path(__file__).parents[3] / "comfy_nodes"
NAME = "dpdmd"  # folder and registry id; ComfyUI shows the folder name on the nodes
REPOSITORY_NAME = "dpdmd-pipeline"  # a clone of the repository in custom_nodes has the same nodes


def comfy_install(
    path: Annotated[Path, typer.Argument(help="folder of ComfyUI, which contains custom_nodes")],
    link: Annotated[bool, typer.Option("--link", help="link to this repository instead of copying the files")] = False,
) -> None:
    """Install the node pack into a ComfyUI.

    It becomes custom_nodes/dpdmd, and replaces an older one.
    """
    target = install(path, link=link)
    where = f"{target} -> {target.resolve()}" if link else target
    print(f"installed DP-DMD {_project(PACK)['version']}: {where}\nRestart ComfyUI, then search for DP-DMD.")


def install(comfyui: Path, *, link: bool, pack: Path = PACK) -> Path:
    """Install `pack` into a ComfyUI, or link to it; an older version stays until the new one is complete.

    Args:
        comfyui: folder of a ComfyUI, or of its models and custom nodes (`--base-directory`).

    Returns:
        The installed folder, `comfyui/custom_nodes/dpdmd`.
    """
    if not (pack / "__init__.py").is_file():
        raise ValueError(
            f"no node pack at {pack}, because the installed package does not contain it: clone the repository and run "
            "this command there, or copy its folder comfy_nodes to custom_nodes/dpdmd"
        )
    custom_nodes = _custom_nodes(comfyui)
    target = custom_nodes / NAME
    _refuse_others(custom_nodes, target)
    # ComfyUI loads every folder in custom_nodes, also hidden ones, unless the name ends with .disabled.
    new, old = (custom_nodes / f".{NAME}.{age}.disabled" for age in ("new", "old"))
    with writing(custom_nodes):
        _remove(new)
        if link:
            new.symlink_to(pack.resolve(), target_is_directory=True)
        else:
            _copy(pack, new)
        _replace(target, new, old)
    return target


def _custom_nodes(comfyui: Path) -> Path:
    if _is_comfyui(comfyui):
        return comfyui / "custom_nodes"
    nearby = [path for path in (Path(os.path.realpath(comfyui)).parent, comfyui / "ComfyUI") if _is_comfyui(path)]
    hint = f"did you mean {nearby[0]}?" if nearby else "name the folder that contains custom_nodes and models"
    state = "is not a ComfyUI" if comfyui.is_dir() else "is not a folder" if comfyui.exists() else "does not exist"
    raise ValueError(f"{comfyui} {state}: {hint}")


def _is_comfyui(path: Path) -> bool:
    return (path / "custom_nodes").is_dir() and any((path / name).is_dir() for name in ("models", "comfy"))


def _refuse_others(custom_nodes: Path, target: Path) -> None:
    if os.path.lexists(target) and _project(target).get("name") != NAME:
        raise ValueError(f"{target} exists and is not this pack: move or remove it, then run again")
    for other in sorted(custom_nodes.iterdir()):
        if other == target or other.name.endswith(".disabled"):
            continue
        if _project(other).get("name") in (NAME, REPOSITORY_NAME):
            raise ValueError(f"{other} has the same nodes: remove it, then run again")


def _project(folder: Path) -> dict[str, str]:
    """The `[project]` table of a folder's pyproject.toml; empty if there is none or it cannot be read."""
    file = folder / "pyproject.toml"
    try:
        # A pipe would block for ever.
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project") if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return project if isinstance(project, dict) else {}


def _copy(folder: Path, target: Path) -> None:
    """Copy a folder and stop at the first error; `shutil.copytree` would go on and report every file."""
    target.mkdir()
    for source in sorted(folder.iterdir()):
        if source.name == "__pycache__" or source.name.endswith((".pyc", "_cache")):
            continue
        if source.is_dir():
            _copy(source, target / source.name)
        else:
            shutil.copy2(source, target / source.name)


def _replace(target: Path, new: Path, old: Path) -> None:
    """Replace `target` by `new` with two renames, and restore it if the second fails."""
    _remove(old)
    if os.path.lexists(target):
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder or a link if it exists, but not the target of a link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
