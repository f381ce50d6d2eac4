"""Two real processes on one machine: the student of one process, and one clear error whatever happens."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import socket
import time
from contextlib import closing
from functools import cache

import pytest
from tests.raising import refuses

from dpdmd_pipeline.training.launch import Launch, _join, launched
from dpdmd_pipeline.training.machines import OtherMachineError, meet

TWO = Launch(processes=2, machines=1, rendezvous=None, run="test", cuda=False)
BEST = {"every": 1, "prompts": 2, "images_per_prompt": 2, "level": 0.4, "keep": "best", "diversity_floor": 0.9}
# The shortest runs in which a cycle starts from weights that all processes have updated
RECIPES = {
    "full": {},
    "lora": {"roles": "lora"},
    "micro_batches": {"stop_gradient": False, "ema": 0.5},
    "best_cycle": {"fake_score_turns": 1, "watch": BEST},
    "stopped": {"fake_score_turns": 1, "max_steps": 3, "ema": 0.5},
}
SHARDED = {f"sharded_{name}": recipe for name, recipe in RECIPES.items() if name != "lora"}
RUNS = {**RECIPES, **SHARDED, "sharded_resumed": RECIPES["stopped"]}  # the last after two cycles of one process
MICRO_BATCHES, STOPPED = ("micro_batches", "sharded_micro_batches"), ("stopped", "sharded_stopped")
WHOLE = [name for name in RUNS if name not in (*STOPPED, "sharded_resumed")]
DIVERGING = {"kind": "adamw", "learning_rate": 1e30, "betas": [0.9, 0.999], "weight_decay": 0.0, "max_grad_norm": 1.0}


FAMILIES = {  # fixture of a teacher, and its tokens
    "sd3": ("tiny_teacher", 0),
    "flux2_klein": ("tiny_flux2_klein", 100),
    "qwen_image": ("tiny_qwen_image", 256),
    "z_image": ("tiny_z_image", 64),
}
SHORTEST = {"fake_score_turns": 1}
# In the last block of Qwen-Image, to_add_out and txt_mlp get no gradient
LORA = {
    "student_rank": 4,
    "fake_score_rank": 2,
    "alpha_per_rank": 1.0,
    "targets": ["to_q", "to_add_out", "net.2"],
    "base_weights": "as_teacher",
}
OF_TODAY = {
    "flux2_klein": SHORTEST,
    "qwen_image": SHORTEST,
    "qwen_image lora": SHORTEST | {"roles": "lora", "lora": LORA},
    "z_image": SHORTEST,
}


@cache
def world(teacher):
    """Backbone of a teacher (family, folder), and embeddings of three prompts."""
    from tests.training.conftest import InMemory

    from dpdmd_pipeline.backbones.base import load_backbone

    family, folder = teacher
    sizes = {"resolution": 32, "max_sequence_length": FAMILIES[family][1]}
    backbone = load_backbone(family, folder, **sizes, level_range=(0.02, 0.98))
    return backbone, InMemory(backbone.encode(["a red circle", "a blue square", "a green triangle", ""]))


def records_of(teacher, folder, micro_batch, sharded=False, execution=None, **changes):
    """Records of a run with two cycles and batches of four, alone or as one of several processes."""
    # Imported here: every process loads this module, and most tests need none of it
    from tests.training.conftest import ANCHOR_STEPS, GUIDANCE, NUM_STEPS, execution_with, recipe_with

    from dpdmd_pipeline.training.anchors import OnlineAnchors, TeacherAnchors
    from dpdmd_pipeline.training.checkpoint import Checkpoints
    from dpdmd_pipeline.training.distill import distill
    from dpdmd_pipeline.training.roles import make_roles
    from dpdmd_pipeline.training.run import TrainingData

    backbone, embeddings = world(teacher)
    recipe = recipe_with(**{"batch_size": 4, "max_steps": 2, "num_steps": 3, **changes})
    roles = make_roles(backbone, recipe, gradient_checkpointing=False, sharded=sharded)
    settings = {"num_steps": NUM_STEPS, "guidance_scale": GUIDANCE, "anchor_steps": ANCHOR_STEPS[:1]}
    teacher = TeacherAnchors(backbone, roles.teacher, embeddings, with_denoised=False, **settings)
    draw = OnlineAnchors(teacher, [0, 1, 2], seed=recipe.seed, anchored_steps=recipe.anchored_steps)
    levels = teacher.anchor_levels[:1], backbone.schedule(NUM_STEPS)
    data = TrainingData(embeddings, [0, 1, 2], draw, *levels, GUIDANCE)
    sizes = {"student_micro_batch": micro_batch, "fake_score_micro_batch": micro_batch}
    execution = execution_with(**{"checkpoint_every": 100, **sizes, **(execution or {})})
    return distill(backbone, roles, data, recipe, Checkpoints(folder), execution)


def train_runs(job, member):
    """All runs, each process its share of them; rank 0 leaves the losses."""
    teachers, folder = job
    teacher = "sd3", teachers["sd3"]
    for name, changes in RUNS.items():
        history = []
        micro_batch, sharded = 1 if name in MICRO_BATCHES else 2, name.startswith("sharded")
        with closing(records_of(teacher, folder / name, micro_batch, sharded, **changes)) as records:
            for record in records:
                history.append(record)
                if name in STOPPED and record["step"] == 2:
                    break
        if member.rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(history))
    for name, changes in OF_TODAY.items():
        family = name.split()[0]
        history = list(records_of((family, teachers[family]), folder / name, 2, **changes))
        if member.rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(history))
    (folder / f"sizes_{member.rank}.json").write_text(json.dumps(parameter_sizes(teacher)))
    with pytest.raises(ValueError) as refusal:
        list(records_of(teacher, folder / "diverging", 2, student=DIVERGING))
    (folder / f"refusal_{member.rank}").write_text(str(refusal.value))
    return True


def parameter_sizes(teacher):
    """Numbers of every parameter of each role in this process."""
    from tests.training.conftest import recipe_with

    from dpdmd_pipeline.training.roles import make_roles

    roles = make_roles(world(teacher)[0], recipe_with(), gradient_checkpointing=False, sharded=True)
    return {
        role: {name: getattr(p, "to_local", lambda p=p: p)().numel() for name, p in network.named_parameters()}
        for role, network in vars(roles).items()
    }


@pytest.fixture(scope="module")
def teachers(request):
    """Folder of the tiny teacher of each family."""
    return {family: request.getfixturevalue(fixture) for family, (fixture, _) in FAMILIES.items()}


@pytest.fixture(scope="module")
def shared(teachers, tmp_path_factory):
    """Histories, checkpoints and errors of two processes."""
    folder = tmp_path_factory.mktemp("shared")
    alone = records_of(("sd3", teachers["sd3"]), folder / "sharded_resumed", 4, **RUNS["sharded_resumed"])
    with closing(alone) as records:
        next(records), next(records)
    assert list(launched(train_runs, (teachers, folder), TWO)) == []
    return folder


@pytest.fixture(scope="module")
def alone(teachers, tmp_path_factory):
    """Folder and records of a run in this process; one for each family and recipe."""
    runs = {}

    def run(family="sd3", **changes):
        recipe = json.dumps([family, changes])
        if recipe not in runs:
            folder = tmp_path_factory.mktemp("alone")
            runs[recipe] = folder, list(records_of((family, teachers[family]), folder, 4, **changes))
        return runs[recipe]

    return run


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_with_half_the_batch_have_the_student_of_one_with_all_of_it(shared, alone, name):
    theirs = json.loads((shared / f"{name}.json").read_text())
    folder, ours = alone(**RUNS[name])
    assert len(ours) == 2
    for one, together in zip(ours, theirs, strict=True):
        if name in MICRO_BATCHES:  # compared on the first micro-batch only
            one.pop("grad_ratio", None), together.pop("grad_ratio", None)
        assert together == pytest.approx(one, rel=1e-5)
    assert distance(shared / name, folder) < 1e-5


@pytest.mark.parametrize("name", OF_TODAY)
def test_two_processes_have_the_student_of_one_in_every_family(shared, alone, name):
    folder, ours = alone(name.split()[0], **OF_TODAY[name])
    theirs = json.loads((shared / f"{name}.json").read_text())
    for one, together in zip(ours, theirs, strict=True):
        assert together == pytest.approx(one, rel=1e-4)
    assert distance(shared / name, folder) < 1e-5


def distance(*folders):
    """Distance of two finished students' weights, as a share of their length."""
    ours, theirs = (student_of(folder) for folder in folders)
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [(n, t.shape) for n, t in theirs.items()]
    difference = sum((ours[name] - theirs[name]).square().sum() for name in ours)
    return (difference / sum(tensor.square().sum() for tensor in theirs.values())).sqrt().item()


