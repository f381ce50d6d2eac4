"""`dpdmd-pipeline`: its commands, and the refusal of other words."""

import contextlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dpdmd_pipeline.__main__ import app, main
from dpdmd_pipeline.commands.doctor import CARDS, EXTRAS, ON_CPU, doctor, fitting

ROOT = Path(__file__).parents[1]
COMMANDS = ("run", "doctor", "sample", "score", "arena", "comfy-install")


def test_the_help_lists_every_command_and_loads_no_torch():
    code = "import sys; from dpdmd_pipeline.__main__ import app; app(['--help'], standalone_mode=False)"
    command = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(re.search(rf"^  {name}  +[A-Z]", shown, re.MULTILINE) for name in COMMANDS)
    assert "--install-completion" in shown


@pytest.mark.parametrize("name, near", [("comfy_install", "comfy-install"), ("scores", "score"), ("zzz", "")])
def test_another_word_is_refused_with_the_most_similar_command(monkeypatch, name, near):
    monkeypatch.setattr(sys, "argv", ["dpdmd-pipeline", name, "x"])
    with pytest.raises(SystemExit) as refused:
        main()
    message = refused.value.code  # Python prints it to stderr and exits with 1
    assert repr(name) in message and (repr(near) in message) == bool(near)
    assert all(command in message for command in COMMANDS) and "\n" not in message


@pytest.mark.parametrize("arguments", [["run", "--env", "zzz"], ["--env", "zzz"]])
def test_options_go_to_kedro(monkeypatch, arguments):
    given = []
    monkeypatch.setattr("dpdmd_pipeline.__main__._run_kedro", given.extend)
    monkeypatch.setattr(sys, "argv", ["dpdmd-pipeline", *arguments])
    with contextlib.suppress(SystemExit):
        main()
    assert given == ["--env", "zzz"]


# ---- doctor


def test_the_doctor_knows_the_card_of_every_environment_and_the_readme_agrees():
    real = {path.parent.name for path in (ROOT / "conf").glob("*/globals.yml")} - {*ON_CPU}
    assert set(CARDS) == real
    rows = re.findall(r"^\| (\d+) GB \| `(\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name: int(size) for size, name in rows} == CARDS


@pytest.mark.parametrize("gib, more", [(0, 0), (11.6, 1), (15.6, 3), (23.5, 4), (79.2, 6), (95.0, 7)])
def test_the_doctor_takes_a_card_for_what_its_maker_calls_it(gib, more):
    assert fitting(int(gib * 2**30)) == [*ON_CPU, *list(CARDS)[:more]]


def test_the_doctor_names_every_optional_part_with_its_remedy(capsys):
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == optional.keys() - {"dev"}
    doctor()
    shown = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", shown) for name in EXTRAS) and "torch" in shown
    assert max(map(len, shown.splitlines())) < 400


# ---- sample


def test_samples_are_refused_before_a_student_is_read(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for student, out in (("nothing", "new"), ("full", "full")):
        options = ["--student", str(tmp_path / student), "--out", str(tmp_path / out)]
        with pytest.raises(OSError, match=f"/{student} "):
            app(["sample", "a red circle", *options], standalone_mode=False)
