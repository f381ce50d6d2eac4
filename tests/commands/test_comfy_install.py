"""`dpdmd-pipeline comfy-install`: the contents of custom_nodes afterwards, and refusals."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.raising import refuses

from dpdmd_pipeline.commands.comfy_install import PACK, install

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def comfyui(tmp_path):
    """The folders that identify a ComfyUI."""
    folder = tmp_path / "ComfyUI"
    for name in ("comfy", "custom_nodes", "models"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.fixture
def pack(tmp_path):
    """A small node pack."""
    folder = tmp_path / "pack"
    (folder / "web").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "web" / "help.md").write_text("new")
    (folder / "pyproject.toml").write_text('[project]\nname = "dpdmd"\nversion = "0.1.0"\n')
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def link_to_itself(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def in_custom_nodes(comfyui: Path) -> set[str]:
    return set(os.listdir(comfyui / "custom_nodes"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dpdmd_pipeline", "comfy-install", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_the_command_copies_the_whole_pack_and_tells_to_restart_comfyui(comfyui):
    result = run(comfyui)
    assert result.returncode == 0, result.stderr
    installed = comfyui / "custom_nodes" / "dpdmd"
    assert str(installed) in result.stdout and "Restart" in result.stdout
    expected = {name for name in files(PACK) if "__pycache__" not in name and "_cache/" not in name}
    assert files(installed) == expected and "__init__.py" in expected
    assert not installed.is_symlink()


def test_a_link_follows_the_repository(comfyui, pack):
    installed = install(comfyui, link=True, pack=pack)
    (pack / "web" / "help.md").write_text("newer")
    assert installed.is_symlink() and (installed / "web" / "help.md").read_text() == "newer"


def test_a_base_directory_of_models_and_nodes_is_enough(comfyui, pack):
    (comfyui / "comfy").rmdir()
    assert install(comfyui, link=False, pack=pack).is_dir()


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
@pytest.mark.parametrize("older", ["copy", "link"])
def test_an_older_install_is_replaced_without_leftovers(comfyui, pack, tmp_path, older, link):
    before = shutil.copytree(pack, tmp_path / "before")
    (before / "gone.py").write_text("")
    installed = install(comfyui, link=older == "link", pack=before)
    assert (installed / "gone.py").exists()

    install(comfyui, link=link, pack=pack)

    assert installed.is_symlink() == link and files(installed) == files(pack)
    assert in_custom_nodes(comfyui) == {"dpdmd"}
    assert (before / "gone.py").exists()  # the target of an older link stays


def test_compiled_python_files_are_not_copied(comfyui, pack):
    (pack / "__pycache__").mkdir()
    (pack / "__pycache__" / "nodes.pyc").write_text("")
    assert files(install(comfyui, link=False, pack=pack)) == files(pack) - {"__pycache__/nodes.pyc"}


def test_an_install_after_a_killed_one_succeeds(comfyui, pack):
    installed = install(comfyui, link=False, pack=pack)
    installed.rename(installed.with_name(".dpdmd.old.disabled"))  # killed between the two renames
    shutil.copytree(pack / "web", installed.with_name(".dpdmd.new.disabled"))
    install(comfyui, link=False, pack=pack)
    assert files(installed) == files(pack) and in_custom_nodes(comfyui) == {"dpdmd"}


def test_the_old_install_stays_if_it_cannot_be_replaced(comfyui, pack, monkeypatch):
    installed = install(comfyui, link=False, pack=pack)
    (installed / "old.py").write_text("")
    rename = Path.rename

    def refuse(self, target):
        if self.name == ".dpdmd.new.disabled":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError) as refused:
        install(comfyui, link=False, pack=pack)
    assert refused.value.errno == errno.EACCES and (installed / "old.py").exists()


def test_a_partial_install_has_a_name_that_comfyui_does_not_load(comfyui, pack):
    (pack / "broken").symlink_to(pack / "unplugged")
    with pytest.raises(OSError) as refused:
        install(comfyui, link=False, pack=pack)
    assert refused.value.errno == errno.ENOENT and refused.value.filename.endswith("broken")
    assert all(name.endswith(".disabled") for name in in_custom_nodes(comfyui))


@pytest.mark.parametrize(
    ("make", "has_hint"),
    [
        (lambda c: c.parent / "nowhere", False),
        (lambda c: c / "comfy", True),
        (lambda c: c / "custom_nodes", True),
        (lambda c: c.parent, True),
        (lambda c: Path(__file__), False),
        (lambda c: link_to_itself(c.parent / "loop"), False),
    ],
    ids=["missing", "inside", "custom nodes", "around", "file", "loop"],
)
def test_a_path_that_is_not_a_comfyui_is_refused_with_one_nearby(comfyui, pack, make, has_hint):
    path = make(comfyui)
    with pytest.raises(ValueError) as refused:
        install(path, link=False, pack=pack)
    start, hint = str(refused.value).split(": ")
    assert start.startswith(f"{path} ") and (f"{comfyui}?" in hint) == has_hint
    assert in_custom_nodes(comfyui) == set()


@pytest.mark.parametrize("pyproject", [None, "[project]\nname = 'theirs'\n", "project = 3\n", "not toml ["])
def test_a_foreign_folder_of_the_same_name_stays(comfyui, pack, pyproject):
    theirs = comfyui / "custom_nodes" / "dpdmd"
    theirs.mkdir()
    if pyproject:
        (theirs / "pyproject.toml").write_text(pyproject)
    with pytest.raises(ValueError, match=f"^{theirs} "):
        install(comfyui, link=False, pack=pack)
    assert in_custom_nodes(comfyui) == {"dpdmd"} and files(theirs) <= {"pyproject.toml"}


def test_a_broken_link_of_the_same_name_stays(comfyui, pack, tmp_path):
    (comfyui / "custom_nodes" / "dpdmd").symlink_to(tmp_path / "unplugged")
    with refuses(ValueError, "custom_nodes/dpdmd"):
        install(comfyui, link=False, pack=pack)
    assert (comfyui / "custom_nodes" / "dpdmd").is_symlink()


@pytest.mark.parametrize("name", ["dpdmd", "dpdmd-pipeline"])
def test_a_second_copy_of_the_same_nodes_is_refused(comfyui, pack, name):
    other = shutil.copytree(pack, comfyui / "custom_nodes" / "my-clone")
    (other / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    with pytest.raises(ValueError, match=f"^{other} "):
        install(comfyui, link=False, pack=pack)
    other.rename(other.with_name("my-clone.disabled"))  # ComfyUI's way to switch a pack off
    install(comfyui, link=False, pack=pack)


def test_another_pack_with_an_unreadable_pyproject_does_not_matter(comfyui, pack):
    contents = {"deep": "x = " + "[" * 5000 + "]" * 5000, "number": f"x = {'1' * 5000}", "latin": b"x = '\xe9'"}
    for name in (*contents, "pipe"):
        (comfyui / "custom_nodes" / name).mkdir()
    for name, content in contents.items():
        file = comfyui / "custom_nodes" / name / "pyproject.toml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.mkfifo(comfyui / "custom_nodes" / "pipe" / "pyproject.toml")
    (comfyui / "custom_nodes" / "loop").symlink_to("loop")
    assert install(comfyui, link=False, pack=pack).is_dir()


def test_a_missing_pack_is_refused_with_its_path(comfyui, tmp_path):
    with refuses(ValueError, f"{tmp_path}/site-packages/comfy_nodes"):
        install(comfyui, link=False, pack=tmp_path / "site-packages" / "comfy_nodes")


def test_a_refusal_is_one_line_with_exit_code_1(comfyui):
    result = run(comfyui / "nowhere")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
