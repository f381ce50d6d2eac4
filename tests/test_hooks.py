"""What a user sees of a run that cannot go well, through the command line."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from tests.forked import ForkedKedro
from tests.raising import refuses

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.hooks import ConfigHooks
from dpdmd_pipeline.planning.messages import error_line
from dpdmd_pipeline.training.launch_options import LaunchOptions
from dpdmd_pipeline.training.machines import meet

PROJECT = Path(__file__).parents[1]

FILES = {
    "pyproject.toml": """
        [tool.kedro]
        package_name = "toy"
        project_name = "toy"
        kedro_init_version = "1.7.0"
        source_dir = "src"
        """,
    "conf/base/parameters.yml": """
        train: {steps: 3, optimizer: {lr: 0.1}, what: nothing}
        """,
    "conf/base/catalog.yml": """
        prompts: {type: text.TextDataset, filepath: data/prompts.txt}
        words: {type: json.JSONDataset, filepath: data/words.json}
        history: {type: json.JSONDataset, filepath: "${runtime_params:raw_prompts,data/history.json}"}
        """,
    "src/toy/__init__.py": "",
    "src/toy/settings.py": """
        from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS, HOOKS
        """,
    "src/toy/cli.py": """
        from dpdmd_pipeline.cli import cli, run
        """,
    "src/toy/pipeline_registry.py": """
        from kedro.framework.project import find_pipelines

        def register_pipelines():
            pipelines = find_pipelines(raise_errors=True)
            return pipelines | {"__default__": sum(pipelines.values())}
        """,
    "src/toy/pipelines/__init__.py": "",
    "src/toy/pipelines/prompts/__init__.py": """
        from kedro.pipeline import Node, Pipeline

        def split(text: str) -> list:
            return text.split()

        def create_pipeline():
            return Pipeline([Node(split, "prompts", "words", name="split")])
        """,
    "src/toy/pipelines/train/__init__.py": """
        import sys, time
        from pydantic import BaseModel, ConfigDict, Field
        from kedro.pipeline import Node, Pipeline

        class Optimizer(BaseModel):
            model_config = ConfigDict(extra="forbid")
            lr: float = Field(gt=0)

        class Options(BaseModel):
            model_config = ConfigDict(extra="forbid")
            steps: int
            what: str
            optimizer: Optimizer

        def train(words: list, options: Options) -> list:
            if options.what == "bug":
                import torch
                torch.zeros(2).reshape(object())
            if options.what == "wait":
                print("waiting", flush=True)
                time.sleep(60)
            if options.what == "remedy":
                from pathlib import Path
                from dpdmd_pipeline.backbones.student_file import weight_file
                weight_file(Path("nowhere"))
            if options.what == "refuse":
                from dpdmd_pipeline.backbones.base import load_backbone
                load_backbone("sd9", None)
            return words

        def create_pipeline():
            return Pipeline([Node(train, ["words", "params:train"], "history", name="train")])
        """,
}


@pytest.fixture
def toy(tmp_path) -> Path:
    """A Kedro project of two stages under our settings and our logging."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        indent = len(text) - len(text.lstrip()) - 1
        path.write_text(text.replace("\n" + " " * indent, "\n") if indent > 0 else text)
    (tmp_path / "conf/local").mkdir()
    (tmp_path / "data").mkdir()
    logging_yml = (PROJECT / "conf/logging.yml").read_text()
    logging_yml = logging_yml.replace("  dpdmd_pipeline:", "  toy: {}\n\n  dpdmd_pipeline:")
    (tmp_path / "conf/logging.yml").write_text(logging_yml)
    (tmp_path / ".telemetry").write_text("consent: false\n")
    (tmp_path / "data/prompts.txt").write_text("a red circle")
    (tmp_path / "data/words.json").write_text('["a"]')
    return tmp_path


class Result(NamedTuple):
    """Exit code and output of a run."""

    code: int
    output: str


def kedro(folder: Path, *args: str, **environment: str) -> Result:
    process = ForkedKedro(["run", *args], folder, _environment(environment))
    output = process.communicate(timeout=60)[0]
    return Result(process.returncode, output)


