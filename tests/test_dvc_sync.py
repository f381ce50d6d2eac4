"""dvc.yaml says what the pipelines, the catalog, the options and the imports say."""

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from kedro.config import OmegaConfigLoader
from kedro.pipeline import Pipeline

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS

PROJECT = Path(__file__).parents[1]
PACKAGE = Path("src/dpdmd_pipeline")
STAGES = ["prompts", "teacher", "clip", "anchors", "train", "evaluate", "report", "export", "sample", "study", "beyond"]
FROZEN = {"teacher", "clip", "study", "beyond"}  # long, not in the main job, and their results are in git
APART = {"sample"}  # draws what its user asks for; no part of the main job
DVC = yaml.safe_load((PROJECT / "dvc.yaml").read_text())
CATALOG = OmegaConfigLoader(str(PROJECT / "conf"), env="base", **CONFIG_LOADER_ARGS)["catalog"]
PIPELINES = sorted(path.parent.name for path in (PROJECT / PACKAGE / "pipelines").glob("*/pipeline.py"))
ENVIRONMENTS = sorted({path.parent.name for path in PROJECT.glob("conf/*/parameters_*.yml")} - {"local"})


def pipeline(stage: str) -> Pipeline:
    return importlib.import_module(f"dpdmd_pipeline.pipelines.{stage}").create_pipeline()


def names(entries: list) -> list[str]:
    """Paths of a list of dvc.yaml, with options or without."""
    return [name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)]


def data(datasets: set[str]) -> set[str]:
    """Files of what pipelines read and write; not their options, nor the checkpoints, which DVC must not see."""
    known = {name: CATALOG[name] for name in datasets if not name.startswith("params:")}
    seen = [entry for entry in known.values() if not entry["type"].endswith(("ScratchFolderDataset", "MemoryDataset"))]
    return {entry.get("filepath") or entry["path"] for entry in seen}


# ---- stages


def test_there_is_a_stage_for_each_pipeline_and_distill_is_the_sum_of_those_that_are_not_frozen():
    assert set(DVC["stages"]) == set(PIPELINES) - {"distill"} == set(STAGES)
    line = {node.name for stage in STAGES if stage not in FROZEN | APART for node in pipeline(stage).nodes}
    assert line == {node.name for node in pipeline("distill").nodes}


def test_a_frozen_stage_is_left_to_git_and_what_it_made_is_not_deleted():
    assert {name for name, stage in DVC["stages"].items() if stage.get("frozen")} == FROZEN
    for stage in FROZEN:
        options = [value for entry in DVC["stages"][stage]["outs"] for value in entry.values()]
        assert options == [{"cache": False, "persist": True}] * len(options)


