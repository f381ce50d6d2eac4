"""The script for a day with a GPU runs: its parts are listed, and one goes through on the CPU with small networks."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def gpu_day(*arguments: str) -> subprocess.CompletedProcess:
    command = [ROOT / "benchmarks/gpu_day.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_parts_are_listed_by_their_numbers():
    lines = gpu_day("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5", "6"]


def test_a_part_that_does_not_exist_is_refused():
    process = gpu_day("--tiny", "7")
    assert process.returncode == 2 and "no part 7" in process.stderr


@pytest.mark.full_size
def test_the_part_of_sdxl_runs_with_small_networks_on_the_cpu():
    before = sorted((ROOT / "benchmarks/results").rglob("*"))
    process = gpu_day("--tiny", "5")
    assert process.returncode == 0, process.stderr
    assert "share of the rate of matrix products" in process.stdout
    assert sorted((ROOT / "benchmarks/results").rglob("*")) == before