def student_of(folder):
    from dpdmd_pipeline.training.checkpoint import Checkpoints

    return Checkpoints(folder).load_latest()[1]["student"]


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_of_two_processes_continues_in_one(shared, alone, teachers, name):
    folder, whole = alone(**RUNS[name])
    assert [row["step"] for row in json.loads((shared / f"{name}.json").read_text())] == [1, 2]
    rest = list(records_of(("sd3", teachers["sd3"]), shared / name, 4, **RUNS[name]))
    assert len(rest) == 1
    for one, resumed in zip(whole[2:], rest, strict=True):
        assert resumed == pytest.approx(one, rel=1e-5)
    assert distance(shared / name, folder) < 1e-5


def test_a_run_of_one_process_continues_in_two_that_share_the_weights(shared, alone):
    folder, whole = alone(**RUNS["sharded_resumed"])
    rest = json.loads((shared / "sharded_resumed.json").read_text())
    assert [row["step"] for row in rest] == [3]
    for one, resumed in zip(whole[2:], rest, strict=True):
        assert resumed == pytest.approx(one, rel=1e-5)
    assert distance(shared / "sharded_resumed", folder) < 1e-5


def test_each_of_two_processes_holds_half_of_the_trained_networks_in_the_teachers_order(shared):
    for rank in (0, 1):
        sizes = json.loads((shared / f"sizes_{rank}.json").read_text())
        for role in ("student", "fake_score"):
            assert list(sizes[role]) == list(sizes["teacher"])
            assert sum(sizes[role].values()) == pytest.approx(0.5 * sum(sizes["teacher"].values()), rel=0.01)