def test_the_environment_is_the_only_variable():
    assert DVC["vars"] == ["conf/run.yml"]
    assert yaml.safe_load((PROJECT / "conf/run.yml").read_text()) == {"env": "base"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_described_and_runs_its_pipeline(stage):
    assert DVC["stages"][stage]["cmd"] == f"kedro run --env ${{env}} --pipelines {stage}"
    assert DVC["stages"][stage]["desc"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_what_its_pipeline_reads(stage):
    found = {dep for dep in DVC["stages"][stage]["deps"] if dep.startswith("data/")}
    assert found == data(pipeline(stage).inputs())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gives_what_its_pipeline_writes(stage):
    found = DVC["stages"][stage]
    written = names([*found["outs"], *found.get("metrics", []), *found.get("plots", [])])
    assert len(written) == len(set(written))
    assert set(written) == data({name for name in pipeline(stage).all_outputs() if name in CATALOG})


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_git_holds_is_kept_out_of_the_cache(stage):
    # an uncached out that is neither metric nor plot would switch the run-cache off for its stage
    found = DVC["stages"][stage]
    for kind in ("outs", "metrics", "plots"):
        for entry in found.get(kind, []):
            for path, options in (entry if isinstance(entry, dict) else {entry: {}}).items():
                assert is_ignored_by_git(path) == options.get("cache", True), path
                assert kind != "outs" or options.get("cache", True) or stage in FROZEN


def is_ignored_by_git(path: str) -> bool:
    return subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=PROJECT).returncode == 0


@pytest.mark.parametrize("ending", ["partial", "ready", "old"])
@pytest.mark.parametrize("folder", ["05_model_input/{}anchors{}", "06_models/{}shapes_teacher{}"])
def test_a_folder_in_the_making_is_nobodys_business(folder, ending):
    path = f"data/{folder.format('.', '.' + ending)}/config.json"
    assert is_ignored_by_git(path) and is_ignored_by_dvc(path)


@pytest.mark.parametrize("path", ["06_models/.train_state/0/step_0000002.pt", "06_models/.student.lock"])
def test_checkpoints_and_locks_are_nobodys_business(path):
    assert is_ignored_by_git(f"data/{path}") and is_ignored_by_dvc(f"data/{path}")


@cache
def dvc_ignore():
    from dvc.repo import Repo

    return Repo(PROJECT).dvcignore


def is_ignored_by_dvc(path: str) -> bool:
    return dvc_ignore().check_ignore(path).match


# ---- options


@cache
def parameter_files() -> dict[str, str]:
    """Parameter group -> file name, of conf/base."""
    files = (PROJECT / "conf/base").glob("parameters_*.yml")
    return {group: path.name for path in files for group in yaml.safe_load(path.read_text())}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_the_options_that_its_nodes_take(stage):
    groups = {name.removeprefix("params:") for name in pipeline(stage).inputs() if name.startswith("params:")}
    expected: dict[str, set[str] | None] = {}
    for group in groups:
        file = parameter_files()[group]
        expected.setdefault(f"conf/base/{file}", set()).add(group)
        expected[f"conf/${{env}}/{file}"] = None  # all of it: every environment changes what it likes
    entries = [item for entry in DVC["stages"][stage]["params"] for item in entry.items()]
    assert {path: keys and set(keys) for path, keys in entries} == expected
    assert len(entries) == len(expected)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_environment_has_every_file_that_dvc_reads(environment):
    missing = {file for file in parameter_files().values() if not (PROJECT / "conf" / environment / file).is_file()}
    assert not missing, "DVC stops at a missing file: write one with {} in it"


@pytest.mark.parametrize(
    "path", sorted(PROJECT.glob("conf/*/parameters_*.yml")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_dvc_reads_the_numbers_that_kedro_reads(path):
    from dvc.utils.serialize import load_yaml
    from omegaconf import OmegaConf

    if path.parent.name == "local":
        pytest.skip("neither in git nor seen by a stage")
    # what a user gives on the command line belongs to one run; DVC's stages give nothing there
    text = re.sub(r"\$\{runtime_params:[^}]*\}", "", path.read_text())
    assert "${" not in text, "DVC tracks the text of an interpolation, not its value"
    assert load_yaml(str(path)) == OmegaConf.to_container(OmegaConf.load(path))


# ---- code


def module_file(name: str) -> Path | None:
    stem = PROJECT / "src" / name.replace(".", "/")
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def imported(path: Path) -> Iterator[str]:
    """Names that a file may import, at the top or inside functions, by name or as a model family."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write absolute imports, this test does not follow others"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (f"dpdmd_pipeline.backbones.{family}" for family in FAMILIES)


@cache
def closure(stage: str) -> set[str]:
    """First-party files that a stage runs: its folder, the datasets it reads and writes, and what they import.

    Left out: hooks.py and settings.py, which decide how a run is refused, not what it gives.
    """
    used = pipeline(stage)
    classes = [CATALOG[name]["type"] for name in used.all_inputs() | used.all_outputs() if name in CATALOG]
    todo = [*(PROJECT / PACKAGE / "pipelines" / stage).glob("*.py")]
    todo += [path for name in classes if (path := module_file(name.rpartition(".")[0]))]
    found: set[Path] = set()
    while todo:
        if (path := todo.pop()) not in found:
            found.add(path)
            todo += [file for name in imported(path) if (file := module_file(name))]
    return {path.relative_to(PROJECT).as_posix() for path in found}


def code(stage: str) -> dict[str, set[str]]:
    """Code dependency of dvc.yaml -> its files."""
    deps = [dep for dep in DVC["stages"][stage]["deps"] if dep.startswith("src/")]
    return {
        dep: {path.relative_to(PROJECT).as_posix() for path in (PROJECT / dep).glob("**/*.py")} or {dep} for dep in deps
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_change_of_any_code_that_a_stage_runs_makes_it_stale(stage):
    missing = closure(stage) - set().union(*code(stage).values())
    assert not missing, f"add to the deps of stage {stage}: {sorted(missing)}"


@pytest.mark.parametrize("stage", STAGES)
def test_no_other_code_makes_a_stage_stale(stage):
    packages = {Path(path).parent / "__init__.py" for path in closure(stage)}  # they run before their modules
    implied = [file for package in packages for name in imported(PROJECT / package) if (file := module_file(name))]
    run = closure(stage) | {path.as_posix() for path in packages}
    run |= {path.relative_to(PROJECT).as_posix() for path in implied}
    for dep, files in code(stage).items():
        assert (PROJECT / dep).exists()
        extra = files - run
        assert not extra, f"stage {stage} does not run {sorted(extra)}: name the files of {dep} that it does run"
