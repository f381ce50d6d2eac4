"""dvc.yaml and data/dvc.yaml agree with the pipelines, the catalog and the options of every environment."""

import hashlib
import importlib
import posixpath
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.io import CatalogConfigResolver
from kedro.pipeline import Pipeline

from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS

PROJECT = Path(__file__).parents[1]
CONF = PROJECT / "conf"
STAGES = ["prompts", "anchors", "train", "evaluate", "report", "export", "sample"]
STUDIES = ["study", "beyond", "variety"]
BY_NAME = {"teacher", "clip", *STUDIES}  # pipelines of data/dvc.yaml, whose results git holds
ENVIRONMENTS = sorted(path.parent.name for path in CONF.glob("*/globals.yml"))
EMBEDDED = ("base", "ci", "shapes_sdxl")
SHIPPED = [("data/06_models/shapes_clip", "shapes_clip")]
NOT_TRACKED = ("ScratchFolderDataset", "MemoryDataset", "FinishedModelDataset")


def pipeline(stage: str) -> Pipeline:
    return importlib.import_module(f"dpdmd_pipeline.pipelines.{stage}").create_pipeline()


def load(path: str | Path) -> Any:
    return yaml.safe_load((PROJECT / path).read_text())


@cache
def stages(environment: str, file: str = "dvc.yaml") -> dict[str, Any]:
    """Stages of a file with their variables resolved, paths relative to the project."""
    variables = {"env": environment, **load(f"conf/{environment}/globals.yml")}
    text = (PROJECT / file).read_text()
    for name, value in variables.items():
        text = text.replace(f"${{{name}}}", str(value)).replace("${item.environment}", environment)
    return yaml.safe_load(text)["stages"]


def paths(stage: dict[str, Any], *kinds: str) -> dict[str, dict[str, Any]]:
    """Path -> options of a stage's entries, paths relative to the project."""
    entries = [entry for kind in kinds for entry in stage.get(kind, [])]
    pairs = [pair for entry in entries for pair in ([(entry, {})] if isinstance(entry, str) else entry.items())]
    resolved = [posixpath.normpath(posixpath.join(stage["wdir"], path)) for path, _ in pairs]
    assert len(resolved) == len(set(resolved))
    return {path: options or {} for path, (_, options) in zip(resolved, pairs, strict=True)}


@cache
def catalog(environment: str) -> CatalogConfigResolver:
    return CatalogConfigResolver(CONFIG_LOADER_CLASS(str(CONF), env=environment, **CONFIG_LOADER_ARGS)["catalog"])


def files(datasets: set[str], environment: str) -> set[str]:
    """Paths of datasets that DVC tracks: neither options, nor checkpoints, nor the earlier student beside a new one."""
    entries = [entry for name in datasets if (entry := catalog(environment).resolve_pattern(name))]
    tracked = [entry for entry in entries if not entry["type"].endswith(NOT_TRACKED)]
    return {posixpath.normpath(entry["filepath"]) for entry in tracked if "filepath" in entry}


# ---- stages


def test_there_is_a_stage_for_each_pipeline_and_distill_is_their_sum_without_sample():
    pipelines = {path.parent.name for path in (PROJECT / "src/dpdmd_pipeline/pipelines").glob("*/pipeline.py")}
    assert set(stages("base")) == set(STAGES)
    by_name = stages("base", "data/dvc.yaml")
    assert by_name.keys() == {"teacher", "teacher_shapes_sdxl", "clip", "studies"}
    assert by_name["studies"]["matrix"] == {"study": STUDIES, "environment": ["base", "shapes_sdxl"]}
    assert pipelines == {*STAGES, *BY_NAME, "distill"}
    nodes = {node.name for stage in STAGES if stage != "sample" for node in pipeline(stage).nodes}
    assert nodes == {node.name for node in pipeline("distill").nodes}


def test_the_environment_is_the_only_variable_and_base_the_default():
    assert load("dvc.yaml")["vars"] == ["conf/run.yml"]
    assert load("conf/run.yml") == {"env": "base"}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_and_writes_what_its_pipeline_does(stage, environment):
    entry, nodes = stages(environment)[stage], pipeline(stage)
    assert entry["cmd"] == f"cd ../.. && kedro run --env {environment} --pipelines {stage}" and entry["desc"]
    assert entry["wdir"] == f"conf/{environment}" and entry["vars"] == ["globals.yml"]
    read = files(nodes.inputs(), environment)
    if environment not in EMBEDDED and "teacher" in nodes.inputs():
        read.add(f"conf/{environment}/globals.yml")  # the hub's teacher is known by its name and revision
    parent = load(f"conf/{environment}/globals.yml")["extends"]
    options = {path for path in paths(entry, "deps") if path.startswith("conf/base/parameters_")}
    options.add(f"conf/{parent}/parameters.yml")
    assert options <= paths(entry, "deps").keys()
    read = {path for path in read if not path.endswith("/.teacher")}  # converted from a file, where there is one
    assert paths(entry, "deps").keys() - options == read | {"src/dpdmd_pipeline"}
    written = files(nodes.all_outputs(), environment)
    assert paths(entry, "outs", "metrics", "plots").keys() == written


@pytest.mark.parametrize("stage", STAGES)
def test_git_holds_what_the_cache_does_not(stage):
    for environment in ("base", "ci", "sd35"):
        for path, options in paths(stages(environment)[stage], "outs", "metrics", "plots").items():
            assert is_ignored_by_git(path) == options.get("cache", True), path


