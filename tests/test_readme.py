"""Commands and Python of the pages that need neither the line's results nor a GPU; the others run in test_demo.py."""

import shutil

import pytest
import yaml
from tests.fenced import ROOT, blocks, commands

PAGES = ("README.md", "docs/dvc.md", "docs/running.md")
KNOWN = {"kedro", "dvc", "make", ".", "dpdmd-pipeline", "pip", "tensorboard", "git"}
EXPERIMENTS = [command for page in PAGES for command in commands(page) if command[:3] == ["dvc", "exp", "run"]]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_of_a_kind_that_the_tests_know(page):
    assert {command[0] for command in commands(page)} <= KNOWN


@pytest.mark.parametrize("command", EXPERIMENTS, ids=" ".join)
def test_an_experiment_changes_the_one_value_that_it_names(command, tmp_path):
    from dvc.utils.hydra import apply_overrides

    file, override = command[command.index("-S") + 1].split(":", 1)
    shutil.copy(ROOT / file, tmp_path / "options.yml")
    apply_overrides(tmp_path / "options.yml", [override])
    before, after = (yaml.safe_load(path.read_text()) for path in (ROOT / file, tmp_path / "options.yml"))
    name, _, value = override.partition("=")
    *groups, key = name.split(".")
    changed = before
    for group in groups:
        changed = changed[group]
    assert key in changed
    changed[key] = yaml.safe_load(value)
    assert after == before


@pytest.mark.parametrize("block", blocks("docs/embedded.md", "python"))
def test_the_embedded_teachers_load_and_draw_as_the_page_says(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block, names)  # noqa: S102
    assert names["image"].size == (32, 32)
