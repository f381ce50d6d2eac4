"""Launchers that start one process per GPU, and the machines that a run's stages name."""

import pytest
from tests.raising import refuses

from dpdmd_pipeline.planning.launcher import Launcher, rendezvous_of
from dpdmd_pipeline.training.launch_options import LaunchOptions


def launch(processes=1, machines=1, rendezvous="first:29400"):
    return LaunchOptions(processes=processes, machines=machines, rendezvous=rendezvous)


def slurm(tasks, nodes, local=0):
    """Variables of a task; SLURM_NTASKS alone is the job's, also outside srun."""
    numbers = {"STEP_NUM_TASKS": tasks, "STEP_NUM_NODES": nodes, "LOCALID": local, "NTASKS": tasks}
    return {f"SLURM_{name}": str(value) for name, value in numbers.items()}


def torchrun(size, local_size, local=0):
    return {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(local_size), "LOCAL_RANK": str(local), "RANK": str(local)}


@pytest.mark.parametrize(
    "environment, numbers",
    [
        ({}, (0, 1, 1)),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 1)),  # sbatch without srun
        (torchrun(8, 8, local=3), (3, 8, 1)),
        (torchrun(16, 8), (0, 8, 2)),
        (slurm(16, 2, local=7), (7, 8, 2)),
        (slurm(2, 2), (0, 1, 2)),
        ({**slurm(2, 2), **torchrun(16, 8, local=1)}, (1, 8, 2)),  # torchrun, started by srun
        ({"WORLD_SIZE": "2", "RANK": "1"}, (0, 1, 2)),  # a scheduler with one process on each machine
    ],
)
def test_a_launcher_tells_how_many_processes_it_has_started(environment, numbers):
    assert Launcher.of(environment)[1:] == numbers


@pytest.mark.parametrize(
    "environment, name",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        (torchrun(2, 0), "LOCAL_WORLD_SIZE='0'"),
        (torchrun(2, 2, local="-1"), "LOCAL_RANK='-1'"),
        (slurm("", 1) | {"SLURM_STEP_NUM_TASKS": "1.5"}, "SLURM_STEP_NUM_TASKS='1.5'"),
        (slurm(2, 0), "SLURM_STEP_NUM_NODES='0'"),
    ],
)
def test_a_variable_that_no_launcher_sets_is_refused(environment, name):
    with refuses(ValueError, name):
        Launcher.of(environment)


TRAIN = {"prompts": launch(), "train": launch(8)}
TWO = {"anchors": launch(8, 2), "train": launch(8, 2)}


@pytest.mark.parametrize(
    "environment, launches",
    [
        ({}, TRAIN),
        (torchrun(8, 8), TRAIN),
        (slurm(1, 1), TRAIN),
        (torchrun(16, 8), TWO),
        (slurm(16, 2), TWO),
        (slurm(2, 2), TWO),  # one task on each machine
    ],
)
def test_options_of_one_process_per_gpu_fit(environment, launches):
    assert Launcher.of(environment).refused(launches) is None


@pytest.mark.parametrize(
    "environment, launches, facts",
    [
        (torchrun(2, 2), {}, ["WORLD_SIZE=2", "train.launch.processes=2"]),
        (torchrun(4, 4), TRAIN, ["WORLD_SIZE=4", "train.launch has 8 on 1", "--params train.launch.processes=4"]),
        (torchrun(16, 8), TRAIN, ["WORLD_SIZE=16", "has 8 on 1", "train.launch.machines=2"]),
        (slurm(16, 2), {"train": launch(1, 2)}, ["16 tasks", "has 1 on 2", "train.launch.processes=8"]),
    ],
)
def test_a_run_without_a_stage_that_fits_the_launcher_is_refused_with_both_numbers(environment, launches, facts):
    line = Launcher.of(environment).refused(launches)
    assert all(fact in line for fact in facts), line


def test_all_stages_meet_at_one_rendezvous():
    assert rendezvous_of(TRAIN) is None and rendezvous_of({**TRAIN, **TWO}) == ("first:29400", 2)
    with refuses(ValueError, "anchors.launch", "machines=3", "other:1"):
        rendezvous_of({**TWO, "anchors": launch(8, 3, "other:1")})