def _environment(more: dict[str, str]) -> dict[str, str]:
    return os.environ | {"DO_NOT_TRACK": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"} | more


def refusal(result: Result) -> str:
    """The message of a run that ended in one error and no traceback."""
    output = result.output
    assert result.code == 1, output
    assert "Traceback" not in output
    assert output.count("Error:") == 1, output
    assert "ERROR" not in output
    assert "--from-nodes" not in output
    return output[output.index("Error:") + 7 :].strip()


def test_a_good_run_is_quiet_about_the_older_spelling(toy):
    result = kedro(toy, "--pipeline=train")
    assert result.code == 0, result.output
    assert "deprecated" not in result.output.lower()
    assert json.loads((toy / "data/history.json").read_text()) == ["a"]


@pytest.mark.parametrize(
    "params, option, value, remedies",
    [
        ("trian.x=1", "trian", "", ["'train'"]),
        ("zzz=1", "zzz", "", ["train"]),
        ("train.zzz=4", "train.zzz", "4", ["steps", "what", "optimizer"]),
        ("train.stepz=4", "train.stepz", "4", ["'steps'"]),
        ("train.optimizer.lrr=4", "train.optimizer.lrr", "4", ["'lr'"]),
        ("train.optimizer.lr=-1", "train.optimizer.lr", "-1", ["greater than 0"]),
        ("train.steps=many", "train.steps", "'many'", ["integer"]),
        ("train=1", "train", "1", ["dictionary"]),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_the_remedy(toy, params, option, value, remedies):
    message = refusal(kedro(toy, "--pipelines", "train", "--params", params))
    name, _, reason = message.partition(":")
    assert name == (f"{option} = {value}" if value else option)
    assert all(remedy in reason for remedy in remedies) and "\n" not in message


def test_all_bad_options_come_in_one_message(toy):
    lines = refusal(kedro(toy, "--params", "trian.x=1,train.stepz=4,train.steps=many")).splitlines()
    assert lines[0].startswith("3 ")
    assert [line.split()[0] for line in lines[1:]] == ["trian:", "train.steps", "train.stepz"]


def test_only_the_options_of_the_requested_pipeline_are_checked(toy):
    assert kedro(toy, "--pipelines", "prompts", "--params", "train.steps=many").code == 0


def test_another_prompt_file_is_no_unknown_group(toy):
    assert kedro(toy, "--pipelines", "train", "--params", "raw_prompts=data/other.json").code == 0
    assert (toy / "data/other.json").exists()


@pytest.mark.parametrize("value", ["12", "null", "true", "1.5", "[a]", "a: b", "", "a\tb", "a\udcffb"])
def test_a_path_that_is_none_is_one_line_with_its_value(toy, value):
    message = refusal(kedro(toy, "--pipelines", "train", "--params", f"raw_prompts={value}"))
    assert "raw_prompts" in message and "\n" not in message
    assert repr(value)[1:-1] in message or value in ("null", "true", "[a]", "a: b")
    assert ("./12" in message) == (value == "12")


@pytest.mark.parametrize("params", ["raw_prompts=a,b.txt", "train.what=[a,b]", "train.what=[a"])
def test_values_that_params_cannot_carry_are_one_line(toy, params):
    message = refusal(kedro(toy, "--pipelines", "train", "--params", params))
    assert "\n" not in message and "--config FILE" in message


def test_a_file_of_options_carries_lists_and_commas(toy):
    (toy / "run.yml").write_text('run: {pipelines: train, params: {raw_prompts: "data/a, b.json"}}')
    assert kedro(toy, "--config", "run.yml").code == 0
    assert (toy / "data/a, b.json").exists()


@pytest.mark.parametrize(
    "option",
    [
        *("--nodes", "--from-nodes", "--to-nodes", "--from-inputs", "--to-outputs", "--tags", "--namespaces"),
        *("--load-versions", "--runner", "--runner-params"),
    ],
)
def test_a_name_that_kedro_does_not_know_is_one_line(toy, option):
    values = {"--load-versions": "zzz:2026-01-01", "--runner-params": "zzz=1"}
    message = refusal(kedro(toy, "--pipelines", "train", option, values.get(option, "zzz")))
    assert "\n" not in message and ("zzz" in message or option in ("--tags",))


@pytest.mark.parametrize("value", ["kedro.zzz", "zzz.Runner", "zzz:1", "a:b:c/d"])
def test_a_runner_or_version_of_another_form_is_one_line(toy, value):
    option = "--load-versions" if ":" in value else "--runner"
    assert "\n" not in refusal(kedro(toy, "--pipelines", "train", option, value))


def test_an_unknown_pipeline_is_refused_with_the_known_ones(toy):
    message = refusal(kedro(toy, "--pipelines", "trian"))
    assert "'trian'" in message and message.endswith("prompts, train")


def add_environment(toy, name):
    (toy / "conf" / name).mkdir()
    (toy / "conf" / name / "globals.yml").write_text(f"folder: {name}\n")


def test_a_remedy_runs_in_the_environment_of_the_run(toy):
    add_environment(toy, "other")
    (toy / "data/words.json").unlink()
    assert "`kedro run --pipelines prompts`" in refusal(kedro(toy, "--env", "local", "--pipelines", "train"))
    assert "`kedro run --env other --pipelines prompts`" in refusal(
        kedro(toy, "--pipelines", "train", KEDRO_ENV="other")
    )
    (toy / "data/words.json").write_text('["a"]')
    line = refusal(kedro(toy, "--env", "other", "--pipelines", "train", "--params", "train.what=remedy"))
    assert "nowhere" in line and line.endswith("`kedro run --env other --pipelines train`")


def test_a_stage_that_asks_for_it_is_given_the_arguments_of_the_run(toy):
    add_environment(toy, "other")
    with (toy / "conf/base/catalog.yml").open("a") as file:
        file.write("run_arguments: {type: MemoryDataset, data: ''}\n")
    stage = toy / "src/toy/pipelines/prompts/__init__.py"
    stage.write_text(stage.read_text().replace('"prompts", "words"', '"run_arguments", "words"'))
    for env in ("local", "other"):
        assert kedro(toy, "--env", env, "--pipelines", "prompts").code == 0
        assert json.loads((toy / "data/words.json").read_text()) == (["--env", "other"] if env == "other" else [])


def test_an_unknown_environment_is_refused_with_the_known_ones(toy):
    add_environment(toy, "sd35_lora_16gb")
    (toy / "conf/parent").mkdir()  # without a globals.yml
    for env, names in (("zzz", ": choose"), ("parent", ": choose"), ("sd35lora", "did you mean 'sd35_lora_16gb'")):
        message = refusal(kedro(toy, "--env", env, "--pipelines", "train"))
        assert repr(env) in message and names in message and "one of sd35_lora_16gb" in message


def test_broken_yaml_is_refused_with_file_and_line(toy):
    (toy / "conf/base/parameters.yml").write_text("train: {steps: 3\n")
    assert re.search(r"parameters\.yml.* line ", refusal(kedro(toy, "--pipelines", "train")))


def test_under_a_launcher_the_first_process_of_a_machine_goes_on_and_the_others_end(toy):
    launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert "WORLD_SIZE=2" in refusal(kedro(toy, **launcher, LOCAL_RANK="0"))  # the toy has no stage for two
    assert "WORLD_SIZE='two'" in refusal(kedro(toy, WORLD_SIZE="two"))
    result = kedro(toy, **launcher, LOCAL_RANK="1")
    assert result.code == 0 and not (toy / "data/history.json").exists(), result.output


def test_a_missing_input_is_named_with_the_stage_that_makes_it(toy):
    (toy / "data/words.json").unlink()
    message = refusal(kedro(toy, "--pipelines", "train"))
    assert "words (data/words.json)" in message and "`kedro run --pipelines prompts`" in message


def test_an_input_that_a_stage_can_do_without_may_be_missing(toy):
    (toy / "data/words.json").unlink()
    catalog = toy / "conf/base/catalog.yml"
    kind = "dpdmd_pipeline.datasets.whole_file.OptionalJSONDataset"
    catalog.write_text(catalog.read_text().replace("words: {type: json.JSONDataset", f"words: {{type: {kind}"))
    result = kedro(toy, "--pipelines", "train")
    assert result.code == 0, result.output
    assert json.loads((toy / "data/history.json").read_text()) == {}


def test_a_missing_raw_file_is_named_with_its_path(toy):
    (toy / "data/prompts.txt").unlink()
    assert "prompts (data/prompts.txt)" in refusal(kedro(toy, "--pipelines", "prompts"))


def test_a_damaged_input_is_named(toy):
    (toy / "data/words.json").write_text('["a"')
    message = refusal(kedro(toy, "--pipelines", "train"))
    assert "words (data/words.json)" in message and "Expecting ','" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_line_with_the_remedy(toy):
    (toy / "data/history.json").symlink_to("/dev/full")  # not the device itself: a writer that renames would replace it
    message = refusal(kedro(toy, "--pipelines", "train"))
    assert "No space left" in message and "free some space" in message and "history (data/history.json)" in message


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534", "No space left"),
        ("[enforce fail at inline_container.cc:747] . open file failed: Permission denied", "Permission denied"),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", None),
    ],
)
def test_an_error_of_torch_on_a_closed_disk_is_no_bug(text, reason):
    line = error_line(RuntimeError(text), "the student")
    assert line is None if reason is None else reason in line and "the student" in line


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="Linux has a folder that nobody may write to")
def test_a_folder_that_may_not_be_written_is_one_line(toy):
    message = refusal(kedro(toy, "--pipelines", "train", "--params", "raw_prompts=/sys/kernel/history.json"))
    assert "/sys/kernel" in message