def test_caches_and_students_are_kept_while_their_stage_runs():
    kept = {path for stage in STAGES for path, o in paths(stages("base")[stage], "outs").items() if o.get("persist")}
    assert {Path(path).name for path in kept} == {"embeddings", "anchors", "student", "student_dmd", "images"}


def test_a_stage_whose_result_git_holds_is_never_deleted_and_depends_on_no_code():
    for name, stage in stages("base", "data/dvc.yaml").items():
        outputs = [o for kind in ("outs", "metrics", "plots") for o in stage.get(kind, [])]
        assert outputs and all(list(o.values()) == [{"cache": False, "persist": True}] for o in outputs), name
        assert not any("src" in dep for dep in stage.get("deps", [])) and not stage.get("frozen")


@pytest.mark.parametrize("environment", ["base", "shapes_sdxl"])
def test_a_stage_by_name_makes_its_inputs_itself(environment):
    tracked = subprocess.check_output(["git", "ls-files", "data"], cwd=PROJECT, text=True).splitlines()
    for entry in stages(environment, "data/dvc.yaml").values():
        command = entry["cmd"].replace("${item.study}", ",".join(STUDIES))
        names = command.split("--pipelines ")[1].split(",")
        inputs = files(sum((pipeline(name) for name in names), Pipeline([])).inputs(), environment)
        missing = [path for path in inputs if not any(f"{file}/".startswith(f"{path}/") for file in tracked)]
        assert not missing, command


def test_no_title_of_a_chart_has_an_apostrophe():
    # it would end a string in the script of the page that `dvc plots show` writes
    charts = [
        *load("dvc.yaml")["plots"],
        *(entry for stage in stages("base").values() for entry in stage.get("plots", [])),
    ]
    titles = [
        text
        for chart in charts
        if isinstance(chart, dict)
        for name, options in chart.items()
        for text in (name, options.get("title", ""), options.get("y_label", ""))
    ]
    assert len(titles) > 9 and not [title for title in titles if "'" in title]


def is_ignored_by_git(path: str) -> bool:
    return subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=PROJECT).returncode == 0


@pytest.mark.parametrize("ending", ["partial", "ready", "old"])
@pytest.mark.parametrize("folder", ["05_model_input/{}anchors{}", "06_models/{}shapes_teacher{}"])
def test_an_unfinished_folder_is_ignored(folder, ending):
    path = f"data/{folder.format('.', '.' + ending)}/config.json"
    assert is_ignored_by_git(path) and is_ignored_by_dvc(path)


@pytest.mark.parametrize("path", ["06_models/.train_state/0/step_0000002/0.bin", "06_models/.student.lock"])
def test_checkpoints_and_locks_are_ignored(path):
    assert is_ignored_by_git(f"data/{path}") and is_ignored_by_dvc(f"data/{path}")


@cache
def dvc_ignore():
    from dvc.repo import Repo

    return Repo(PROJECT).dvcignore


def is_ignored_by_dvc(path: str) -> bool:
    return dvc_ignore().check_ignore(path).match


# ---- options


@cache
def base_files() -> dict[str, str]:
    """Parameter group -> file of conf/base."""
    return {group: path.name for path in (CONF / "base").glob("parameters*.yml") for group in load(path)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_options_of_its_nodes(stage):
    groups = {name.removeprefix("params:") for name in pipeline(stage).inputs() if name.startswith("params:")}
    # A parameter file outside of the stage's folder would be found changed every time where base is that folder.
    assert stages("ci")[stage]["params"] == [
        {"parameters.yml": None}
    ]  # all of it: an environment may change any option
    files_of_base = {Path(path).name for path in stages("base")[stage]["deps"] if path.startswith("../base/")}
    assert files_of_base >= {base_files()[group] for group in groups}
    listed = {Path(path).name for path in load("dvc.yaml")["params"]}
    assert files_of_base <= listed


@pytest.mark.parametrize("path", sorted(CONF.glob("*/parameters*.yml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_dvc_reads_the_options_that_kedro_reads(path):
    from dvc.utils.serialize import load_yaml
    from omegaconf import OmegaConf

    assert "${" not in path.read_text()  # DVC tracks the text of an interpolation, not its value
    assert load_yaml(str(path)) == OmegaConf.to_container(OmegaConf.load(path))


# ---- the locks


def test_the_committed_results_of_stages_by_name_are_those_of_their_lock():
    outputs = [out for stage in load("data/dvc.lock")["stages"].values() for out in stage["outs"]]
    digests = {posixpath.normpath(out["path"]).removeprefix("../../"): out["md5"] for out in outputs}
    tracked = subprocess.check_output(["git", "ls-files", "data"], cwd=PROJECT, text=True).splitlines()
    compared = {path: digests[path] for path in tracked if path in digests}
    assert len(compared) >= 3
    assert {path: hashlib.md5((PROJECT / path).read_bytes()).hexdigest() for path in compared} == compared


def test_the_lock_has_a_record_of_every_stage_with_the_options_of_conf():
    lock = load("dvc.lock")["stages"]
    assert set(lock) == set(STAGES)
    for stage in lock.values():
        for file, groups in stage["params"].items():
            if file != "../../conf/run.yml":
                current = load(posixpath.normpath(posixpath.join("conf/base", file)))
                assert {group: current[group] for group in groups} == groups, file
