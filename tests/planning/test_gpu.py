"""What a GPU has: its memory, its arithmetic and its driver; torch's answers are given, as no GPU need be there."""

from types import SimpleNamespace

import pytest
import torch
from tests.pipelines.conftest import backbone_options, train_options
from tests.raising import refuses
from tests.training.conftest import ALONE

from dpdmd_pipeline.backbones import options as backbones
from dpdmd_pipeline.planning.checks import check_arithmetic
from dpdmd_pipeline.planning.gpu import planned_memory, with_micro_batches
from dpdmd_pipeline.planning.memory import GIB


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs: 80 GiB, of which 70 are free, and a smaller one."""
    sizes = [80, 48]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * GIB, 80 * GIB))
    properties = [SimpleNamespace(total_memory=size * GIB) for size in sizes]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties[number])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Quadro RTX 6000")


@pytest.mark.parametrize(
    "processes, card_gib, expected, overridden",
    [(1, None, 70, False), (2, None, 48, False), (2, 24.0, 24, False), (1, 96.0, 96, True), (2, 60.0, 60, True)],
)
def test_the_smallest_gpu_counts_and_an_option_that_exceeds_it_says_so(
    gpus, caplog, processes, card_gib, expected, overridden
):
    launch = {**ALONE, "processes": processes}
    assert planned_memory(train_options(device="cuda", launch=launch, card_gib=card_gib)) == expected * GIB
    assert [record.levelname for record in caplog.records] == ["WARNING"] * overridden
    free = 48 if processes == 2 else 70
    assert not overridden or (f"card_gib={card_gib:g}" in caplog.text and f"{free}.0 GiB" in caplog.text)


def test_on_a_cpu_nothing_is_planned_unless_a_card_is_named():
    assert planned_memory(train_options()) is None
    assert planned_memory(train_options(card_gib=16.0)) == 16 * GIB


def test_a_gpu_without_bfloat16_is_refused_with_its_name(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    half = {"device": "cuda", "precision": "bfloat16"}
    with refuses(ValueError, "Quadro RTX 6000", "train.precision=bfloat16", "train.precision=float32"):
        check_arithmetic(backbone_options(dtype="bfloat16"), train_options(**half))
    check_arithmetic(backbone_options(), train_options(device="cuda"))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_driver_older_than_torchs_cuda_is_refused_and_not_taken_for_a_missing_gpu(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    with refuses(ValueError, "CUDA 12.4", "13.0", "device=cpu"):
        backbones.resolve_device(device)
    assert backbones.resolve_device("cpu").type == "cpu"


class Affine:
    """An estimate of 1 GiB for each sample, of the largest micro-batch."""

    def estimate(self, _recipe, execution):
        sizes = execution.student_micro_batch, execution.fake_score_micro_batch, execution.rollout_micro_batch
        return SimpleNamespace(total=max(sizes) * GIB)


@pytest.mark.parametrize("free, size", [(0.5, 1), (4.9, 4), (7.5, 7), (40, 32)])
def test_auto_takes_the_largest_even_part_that_fits_and_leaves_given_numbers(free, size):
    options = train_options(batch_size=32, fake_score_micro_batch=3)
    fitted = with_micro_batches(Affine(), options, int(free * GIB))
    sizes = fitted.student_micro_batch, fitted.fake_score_micro_batch, fitted.rollout_micro_batch
    assert sizes == (size if free > 3 else 1, 3, size if free > 3 else 1)
    assert not fitted.is_automatic and options.is_automatic


def test_auto_without_a_gpu_is_the_batch_or_32():
    for batch, trained in ((4, 4), (96, 32)):
        fitted = train_options(batch_size=batch).execution().fitted_to(batch)
        assert (fitted.student_micro_batch, fitted.fake_score_micro_batch) == (trained, trained)
        assert fitted.rollout_micro_batch == 32


@pytest.mark.parametrize("size", [0, 2.5, "all", None])
def test_a_micro_batch_is_a_number_or_auto(size):
    with pytest.raises(ValueError, match="student_micro_batch") as error:
        train_options(student_micro_batch=size)
    assert error.value.error_count() == 1