def test_what_this_package_refuses_is_one_line_and_its_traceback_is_in_the_log(toy):
    message = refusal(kedro(toy, "--pipelines", "train", "--params", "train.what=refuse"))
    assert "'sd9'" in message and message.endswith(", ".join(FAMILIES))
    written = (toy / "logs/dpdmd.log").read_text()
    assert "Traceback" in written and "load_backbone" in written


def test_a_bug_keeps_its_traceback(toy):
    result = kedro(toy, "--pipelines", "train", "--params", "train.what=bug")
    assert result.code == 1
    assert "Traceback" in result.output
    assert "TypeError" in result.output


def test_control_c_gives_one_line(toy):
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", "train", "--params", "train.what=wait"]
    process = subprocess.Popen(
        command,
        cwd=toy,
        env=_environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # tests that a shell runs in the background are started with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.strip() == "Aborted!"
    assert "Traceback" not in stdout


JUDGING = """
    from kedro.pipeline import Node, Pipeline

    def judge(words: list) -> dict:
        missing = {"diversity.dino_v2": "no weights"} if "red" in words else {}
        return {"teacher": {"missing": missing, "faults": {}}, "dmd": {"missing": missing}, "rank_correlation": {}}

    def tell(metrics: dict) -> list:
        return sorted(metrics)

    def create_pipeline():
        return Pipeline([Node(judge, "words", "metrics", name="judge"), Node(tell, "metrics", "history", name="tell")])
    """


@pytest.mark.parametrize("word, strict, code", [("blue", True, 0), ("red", False, 0), ("red", True, 3)])
def test_a_run_that_could_not_measure_all_writes_everything_and_fails_if_it_is_strict(toy, word, strict, code):
    folder = toy / "src/toy/pipelines/evaluate"
    folder.mkdir()
    (folder / "__init__.py").write_text(JUDGING.replace("\n    ", "\n"))
    with (toy / "conf/base/catalog.yml").open("a") as file:
        file.write("metrics: {type: json.JSONDataset, filepath: data/metrics.json}\n")
    (toy / "data/words.json").write_text(json.dumps([word]))
    (toy / "conf/base/parameters_evaluate.yml").write_text(f"evaluate: {{strict: {str(strict).lower()}}}\n")
    result = kedro(toy, "--pipelines", "evaluate")
    assert result.code == code, result.output
    assert json.loads((toy / "data/history.json").read_text()) == ["dmd", "rank_correlation", "teacher"]
    last = result.output.strip().splitlines()[-1]
    assert ("diversity.dino_v2" in last and "data/metrics.json" in last) == (word == "red")
    assert ("Error:" in last) == bool(code)
    assert "Traceback" not in result.output
    assert kedro(toy, "--pipelines", "prompts").code == 0  # which measures nothing


def test_a_read_only_log_folder_does_not_stop_a_run(toy):
    (toy / "logs").write_text("a file where a folder should be")
    result = kedro(toy, "--pipelines", "train")
    assert result.code == 0
    assert "Logging error" not in result.output


def test_the_stages_of_this_project_refuse_what_they_do_not_know():
    result = kedro(PROJECT, "--pipelines", "prompts", "--params", "prompt.seed=1,prompts.nonsense=1")
    lines = refusal(result).splitlines()
    assert lines[1].strip().startswith("prompt:") and "'prompts'" in lines[1]
    assert lines[2].strip().startswith("prompts.nonsense = 1:")


@pytest.mark.parametrize("name", ["teacher_model", "raw_prompt"])
def test_a_path_that_the_environment_does_not_read_is_refused(name):
    message = refusal(kedro(PROJECT, "--env", "ci", "--pipelines", "prompts", "--params", f"{name}=/no/such/folder"))
    assert message.startswith(f"{name}: ") and "\n" not in message
    assert ("environment ci has its own teacher" in message) == (name == "teacher_model")


def test_broken_globals_are_one_line_with_the_file(tmp_path):
    conf = shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    (conf / "ci/globals.yml").write_text("folder: [ci]\n")
    message = refusal(kedro(PROJECT, "--conf-source", str(conf), "--env", "ci", "--pipelines", "prompts"))
    assert f"{conf}/ci/globals.yml" in message and "\n" not in message


def test_the_line_refuses_prompts_that_the_embedded_teacher_does_not_know(tmp_path):
    (tmp_path / "foreign.txt").write_text("a red circle\na fox\n")
    result = kedro(PROJECT, "--env", "ci", "--pipeline=distill", "--params", f"raw_prompts={tmp_path}/foreign.txt")
    message = refusal(result)
    assert "'a fox'" in message and "'a red circle'" not in message and "evaluate.judge=null" in message


def test_a_run_of_several_machines_that_is_refused_is_refused_on_the_others():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    launches = {"train": LaunchOptions(processes=1, machines=2, rendezvous=address)}
    with ThreadPoolExecutor() as threads:
        first = threads.submit(ConfigHooks()._meet_machines, launches, ["train: too large"])
        time.sleep(0.2)  # it listens
        with refuses(ValueError, "first machine", "train: too large"):
            meet.__wrapped__(address, 2)
    assert isinstance(first.exception(), click.ClickException) and "too large" in str(first.exception())
