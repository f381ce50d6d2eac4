"""The whole line on a copy of the project, through the command line: run, run again, broken off, refused."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.fenced import blocks, commands
from tests.forked import ForkedKedro

PROJECT = Path(__file__).parents[1]
MODELS = ("teacher", "dmd", "dp_dmd")
STARTED = "dmd_start"
WEIGHTS = "data/06_models/ci/{}/diffusion_pytorch_model.safetensors"
OUTPUTS = [
    "data/03_primary/ci/prompts.jsonl",
    "data/05_model_input/ci/embeddings/manifest.json",
    "data/05_model_input/ci/anchors/manifest.json",
    *(WEIGHTS.format(student) for student in ("student", "student_dmd")),
    "data/07_model_output/ci/images/manifest.json",
    *(f"data/08_reporting/ci/grid_{model}.png" for model in MODELS),
    *(
        f"data/08_reporting/ci/{name}.json"
        for name in ("metrics", "summary", "scores", "prompts_report", "train_history", "train_history_dmd")
    ),
    *(f"data/08_reporting/ci/plot_{name}.json" for name in ("losses", "watched", "prompts")),
    *(f"data/08_reporting/ci/{name}" for name in ("train_curve.png", "report.html", "report.md")),
]


STAGES = ["prompts", "anchors", "train", "evaluate", "export", "report"]


class Run:
    """A `kedro run` in the ci environment; what it prints, or the log that it shows, is read line by line."""

    def __init__(self, project: Path, *args: str, forked: bool = True) -> None:
        self.lines: list[str] = []
        more = {"DO_NOT_TRACK": "1", "COLUMNS": "250", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command, environment = ["run", "--env", "ci", "--verbose", *args], os.environ | more
        if forked:
            self.process = ForkedKedro(command, project, environment)
        else:
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            command.remove("--verbose")
            whole = [sys.executable, "-m", "kedro", *command]
            self.process = subprocess.Popen(whole, cwd=project, env=environment, **streams)

    def wait_for(self, words: str) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if words in line:
                return
        raise AssertionError(f"ended without {words!r}:\n{''.join(self.lines)}")

    def end(self) -> str:
        self.lines += self.process.communicate(timeout=120)[0].splitlines(keepends=True)
        return "".join(self.lines)


def run(project: Path, *args: str, forked: bool = True) -> str:
    """The output of a run that ends well."""
    running = Run(project, *args, forked=forked)
    output = running.end()
    assert running.process.returncode == 0, output
    return output


def refusal(project: Path, *args: str) -> str:
    """The one line of a run that is refused."""
    running = Run(project, *args)
    output = running.end()
    assert running.process.returncode == 1 and "Traceback" not in output and output.count("Error:") == 1, output
    return output[output.index("Error:") + 7 :].strip()


def weights(project: Path, student: str) -> dict[str, bytes]:
    from safetensors.torch import load_file

    tensors = load_file(project / WEIGHTS.format(student))
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """What a fresh clone holds of what a run needs."""
    folder = tmp_path_factory.mktemp("demo") / "project"
    models = [f"data/06_models/{name}" for name in ("shapes_teacher", "shapes_clip")]
    for name in ("conf/base", "conf/ci", "src/dpdmd_pipeline", "data/01_raw", *models):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".telemetry", "conf/logging.yml"):
        shutil.copy(PROJECT / name, folder / name)
    (folder / "conf/local").mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(project) -> tuple[Path, str]:
    """The project after one uninterrupted run, and what that printed."""
    return project, run(project, "--pipeline=distill", forked=False)


@pytest.fixture
def without(finished, tmp_path):
    """Copies of the finished project that lack some of the results."""

    def copy(*missing: str) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(finished[0], folder)
        for name in missing:
            shutil.rmtree(folder / name)
        return folder

    return copy


# ---- a run


def test_one_command_makes_every_output_of_the_line(finished):
    project, output = finished
    assert not [name for name in OUTPUTS if not (project / name).is_file()]
    assert "deprecated" not in output.lower() and "WARNING" not in output
    lines = output.strip().splitlines()
    assert "data/08_reporting/ci/report.html" in lines[-2] and len(lines) <= 40
    assert [line.split()[1] for line in lines if re.match(r" [1-6]/6 ", line)] == STAGES
    assert re.search(r"teacher +DMD +DMD \+ teacher start +DP-DMD +gap recovered", output)
    assert not any(word in output for word in ("Loading data", "Running node", "INFO", "\x1b"))
    assert "Running node: train_dmd" in (project / "logs/dpdmd.log").read_text()


def test_metrics_have_quality_diversity_and_cost_of_each_model(finished):
    metrics = json.loads((finished[0] / "data/08_reporting/ci/metrics.json").read_text())
    models = (*MODELS, STARTED)
    assert list(metrics) == [*models, "rank_correlation"]
    assert [metrics[model]["nfe"] for model in models] == [12, 4, 4, 9]
    for model in models:
        assert metrics[model]["n"] == {"prompts": 12, "per_prompt": 4}
        assert set(metrics[model]["quality"]) == {"valid", "aligned", "residual"}
        assert set(metrics[model]["diversity"]) == {"effective_modes", "coverage", "entropy", "pairwise_distance"}
        for measured in (*metrics[model]["quality"].values(), *metrics[model]["diversity"].values()):
            assert measured["low"] <= measured["value"] <= measured["high"]
    assert [("gap_recovered" in metrics[model]) for model in MODELS] == [False, False, True]
    assert set(metrics["dp_dmd"]["gap_recovered"]) == set(metrics["dp_dmd"]["diversity"])
    clip = {f"diversity.clip_shapes.{name}" for name in ("one_minus_cosine", "vendi", "duplicate_rate")}
    clip |= {"alignment.clip_shapes.score"}
    for model in MODELS:
        assert set(metrics[model]["figures"]) == clip and not metrics[model]["missing"]
    assert set(metrics["rank_correlation"]) > {"diversity.clip_shapes.vendi"}


def test_histories_have_a_row_a_step(finished):
    for name, diverse in (("train_history", True), ("train_history_dmd", False)):
        rows = json.loads((finished[0] / f"data/08_reporting/ci/{name}.json").read_text())
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all((row["diversity_loss"] > 0) == diverse for row in rows)
        assert len({tuple(row) for row in rows}) == 1  # dvc plots reads no others


def test_the_same_command_again_reuses_what_is_finished_and_says_so(finished):
    project, _ = finished
    before = {name: (project / name).read_bytes() for name in OUTPUTS}
    output = run(project, "--pipelines", "distill")
    for what in ("embeddings: reused", "anchors: reused", "images: reused"):
        assert what in output, output
    assert len(re.findall(r" (DMD|DP-DMD): finished student reused", output)) == 2
    assert len(re.findall(r"diversity.clip_shapes of \w+: reused", output)) == 4
    assert " cycle 1/3" not in output and " written " not in output and "measured in" not in output
    changed = [name for name, content in before.items() if (project / name).read_bytes() != content]
    assert not changed


GAPS = ("diversity.clip_shapes", "alignment.clip_shapes")


def test_a_metric_without_weights_is_named_and_the_run_ends_well_unless_it_is_strict(without):
    project = without()
    (project / "data/06_models/shapes_clip/open_clip_model.safetensors").unlink()
    *_, last = run(project, "--pipelines", "evaluate,report").strip().splitlines()
    assert all(name in last for name in GAPS) and "metrics.json" in last
    page = (project / "data/08_reporting/ci/report.md").read_text().replace("\\", "")
    assert all(name in page[page.index("### Not measured") :] for name in GAPS)
    strict = Run(project, "--pipelines", "evaluate,report", "--params", "evaluate.strict=true")
    output = strict.end()
    assert strict.process.returncode == 3 and "Traceback" not in output
    assert [all(name in line for name in GAPS) for line in output.splitlines() if "Error:" in line] == [True]


# ---- the README


@pytest.fixture(scope="module")
def small(finished) -> Path:
    """The finished project, in which a run without `--env` is as small as one of ci, and reuses its results."""
    project = finished[0].parent / "small"
    shutil.copytree(finished[0], project)
    for name in ("globals", "parameters"):
        shutil.copy(project / f"conf/ci/{name}.yml", project / f"conf/local/{name}.yml")
    (project / "data/06_models/export").symlink_to("ci/export")
    shutil.copytree(PROJECT / "conf", project / "conf", dirs_exist_ok=True)
    (project / "FILE").write_text(
        "run: {pipelines: sample, params: {sample: {prompts: [a red circle, a blue square]}}}"
    )
    return project


KEDRO = [command[2:] for command in commands("README.md") if command[:2] == ["kedro", "run"]]
RUNS = [command for command in KEDRO if "--env" not in command and command != ["--pipeline=distill"]]


def as_written(project: Path, command: list[str]) -> tuple[int, str]:
    process = ForkedKedro(["run", *command], project, os.environ | {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"})
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


@pytest.mark.parametrize("command", RUNS, ids=" ".join)
def test_a_command_of_the_readme_runs_as_written(small, command):
    code, output = as_written(small, command)
    assert code == 0, output


@pytest.mark.parametrize("command", [command for command in KEDRO if "--env" in command], ids=" ".join)
def test_a_command_of_the_readme_for_a_real_teacher_lacks_nothing_but_files(small, command):
    if "ci" in command:
        return  # the run of this module's other tests
    code, output = as_written(small, command)
    missing = [file for file in ("my.safetensors", "train.txt", "eval.txt", "local cache") if file in output]
    assert code == 1 and missing and "Traceback" not in output, output


@pytest.mark.parametrize("command", [c for c in commands("README.md") if c[0] == "dpdmd-pipeline"], ids=" ".join)
def test_a_command_of_our_own_runs_as_written(small, command, monkeypatch):
    from dpdmd_pipeline.__main__ import main

    monkeypatch.chdir(small)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and len(list(Path("pictures").rglob("*.png"))) == 4


@pytest.mark.parametrize("block", blocks("README.md", "python"))
def test_the_python_of_the_readme_draws_pictures(small, block, monkeypatch):
    monkeypatch.chdir(small)
    names = {}
    exec(block, names)
    assert names["images"].shape == (4, 3, 32, 32)


# ---- two machines


def test_two_machines_train_both_students_and_the_first_one_alone_does_the_rest(finished, without):
    project = without("data/06_models/ci/.train_state", "data/06_models/ci/student", "data/06_models/ci/student_dmd")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        launch = f"train.launch.machines=2,train.launch.rendezvous=127.0.0.1:{probe.getsockname()[1]}"
    machines = [Run(project, "--pipeline=distill", "--params", launch) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(Run.end, machines))
    assert [machine.process.returncode for machine in machines] == [0, 0], outputs
    first, other = sorted(outputs, key=lambda output: "this machine's part is done" in output)
    assert all(f" {name} cycle 3/3" in first for name in ("DMD", "DP-DMD")) and "report.html" in first
    assert "this machine's part is done" in other and "Running node" not in other
    for student in ("student", "student_dmd"):
        assert distance(project, finished[0], student) < 1e-5
    histories = [path / "data/08_reporting/ci/train_history.json" for path in (project, finished[0])]
    for together, alone in zip(*(json.loads(path.read_text()) for path in histories), strict=True):
        measured = {name for name, value in alone.items() if value is not None}
        assert {name: together[name] for name in measured} == pytest.approx({n: alone[n] for n in measured}, rel=1e-3)


def distance(ours: Path, theirs: Path, student: str) -> float:
    """Distance of a student's weights in two projects, as a share of their length."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(project / WEIGHTS.format(student)) for project in (ours, theirs))
    difference = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    return (difference / sum(weight.square().sum() for weight in theirs.values())).sqrt().item()


