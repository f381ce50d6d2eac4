"""Files and folders are replaced as a whole, one writer at a time, with the usual modes."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.raising import refuses

from dpdmd_pipeline.publishing import (
    Folders,
    LockedError,
    locked,
    publish,
    recover,
    replacing,
    sha256,
    write_atomically,
    write_text,
    writing,
)

FILE_MODES = [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]  # umask, of files, of folders


@pytest.fixture(params=FILE_MODES, ids=lambda modes: f"umask {modes[0]:03o}")
def modes(request):
    """Modes of files and folders under a umask."""
    umask, *expected = request.param
    before = os.umask(umask)
    yield expected
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_privately(path: Path) -> None:
    """Write as libraries do that rename a temporary file of mode 0600."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    os.write(descriptor, b"content")
    os.close(descriptor)
    os.rename(name, path)


WRITERS = {
    "text": lambda path: path.write_text("content"),
    "torch.save": partial(torch.save, {"x": torch.ones(3)}),
    "safetensors": lambda path: save_file({"x": torch.ones(3)}, path),
    "private": write_privately,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_has_the_mode_of_any_new_file(tmp_path, modes, write):
    path = tmp_path / "file"
    for _ in range(2):
        write_atomically(path, write)
        assert mode(path) == modes[0]
        path.chmod(0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_text_has_the_mode_of_any_new_file(tmp_path, modes):
    write_text(tmp_path / "file", "content")
    assert mode(tmp_path / "file") == modes[0]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_text_replaces_a_link_into_a_cache_of_read_only_files(tmp_path, link):
    (tmp_path / "cache").mkdir()
    cached = tmp_path / "cache" / "object"
    cached.write_text("old")
    cached.chmod(0o444)
    getattr(tmp_path / "file", link)(cached)
    write_text(tmp_path / "file", "new")
    assert ((tmp_path / "file").read_text(), cached.read_text(), mode(cached)) == ("new", "old", 0o444)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "file", "object"]


@pytest.mark.parametrize("write", [lambda path: write_text(path, "a"), Folders.of], ids=["text", "folder"])
@pytest.mark.parametrize("name", ["loop", "loop/file"])
def test_a_link_that_leads_to_itself_is_refused(tmp_path, write, name):
    (tmp_path / "loop").symlink_to("loop")
    with refuses(OSError, str(tmp_path / name), "leads to itself"):
        write(tmp_path / name)


def test_files_and_folders_of_a_folder_have_the_modes_of_any_new_ones(tmp_path, modes):
    (tmp_path / "elsewhere").write_text("not ours")
    (tmp_path / "elsewhere").chmod(0o640)
    with replacing(Folders.of(tmp_path / "folder")) as folder:
        write_privately(folder / "weights")
        (folder / "link").symlink_to(tmp_path / "elsewhere")
        inner = Path(tempfile.mkdtemp(dir=folder)).rename(folder / "inner")
        write_privately(inner / "weights")
    published = tmp_path / "folder"
    assert sorted(path.name for path in published.iterdir()) == ["inner", "link", "weights"]
    assert {mode(published / "weights"), mode(published / "inner" / "weights")} == {modes[0]}
    assert {mode(published), mode(published / "inner")} == {modes[1]}
    assert mode(tmp_path / "elsewhere") == 0o640


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    write_atomically(tmp_path / "file", lambda path: path.write_text("old"))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", fail)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_recover_prefers_the_new_folder_to_the_old(tmp_path):
    folders = Folders.of(tmp_path / "thing")
    for folder, text in ((folders.published, "one before"), (folders.ready, "new"), (folders.old, "oldest")):
        folder.mkdir()
        (folder / "file").write_text(text)
    recover(folders)
    assert (folders.published / "file").read_text() == "new"
    assert not folders.old.exists()


def test_publishing_needs_no_old_folder(tmp_path):
    folders = Folders.of(tmp_path / "thing")
    folders.partial.mkdir()
    publish(folders)
    assert folders.published.is_dir()


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with locked(Folders.of(tmp_path / "thing")):
            pass


def test_a_lock_ends_with_its_process_and_names_it(tmp_path):
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from dpdmd_pipeline.publishing import Folders, locked
        with locked(Folders.of(Path(sys.argv[1]))):
            print("locked", flush=True)
            sys.stdin.read()
        """
    )
    folders = Folders.of(tmp_path / "thing")
    command = [sys.executable, "-c", code, str(folders.published)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=rf"{folders.published} .*\b{other.pid}\b"), locked(folders):
            pass
        other.kill()
    with locked(folders):
        pass


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "writable"), (errno.EROFS, "read-only"), (errno.ENOSPC, "space"), (errno.EFBIG, "file size limit")],
)
def test_an_error_of_the_system_names_the_path_and_a_remedy(number, remedy):
    with (
        refuses(OSError, f"{os.strerror(number)}", f"{remedy}", "'/data/anchors'") as caught,
        writing(Path("/data/anchors")),
    ):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number


def test_a_process_hashes_a_file_once_unless_it_changes(tmp_path, monkeypatch):
    path, moved, reads, digest = tmp_path / "x", tmp_path / "y", [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: reads.append(1) or digest(*args))
    path.write_bytes(b"a")
    before = [sha256(path), sha256(path)]  # too new: a change within the clock's tick would not be seen
    os.utime(path, (1, 1))
    assert {*before, sha256(path), sha256(path), sha256(path.rename(moved))} == {hashlib.sha256(b"a").hexdigest()}
    assert len(reads) == 3
    moved.write_bytes(b"b")
    assert sha256(moved) == hashlib.sha256(b"b").hexdigest()