def test_a_loss_that_is_not_finite_stops_all_with_the_same_error(shared):
    first, second = ((shared / f"refusal_{rank}").read_text() for rank in (0, 1))
    assert first == second and "1e+30" in first


# ---- end of the processes


def report_until_asked(folder, member):
    step = 0
    while not member.asked_to_stop():
        step += 1
        member.report({"step": step})
        time.sleep(0.02)
    (folder / f"stopped_{member.rank}").write_text(str(step))
    return False


def fail_on_the_second(message, member):
    if member.rank == 1:
        raise ValueError(message)
    member.wait_for_all()


def fail_on_the_second_which_crashes_on_the_way_out(message, member):
    if member.rank == 1:
        atexit.register(os.abort)
    fail_on_the_second(message, member)


def kill_the_second(_, member):
    member.wait_for_all()
    if member.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    member.wait_for_all()


def sleep_on(_, member):
    member.report({"step": 1})
    time.sleep(600)


def test_closed_early_all_stop_after_the_same_step_and_none_is_left(tmp_path):
    with closing(launched(report_until_asked, tmp_path, TWO)) as records:
        assert [next(records)["step"] for _ in range(3)] == [1, 2, 3]
    first, second = (int((tmp_path / f"stopped_{rank}").read_text()) for rank in (0, 1))
    assert first == second >= 3
    assert not multiprocessing.active_children()


def test_a_signal_to_one_process_alone_stops_all(tmp_path):
    records = launched(report_until_asked, tmp_path, TWO)
    next(records)
    os.kill(multiprocessing.active_children()[-1].pid, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        list(records)
    first, second = (int((tmp_path / f"stopped_{rank}").read_text()) for rank in (0, 1))
    assert first == second and not multiprocessing.active_children()


def test_the_error_of_one_process_is_raised_with_its_traceback_even_if_it_crashes_on_the_way_out():
    """A failure without a crash is that of one machine of two, below."""
    with pytest.raises(ValueError, match="^rank-1-error$") as error:
        list(launched(fail_on_the_second_which_crashes_on_the_way_out, "rank-1-error", TWO))
    assert "in fail_on_the_second" in str(error.value.__cause__)
    assert not multiprocessing.active_children()


def test_a_killed_process_is_named():
    with refuses(ChildProcessError, "process 1 of 2", "SIGKILL"):
        list(launched(kill_the_second, None, TWO))
    assert not multiprocessing.active_children()


def test_interrupted_for_good_the_processes_are_killed():
    records = launched(sleep_on, None, TWO)
    next(records)
    with pytest.raises(KeyboardInterrupt):
        records.throw(KeyboardInterrupt())
    assert not multiprocessing.active_children()


def report_rank(job, member):
    member.report({job: member.gather(member.rank)})
    return True


def machine(launch, result):
    """Write the reports that a machine's starting process receives, or its exit code."""
    try:
        outcome = list(launched(report_rank, "ranks", launch))
        meet(launch.rendezvous, launch.machines).end()
    except SystemExit as end:
        outcome = f"exit {end.code}"
    result.write_text(str(outcome))


def failing_machine(launch, result):
    """Write the error of a machine's starting process, after a failure on one machine."""
    with pytest.raises((ValueError, OSError)) as error:
        list(launched(fail_on_the_second, "rank-1-error", launch))
    has_traceback = "in fail_on_the_second" in str(error.value.__cause__)
    result.write_text(f"{error.typename}: {error.value}, traceback: {has_traceback}")


def results_of_two_machines(target, folder):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    launch = Launch(processes=1, machines=2, rendezvous=f"127.0.0.1:{port}", run="test", cuda=False)
    spawn = multiprocessing.get_context("spawn")
    machines = [spawn.Process(target=target, args=(launch, folder / str(number))) for number in range(2)]
    for one in machines:
        one.start()
    for one in machines:
        one.join(300)
    return sorted((folder / str(number)).read_text() for number in range(2))


def test_two_machines_share_a_job_until_the_first_one_ends_the_run(tmp_path):
    first, second = results_of_two_machines(machine, tmp_path)
    assert first == "[{'ranks': [0, 1]}]" and second == "exit 0"


def test_after_a_failure_one_machine_has_the_error_and_the_other_the_hint_to_look_there(tmp_path):
    first, second = results_of_two_machines(failing_machine, tmp_path)
    assert first.startswith(OtherMachineError.__name__) and "another machine" in first
    assert second == "ValueError: rank-1-error, traceback: True"


def test_too_few_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="launch.processes=4096.* GPUs.* [0-9]+:.*device=cpu"):
        _join(Launch(processes=4096, machines=1, rendezvous=None, run="test", cuda=True), None)