# ---- broken off


def test_a_run_killed_at_random_moments_ends_with_the_student_of_an_uninterrupted_one(finished, without):
    project = without("data/05_model_input/ci/anchors", "data/06_models/ci/.train_state", "data/06_models/ci/student")
    shutil.rmtree(project / "data/06_models/ci/student_dmd")
    seed = time.time_ns()
    moments, killed = random.Random(seed), 0
    # the stage and the node in which a run is killed, within so many seconds; the second run finishes the anchors
    kills = [("anchors", "make_anchors", 0.8), ("anchors,train", "train_dmd", 2.5), ("train", "train_dmd", 2.5)]
    for stages, node, window in kills:
        running = Run(project, "--pipelines", stages)
        running.wait_for(f"Running node: {node}")
        time.sleep(moments.uniform(0, window))
        running.process.kill()
        running.end()
        killed += running.process.returncode == -signal.SIGKILL
    run(project, "--pipelines", "train")
    assert killed, "every run ended before its kill"
    for student in ("student", "student_dmd"):
        assert weights(project, student) == weights(finished[0], student), f"{student}, moments of seed {seed}"


def test_control_c_and_sigterm_lose_no_step_and_the_same_command_goes_on(finished, without):
    project = without("data/06_models/ci/.train_state", "data/06_models/ci/student", "data/06_models/ci/student_dmd")
    # neither is in the recipe: checkpoints come from the interrupts alone
    rarely = "train.checkpoint_every=1000,train_dmd.checkpoint_every=1000"
    for number, name in ((signal.SIGINT, "DMD"), (signal.SIGTERM, "DP-DMD")):
        running = Run(project, "--pipelines", "train", "--params", rarely)
        running.wait_for(f" {name} cycle 1/3")
        running.process.send_signal(number)
        output = running.end()
        assert running.process.returncode == 1
        assert output.strip().splitlines()[-1] == "Aborted!" and "Traceback" not in output, output
        assert re.search(rf"{name}: stopped after cycle \d", output), output
    output = run(project, "--pipelines", "train", "--params", rarely)
    assert " DMD: finished student reused" in output
    assert re.search(r"DP-DMD: (resumed after cycle [12] of 3|finished student reused)", output)
    for student in ("student", "student_dmd"):
        assert weights(project, student) == weights(finished[0], student)


