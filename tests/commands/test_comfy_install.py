"""`python -m dpdmd_pipeline comfy-install`: what is in custom_nodes afterwards, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpdmd_pipeline.commands.comfy_install import PACK, install

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def comfyui(tmp_path):
    """The folders by which a ComfyUI is known."""
    folder = tmp_path / "ComfyUI"
    for name in ("comfy", "custom_nodes", "models"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.fixture
def pack(tmp_path):
    """A small pack of ours."""
    folder = tmp_path / "pack"
    (folder / "web").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "web" / "help.md").write_text("new")
    (folder / "pyproject.toml").write_text('[project]\nname = "dpdmd"\nversion = "0.1.0"\n')
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def in_custom_nodes(comfyui: Path) -> set[str]:
    return set(os.listdir(comfyui / "custom_nodes"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dpdmd_pipeline", "comfy-install", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_the_command_copies_the_whole_pack_and_says_what_to_do_next(comfyui):
    result = run(comfyui)
    assert result.returncode == 0, result.stderr
    installed = comfyui / "custom_nodes" / "dpdmd"
    assert str(installed) in result.stdout and "Restart ComfyUI" in result.stdout
    ours = {name for name in files(PACK) if "__pycache__" not in name and "_cache/" not in name}
    assert files(installed) == ours and "__init__.py" in ours
    assert not installed.is_symlink()


def test_a_link_follows_the_repository(comfyui, pack):
    place = install(comfyui, link=True, pack=pack)
    (pack / "web" / "help.md").write_text("newer")
    assert place.is_symlink() and (place / "web" / "help.md").read_text() == "newer"


def test_a_base_directory_of_models_and_nodes_is_enough(comfyui, pack):
    (comfyui / "comfy").rmdir()
    assert install(comfyui, link=False, pack=pack).is_dir()


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
@pytest.mark.parametrize("older", ["copy", "link"])
def test_an_older_install_is_replaced_and_nothing_is_left_beside_it(comfyui, pack, tmp_path, older, link):
    before = shutil.copytree(pack, tmp_path / "before")
    (before / "gone.py").write_text("")
    place = install(comfyui, link=older == "link", pack=before)
    assert (place / "gone.py").exists()

    install(comfyui, link=link, pack=pack)

    assert place.is_symlink() == link and files(place) == files(pack)
    assert in_custom_nodes(comfyui) == {"dpdmd"}
    assert (before / "gone.py").exists()  # what an older link pointed to is not ours to remove


def test_python_leavings_are_not_copied(comfyui, pack):
    (pack / "__pycache__").mkdir()
    (pack / "__pycache__" / "nodes.pyc").write_text("")
    assert files(install(comfyui, link=False, pack=pack)) == files(pack) - {"__pycache__/nodes.pyc"}


def test_an_install_that_was_killed_is_repeated(comfyui, pack):
    place = install(comfyui, link=False, pack=pack)
    place.rename(place.with_name(".dpdmd.old.disabled"))  # killed between the two renames
    shutil.copytree(pack / "web", place.with_name(".dpdmd.new.disabled"))
    install(comfyui, link=False, pack=pack)
    assert files(place) == files(pack) and in_custom_nodes(comfyui) == {"dpdmd"}


def test_the_old_install_stays_when_the_new_one_cannot_take_its_place(comfyui, pack, monkeypatch):
    place = install(comfyui, link=False, pack=pack)
    (place / "old.py").write_text("")
    rename = Path.rename

    def refuse(self, target):
        if self.name == ".dpdmd.new.disabled":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="make the folder writable"):
        install(comfyui, link=False, pack=pack)
    assert (place / "old.py").exists()


def test_what_is_half_written_has_a_name_that_comfyui_does_not_load(comfyui, pack):
    (pack / "broken").symlink_to(pack / "unplugged")
    with pytest.raises(OSError, match=r"No such file or directory .*: '.*broken'"):
        install(comfyui, link=False, pack=pack)
    assert all(name.endswith(".disabled") for name in in_custom_nodes(comfyui))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: c.parent / "nowhere", "nowhere is not there: name the folder that has custom_nodes"),
        (lambda c: c / "comfy", r"comfy is no ComfyUI: did you mean .*ComfyUI\?"),
        (lambda c: c / "custom_nodes", r"custom_nodes is no ComfyUI: did you mean .*ComfyUI\?"),
        (lambda c: c.parent, r"is no ComfyUI: did you mean .*ComfyUI\?"),
        (lambda c: Path(__file__), "test_comfy_install.py is not a folder"),
    ],
    ids=["missing", "inside", "custom nodes", "around", "file"],
)
def test_a_path_that_is_no_comfyui_is_refused_with_the_one_that_was_meant(comfyui, pack, make, message):
    with pytest.raises(ValueError, match=message):
        install(make(comfyui), link=False, pack=pack)
    assert in_custom_nodes(comfyui) == set()


@pytest.mark.parametrize("pyproject", [None, "[project]\nname = 'theirs'\n", "project = 3\n", "not toml ["])
def test_a_foreign_folder_in_the_place_is_left_alone(comfyui, pack, pyproject):
    theirs = comfyui / "custom_nodes" / "dpdmd"
    theirs.mkdir()
    if pyproject:
        (theirs / "pyproject.toml").write_text(pyproject)
    with pytest.raises(ValueError, match="is there and is not this pack: move it away"):
        install(comfyui, link=False, pack=pack)
    assert in_custom_nodes(comfyui) == {"dpdmd"} and files(theirs) <= {"pyproject.toml"}


def test_a_link_to_nowhere_in_the_place_is_left_alone(comfyui, pack, tmp_path):
    (comfyui / "custom_nodes" / "dpdmd").symlink_to(tmp_path / "unplugged")
    with pytest.raises(ValueError, match="is not this pack"):
        install(comfyui, link=False, pack=pack)


@pytest.mark.parametrize("name", ["dpdmd", "dpdmd-pipeline"])
def test_a_second_copy_of_the_same_nodes_is_refused(comfyui, pack, name):
    other = shutil.copytree(pack, comfyui / "custom_nodes" / "my-clone")
    (other / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    with pytest.raises(ValueError, match="my-clone brings the same nodes: remove it"):
        install(comfyui, link=False, pack=pack)
    other.rename(other.with_name("my-clone.disabled"))  # how ComfyUI's users switch a pack off
    install(comfyui, link=False, pack=pack)


def test_without_the_repository_the_missing_pack_is_named(comfyui, tmp_path):
    with pytest.raises(ValueError, match="clone the repository and run this command from there"):
        install(comfyui, link=False, pack=tmp_path / "site-packages" / "comfy_nodes")


def test_a_refusal_is_one_line_and_the_exit_code_1(comfyui):
    result = run(comfyui / "nowhere")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
