"""Fixtures that many tests share, and the numbers of the fuzz at the end."""

import sys
from collections import Counter

import pytest
import torch

pytest_plugins = ["tests.teachers"]

_FUZZ = Counter()  # inputs of all processes, by kind and verdict


def pytest_sessionfinish(session):
    if "tests.fuzz.verdicts" in sys.modules:
        _FUZZ.update(sys.modules["tests.fuzz.verdicts"].COUNTS)
    if hasattr(session.config, "workeroutput"):  # a process of xdist
        session.config.workeroutput["fuzz"] = dict(_FUZZ)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _FUZZ.update(getattr(node, "workeroutput", {}).get("fuzz", {}))


def pytest_terminal_summary(terminalreporter):
    if _FUZZ:
        numbers = "; ".join(f"{name} {count}" for name, count in sorted(_FUZZ.items()))
        terminalreporter.write_line(f"fuzz, {_FUZZ.total()} inputs: {numbers}")


@pytest.fixture(scope="session")
def world_teacher(tmp_path_factory):
    """An untrained StableDiffusion3Pipeline directory of the embedded world's sizes; treat it as read-only."""
    from dpdmd_pipeline.shapes.models import make_pipeline

    folder = tmp_path_factory.mktemp("world") / "teacher"
    make_pipeline(max_length=12, shift=1.0, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """The same with a smaller transformer, trained in a third of the time; treat it as read-only."""
    from diffusers import SD3Transformer2DModel

    from dpdmd_pipeline.shapes.models import make_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    pipeline = make_pipeline(max_length=12, shift=1.0, seed=0)
    smaller = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(pipeline.transformer.config, **smaller))
    pipeline.save_pretrained(folder)
    return folder
