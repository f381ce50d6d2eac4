"""A run that was stopped or killed and started again gives the student of an uninterrupted one."""

import multiprocessing
import os
import signal
from contextlib import closing, suppress

import pytest
import torch
from tests.raising import refuses
from tests.training.test_launch import TWO, distance, records_of, student_of

from dpdmd_pipeline.pipelines.train.progress import follow
from dpdmd_pipeline.training.launch import launched

RUNS = {"full": {"ema": 0.5}, "lora": {"roles": "lora", "ema": 0.5}}
END, SIGNALLED = 4, 3  # the last cycle, and the one after which the signal comes; checkpoints come every two cycles
RECIPE = {"max_steps": END, "fake_score_turns": 1}
HOW = {"stopped": signal.SIGTERM, "killed": signal.SIGKILL}


def trained(teacher, folder, micro_batch=4):
    """Records of several runs that advance together, so that one signal stops them all."""
    # In the background, a kill may come before the checkpoint's end
    execution = {"checkpoint_every": 2, "checkpoint_background": folder.name != "killed"}
    runs = [
        records_of(("sd3", teacher), folder / name, micro_batch, execution=execution, **RECIPE, **changes)
        for name, changes in RUNS.items()
    ]
    try:
        for records in zip(*runs, strict=True):
            yield records[0]
    finally:
        for run in runs:
            run.close()


def signalled(number, records, rank=0):
    """The same records; this process receives a signal after one of them."""
    with closing(records):
        for record in records:
            if record["step"] == SIGNALLED and rank == 0:
                os.kill(os.getpid(), number)
            yield record


# ---- one process


def train_alone_until_killed(teacher, folder, threads):
    """First the runs that stop on request, then those that are killed."""
    from tests.training.conftest import recipe_with

    torch.set_num_threads(threads)  # else sums may come in another order
    for how, number in HOW.items():
        with suppress(KeyboardInterrupt):
            follow(
                signalled(number, trained(teacher, folder / how)), 0, recipe_with(**RECIPE), 100, lambda record: None
            )


@pytest.fixture(scope="module")
def alone(tiny_teacher, tmp_path_factory):
    """Folder of runs in one process, uninterrupted or resumed after a signal; and the resumed cycles."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = tiny_teacher, folder, torch.get_num_threads()
    process = multiprocessing.get_context("spawn").Process(target=train_alone_until_killed, args=arguments)
    process.start()
    list(trained(tiny_teacher, folder / "whole"))
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    return folder, {how: [record["step"] for record in trained(tiny_teacher, folder / how)] for how in HOW}


def test_a_stopped_process_loses_no_cycle_and_a_killed_one_those_since_its_checkpoint(alone):
    assert alone[1] == {"stopped": [4], "killed": [3, 4]}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("roles", RUNS)
def test_one_process_resumes_bit_for_bit(alone, how, roles):
    resumed, whole = (student_of(alone[0] / name / roles) for name in (how, "whole"))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


# ---- two processes


def train_until_killed(job, member):
    """The same in each of two processes."""
    teacher, folder = job
    with closing(signalled(HOW["stopped"], trained(teacher, folder / "stopped", 2), member.rank)) as records:
        for _ in records:
            if member.asked_to_stop():
                break
    list(signalled(HOW["killed"], trained(teacher, folder / "killed", 2), member.rank))


def train_to_the_end(job, member):
    teacher, folder = job
    for name in ("stopped", "killed", "whole"):
        for record in trained(teacher, folder / name, 2):
            member.report({"run": name, "step": record["step"]})
    return True


@pytest.fixture(scope="module")
def together(tiny_teacher, tmp_path_factory):
    """The same for two processes, one of which receives the signal."""
    folder = tmp_path_factory.mktemp("together")
    with refuses(ChildProcessError, "process 0 of 2", "SIGKILL"):
        list(launched(train_until_killed, (tiny_teacher, folder), TWO))
    reported = list(launched(train_to_the_end, (tiny_teacher, folder), TWO))
    return folder, {how: [record["step"] for record in reported if record["run"] == how] for how in HOW}


def test_two_stopped_processes_lose_no_cycle_and_killed_ones_those_since_their_checkpoint(together):
    assert together[1] == {"stopped": [4], "killed": [3, 4]}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("roles", RUNS)
def test_two_processes_resume_to_the_student_of_an_uninterrupted_run(together, how, roles):
    assert distance(together[0] / how / roles, together[0] / "whole" / roles) <= 1e-6
