"""`python -m dpdmd_pipeline comfy-install PATH [--link]`: put the node pack into a ComfyUI."""

from __future__ import annotations

import argparse
import os
import shutil
import tomllib
from pathlib import Path

from dpdmd_pipeline.publishing import writing

PACK = Path(__file__).parents[3] / "comfy_nodes"
NAME = "dpdmd"  # folder and registry id; ComfyUI shows the folder's name on the nodes
REPOSITORY_NAME = "dpdmd-pipeline"  # a clone of the whole repository in custom_nodes brings the nodes too


def main(arguments: list[str]) -> None:
    """Install the pack as `custom_nodes/dpdmd`, in the place of an older one."""
    parser = argparse.ArgumentParser(prog="dpdmd_pipeline comfy-install", description=main.__doc__)
    parser.add_argument("path", type=Path, help="folder of ComfyUI: the one with custom_nodes in it")
    parser.add_argument("--link", action="store_true", help="link to this repository instead of copying from it")
    options = parser.parse_args(arguments)

    place = install(options.path, link=options.link)
    how = f"{place} -> {place.resolve()}" if options.link else place
    print(f"installed DP-DMD {_project(PACK)['version']}: {how}\nRestart ComfyUI, then search for DP-DMD.")


def install(comfyui: Path, *, link: bool, pack: Path = PACK) -> Path:
    """Put `pack` into a ComfyUI; what was there of ours stays until the new one is whole.

    Args:
        comfyui: folder of a ComfyUI, or of its models and custom nodes alone (`--base-directory`).
        link: link to `pack` instead of copying it.
        pack: folder of the pack.

    Returns:
        The installed folder, `comfyui/custom_nodes/dpdmd`.

    Raises:
        ValueError: if there is no pack to install, no ComfyUI, or something else in the place.
        OSError: if the disk refuses.
    """
    if not (pack / "__init__.py").is_file():
        raise ValueError(
            f"no node pack at {pack}: it is not part of the installed package; clone the repository and run this "
            "command from there, or copy its folder comfy_nodes to custom_nodes/dpdmd"
        )
    custom_nodes = _custom_nodes(comfyui)
    place = custom_nodes / NAME
    _refuse_others(custom_nodes, place)
    # ComfyUI loads every folder in custom_nodes, hidden or not, unless its name ends like this.
    new, old = (custom_nodes / f".{NAME}.{age}.disabled" for age in ("new", "old"))
    with writing(custom_nodes):
        _remove(new)
        if link:
            new.symlink_to(pack.resolve(), target_is_directory=True)
        else:
            _copy(pack, new)
        _replace(place, new, old)
    return place


def _custom_nodes(comfyui: Path) -> Path:
    """The folder of custom nodes in a ComfyUI.

    Raises:
        ValueError: if it is none; where one is near, the message names it.
    """
    if _is_comfyui(comfyui):
        return comfyui / "custom_nodes"
    near = [path for path in (comfyui.resolve().parent, comfyui / "ComfyUI") if _is_comfyui(path)]
    hint = f"did you mean {near[0]}?" if near else "name the folder that has custom_nodes and models in it"
    state = "is no ComfyUI" if comfyui.is_dir() else "is not a folder" if comfyui.exists() else "is not there"
    raise ValueError(f"{comfyui} {state}: {hint}")


def _is_comfyui(path: Path) -> bool:
    beside = (path / "models").is_dir() or (path / "comfy").is_dir()
    return (path / "custom_nodes").is_dir() and beside


def _refuse_others(custom_nodes: Path, place: Path) -> None:
    if os.path.lexists(place) and _project(place).get("name") != NAME:
        raise ValueError(f"{place} is there and is not this pack: move it away or remove it, then run again")
    for other in sorted(custom_nodes.iterdir()):
        if other == place or other.name.endswith(".disabled"):
            continue
        if _project(other).get("name") in (NAME, REPOSITORY_NAME):
            raise ValueError(f"{other} brings the same nodes: remove it, then run again")


def _project(folder: Path) -> dict[str, str]:
    """The `[project]` table of a folder's pyproject.toml; empty without a readable one."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}
    return project if isinstance(project, dict) else {}


def _copy(folder: Path, target: Path) -> None:
    """As `shutil.copytree`, which however goes on after a full disk and then tells of every file."""
    target.mkdir()
    for source in sorted(folder.iterdir()):
        if source.name == "__pycache__" or source.name.endswith((".pyc", "_cache")):
            continue
        if source.is_dir():
            _copy(source, target / source.name)
        else:
            shutil.copy2(source, target / source.name)


def _replace(place: Path, new: Path, old: Path) -> None:
    """Two renames: a folder cannot be renamed over a full one. If the second fails, the old one goes back."""
    _remove(old)
    if os.path.lexists(place):
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if os.path.lexists(old):
            old.rename(place)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder or a link, if it is there; never what a link points to."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
