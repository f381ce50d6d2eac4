"""`dvc repro` in other environments than base: to the end, once, and without a trace in base's results."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml
from tests.forked import ForkedKedro

PROJECT = Path(__file__).parents[1]
FEW = {"raw_prompts": "data/01_raw/few.txt", "raw_eval_prompts": "data/01_raw/few_eval.txt"}
STAGES = {"prompts", "anchors", "train", "evaluate", "report", "export", "sample"}
# `kedro` on the PATH of DVC's stages: hands its arguments to the tests' process, whose forks have the libraries loaded.
SHIM = """#!{python} -SE
import os, socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect({address!r})
    client.sendall("\\0".join([os.getcwd(), *sys.argv[1:]]).encode())
    client.shutdown(socket.SHUT_WR)
    code, _, output = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\\0")
sys.stdout.write(output.decode())
sys.exit(int(code))
"""


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory) -> Iterator[Path]:
    """A folder for the PATH with a `kedro` that runs in a fork."""
    folder = tmp_path_factory.mktemp("bin")
    address = str(folder / "socket")
    (folder / "kedro").write_text(SHIM.format(python=sys.executable, address=address))
    (folder / "kedro").chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        yield folder
        server.shutdown(socket.SHUT_RDWR)


def serve(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # the fixture has ended
            return
        with connection:
            folder, *args = b"".join(iter(partial(connection.recv, 65536), b"")).decode().split("\0")
            run = ForkedKedro(args, Path(folder), environment())
            output = run.communicate(timeout=120)[0]
            connection.sendall(f"{run.returncode}\0{output}".encode())


def environment() -> dict[str, str]:
    return os.environ | {"DO_NOT_TRACK": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A clone with what is not committed yet, and with an environment over a small SD3 teacher of the user's own."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "clone", "-q", PROJECT, folder], check=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = set(subprocess.check_output(listed, cwd=PROJECT, text=True).rstrip("\0").split("\0"))
    for name in names:
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=folder, text=True).rstrip("\0").split("\0"):
        if name not in names or not (PROJECT / name).is_file():
            (folder / name).unlink()
    for name, prompts in {"few": "a red circle\na blue square\n", "few_eval": "a green triangle\n"}.items():
        (folder / f"data/01_raw/{name}.txt").write_text(prompts)
    make_tiny_sd35(folder)
    shutil.rmtree(folder / "data/06_models/shapes_clip", ignore_errors=True)
    subprocess.run(["git", "checkout", "-q", "--", "data/06_models/shapes_clip"], cwd=folder, check=True)
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-qm", "tests", "--allow-empty"], cwd=folder, check=True)
    return folder


def make_tiny_sd35(folder: Path) -> None:
    """conf/tiny_sd35: the environment sd35 over the embedded teacher as a folder of the user's own, in few steps."""
    conf = folder / "conf/tiny_sd35"
    shutil.copytree(folder / "conf/sd35", conf)
    teacher = "data/06_models/my_teacher"
    shutil.copytree(folder / "data/06_models/shapes_teacher", folder / teacher)
    names = {"folder": "tiny_sd35", **FEW, "teacher": teacher, "teacher_model": teacher, "extends": "hub"}
    (conf / "globals.yml").write_text(yaml.safe_dump(names))
    parameters = yaml.safe_load((conf / "parameters.yml").read_text())
    tiny = {"max_steps": 2, "batch_size": 2, "device": "cpu", "precision": "float32", "watch": {"every": 0}}
    small = {"fused": False, "fake_score_turns": 1, "student_micro_batch": 2, "fake_score_micro_batch": 2}
    changes = {
        "backbone": {"resolution": 32, "max_sequence_length": 0, "num_steps": 6, "dtype": "float32"},
        "prompts": {"device": "cpu"},
        "anchors": {"device": "cpu", "anchor_levels": [{"steps": 2}]},
        "train": {**tiny, **small},
        "evaluate": {"device": "cpu", "by": ["diversity.pixels", "quality"], "images_per_prompt": 2},
        "export": {"dtype": "float32"},
        "sample": {"device": "cpu", "dtype": "float32", "images_per_prompt": 1},
    }
    for group, options in changes.items():
        parameters[group] = merged(parameters.get(group, {}), options)
    (conf / "parameters.yml").write_text(yaml.safe_dump(parameters))


