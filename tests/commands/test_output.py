import os
from pathlib import Path

import pytest
from tests.raising import refuses

from dpdmd_pipeline.__main__ import main as run_package
from dpdmd_pipeline.commands.output import refuse_unwritable
from dpdmd_pipeline.publishing import write_text

CLOSED = Path("/sys")  # closed to root too


def test_a_file_that_can_be_written_is_accepted_and_not_touched(tmp_path):
    (tmp_path / "there.json").write_text("old")
    (tmp_path / "there.json").chmod(0o444)  # writing replaces it, so only its folder must allow it
    (tmp_path / "link.json").symlink_to("new.json")
    for path in ("there.json", "link.json", "other.json"):
        refuse_unwritable("--json", tmp_path / path)
        write_text(tmp_path / path, "new")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null", "/dev/stdout"):
        refuse_unwritable("--json", Path(path))
    assert {path.name for path in tmp_path.iterdir()} == {"there.json", "link.json", "new.json", "other.json", "pipe"}


def test_a_file_that_cannot_be_written_is_refused_by_the_given_name(tmp_path):
    (tmp_path / "link.json").symlink_to(CLOSED / "new.json")
    for path in (CLOSED / "new.json", tmp_path / "link.json"):
        with pytest.raises(OSError, match=rf"^--json {path}: .*{CLOSED}") as refused:
            refuse_unwritable("--json", path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["loop", "loop/x.json", "one"])
def test_a_link_that_leads_to_itself_is_refused(tmp_path, name):
    for link, target in (("loop", "loop"), ("one", "two"), ("two", "one")):
        (tmp_path / link).symlink_to(target)
    with refuses(OSError, f"--json {tmp_path / name}"):
        refuse_unwritable("--json", tmp_path / name)


def test_an_error_does_not_command_the_terminal(monkeypatch):
    def fail(*_, **options):
        raise ValueError("x\x1b[2J\nforged")

    monkeypatch.setattr("dpdmd_pipeline.commands.comfy_install.install", fail)
    monkeypatch.setattr("sys.argv", ["dpdmd-pipeline", "comfy-install", "x"])
    with pytest.raises(SystemExit) as ended:
        run_package()
    assert ended.value.code == r"Error: x\x1b[2J\nforged"


def test_a_pipe_without_the_right_to_write_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("os.access", lambda path, mode: (path, mode) != (tmp_path / "pipe", os.W_OK))
    with pytest.raises(OSError, match=f"^--json {tmp_path}/pipe "):
        refuse_unwritable("--json", tmp_path / "pipe")


def test_a_missing_folder_is_named_also_behind_a_link(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "gone" / "x.json")
    for name in ("link.json", "gone/x.json"):
        with pytest.raises(OSError, match=rf"^--out {tmp_path}/{name}: .*{tmp_path}/gone "):
            refuse_unwritable("--out", tmp_path / name)
