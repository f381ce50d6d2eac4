import os
from pathlib import Path

import pytest

from dpdmd_pipeline.commands.output import refuse_unwritable
from dpdmd_pipeline.publishing import write_text

CLOSED = Path("/sys")  # for everybody, root too


def test_what_can_be_written_is_taken_as_it_is_written(tmp_path):
    (tmp_path / "there.json").write_text("old")
    (tmp_path / "there.json").chmod(0o444)  # it is replaced, so that only its folder must allow it
    (tmp_path / "link.json").symlink_to("new.json")
    for path in ("there.json", "link.json", "other.json"):
        refuse_unwritable("--json", tmp_path / path)
        write_text(tmp_path / path, "new")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null", "/dev/stdout"):
        refuse_unwritable("--json", Path(path))
    assert {path.name for path in tmp_path.iterdir()} == {"there.json", "link.json", "new.json", "other.json", "pipe"}


def test_what_cannot_be_written_is_refused_by_the_name_that_was_given_with_the_remedy(tmp_path):
    (tmp_path / "link.json").symlink_to(CLOSED / "new.json")
    for path in (CLOSED / "new.json", tmp_path / "link.json"):
        told = rf"^--json {path}: nothing can be written in {CLOSED} \(.*\): make it writable, or choose another file$"
        with pytest.raises(OSError, match=told):
            refuse_unwritable("--json", path)


def test_a_pipe_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("os.access", lambda path, mode: (path, mode) != (tmp_path / "pipe", os.W_OK))
    with pytest.raises(OSError, match="--json .*/pipe may not be written: choose another file"):
        refuse_unwritable("--json", tmp_path / "pipe")


def test_a_folder_that_is_not_there_is_named_also_behind_a_link(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "gone" / "x.json")
    for name in ("link.json", "gone/x.json"):
        with pytest.raises(OSError, match=rf"{name}: there is no folder {tmp_path}/gone$"):
            refuse_unwritable("--out", tmp_path / name)