def merged(below: dict, above: dict) -> dict:
    both = {k: merged(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return {**below, **above, **both}


def dvc(project: Path, bin_folder: Path, *args: str) -> str:
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", *args]
    result = subprocess.run(
        command, cwd=project, env=environment() | {"PATH": path}, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def committed(project: Path) -> dict[str, bytes]:
    """The results of base that git holds."""
    names = subprocess.check_output(["git", "ls-files", "data"], cwd=project, text=True).split("\n")
    return {name: (project / name).read_bytes() for name in names if name and (project / name).is_file()}


@pytest.mark.parametrize("env", ["ci", "tiny_sd35"])
def test_every_stage_runs_in_another_environment_once_and_leaves_base_alone(env, project, bin_folder):
    before = committed(project)
    (project / "conf/run.yml").write_text(f"env: {env}\n")
    if env != "ci":
        names = project / f"conf/{env}/globals.yml"
        names.write_text(yaml.safe_dump({**yaml.safe_load(names.read_text()), **FEW}))

    first = dvc(project, bin_folder, "repro")
    assert {stage for stage in STAGES if f"Running stage '{stage}'" in first} == STAGES
    assert ("not measured: quality.arniqa" in first) == (env == "tiny_sd35")  # a gap of its weights fails no stage
    second = dvc(project, bin_folder, "repro")
    assert "Running stage" not in second and "frozen" not in second
    assert (project / f"data/08_reporting/{env}/report.html").is_file()
    after = committed(project)
    assert not {name for name, content in before.items() if f"/{env}/" not in name and after[name] != content}
    shown = dvc(project, bin_folder, "metrics", "show")
    assert f"data/08_reporting/{env}/summary.json" in shown and "metrics.json" not in shown


def test_an_experiment_is_queued_with_one_option_of_every_parameter_file(project, bin_folder):
    (project / "conf/run.yml").write_text("env: base\n")
    changes = {
        "base/parameters": "backbone.guidance_scale=2.5",
        "base/parameters_anchors": "anchors.seed=1",
        "base/parameters_beyond": "beyond.seeds=[0]",
        "base/parameters_clip": "clip.recipe.seed=1",
        "base/parameters_evaluate": "evaluate.seed=1",
        "base/parameters_export": "export.title=other",
        "base/parameters_prompts": "prompts.batch_size=32",
        "base/parameters_report": "report.max_prompts=3",
        "base/parameters_sample": "sample.seed=1",
        "base/parameters_study": "study.seeds=[0]",
        "base/parameters_teacher": "teacher.judge_seed=1",
        "base/parameters_train": "train.diversity_weight=10",
        "base/parameters_variety": "variety.seeds=[0]",
        "ci/parameters": "train.max_steps=4",
        "hub/parameters": "train.diversity_weight=0.1",
        "shapes_sdxl/parameters": "train.target=secant",
        "sd35/parameters": "backbone.guidance_scale=2.0",
        "sdxl/parameters": "backbone.guidance_scale=2.0",
        "sd35_lora_16gb/parameters": "backbone.guidance_scale=2.0",
        "sdxl_lora_16gb/parameters": "backbone.guidance_scale=2.0",
        "flux2_klein/parameters": "backbone.guidance_scale=2.0",
        "qwen_image/parameters": "backbone.guidance_scale=2.0",
        "z_image/parameters": "backbone.guidance_scale=2.0",
    }
    files = {
        path.relative_to(PROJECT / "conf").with_suffix("").as_posix() for path in PROJECT.glob("conf/*/parameters*.yml")
    }
    assert files == changes.keys()
    given = [part for file, change in changes.items() for part in ("-S", f"conf/{file}.yml:{change}")]
    assert "Queued experiment" in dvc(project, bin_folder, "exp", "run", "--queue", *given)