def test_sigterm_keeps_the_shards_that_are_written(without):
    command = (
        without("data/05_model_input/ci/anchors"),
        "--pipelines",
        "anchors",
        "--params",
        "anchors.seeds_per_prompt=8,train.max_steps=200",  # training draws all of them
    )
    running = Run(*command)
    running.wait_for("anchors: shard 1 of 20 written")
    running.process.send_signal(signal.SIGTERM)
    output = running.end()
    assert running.process.returncode == 1 and output.strip().splitlines()[-1] == "Aborted!", output
    again = Run(*command)
    again.wait_for("anchors: shard 1 of 20 kept")
    again.process.kill()
    again.end()


# ---- refused


def test_an_anchor_beyond_the_teacher_is_refused(finished):
    message = refusal(finished[0], "--pipelines", "anchors", "--params", "backbone.num_steps=3")
    assert "anchors.anchor_levels steps=4" in message and "backbone.num_steps=3" in message


def test_anchors_of_other_options_are_refused_with_both_values(finished):
    message = refusal(finished[0], "--pipelines", "train", "--params", "backbone.guidance_scale=3.5")
    facts = ("backbone.guidance_scale=2.0", "3.5", "`kedro run --env ci --pipelines anchors`")
    assert all(fact in message for fact in facts), message


def test_a_truncated_shard_is_named_and_the_stage_that_wrote_it_repairs_it(without):
    project = without()
    shard = project / "data/05_model_input/ci/anchors/00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    message = refusal(project, "--pipelines", "train")
    assert f"{shard} has {len(whole) // 2} bytes, expected {len(whole)}" in message and "run" in message
    output = run(project, "--pipelines", "anchors")
    assert shard.read_bytes() == whole and output.count(" written ") == 1
