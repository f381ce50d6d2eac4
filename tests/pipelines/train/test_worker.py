"""The stage in two processes, and the options refused before any of them starts."""

import gc

import pytest
import torch
from pydantic import ValidationError
from tests.pipelines.conftest import ONE, OPTIMIZER, PROMPTS, TWO, anchor_options, backbone_options, train_options

from dpdmd_pipeline.backbones.base import PipelineBackbone
from dpdmd_pipeline.backbones.student_file import load_header
from dpdmd_pipeline.pipelines.train import nodes
from dpdmd_pipeline.pipelines.train.nodes import train_student


def weights():
    """All parameters in this process."""
    return [item for item in gc.get_objects() if type(item) is torch.nn.Parameter]


ALONE, SHARED = ({**launch, "sharding": "none"} for launch in (ONE, TWO))


def test_a_student_of_two_processes_that_share_its_weights_is_written_as_one_of_a_single_process_and_reused_by_it(
    tiny_teacher, embeddings, anchors, tmp_path, caplog, monkeypatch
):
    def refuse(*_):
        raise AssertionError("this process starts others or writes a finished student: it needs no network")

    def count_weights(job):
        for record in train_in_processes(job):
            assert [weight for weight in weights() if id(weight) not in before] == []
            yield record

    before, train_in_processes = {id(weight): weight for weight in weights()}, nodes.train_in_processes
    monkeypatch.setattr(nodes, "train_in_processes", count_weights)
    monkeypatch.setattr(PipelineBackbone, "load_model", refuse)  # in this process, not in those that it starts
    inputs = PROMPTS, embeddings, anchors, tiny_teacher, tmp_path / "state", None, backbone_options(), anchor_options()
    write, history = train_student(*inputs, train_options(launch={**SHARED, "sharding": "fsdp2"}))
    (tmp_path / "student").mkdir()
    write(tmp_path / "student")
    assert load_header(tmp_path / "student").sigmas == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [row["step"] for row in history] == [1, 2] and "reused" not in caplog.text
    with caplog.at_level("INFO"):
        _, again = train_student(*inputs, train_options(launch=ALONE))
    assert again == history and "reused" in caplog.text


def test_a_missing_state_after_the_processes_end_is_refused(tiny_teacher, embeddings, anchors, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "train_in_processes", lambda job: (record for record in ()))  # leaves nothing
    inputs = PROMPTS, embeddings, anchors, tiny_teacher, tmp_path / "state", None, backbone_options(), anchor_options()
    with pytest.raises(ValueError, match=r"state/[0-9a-f]{16}"):
        train_student(*inputs, train_options(launch=SHARED))


@pytest.mark.parametrize(
    "launch, facts",
    [
        ({"processes": 3}, "batch_size=4 .* 3 processes"),
        ({"machines": 2, "rendezvous": "first:29400", "processes": 3}, "batch_size=4 .* 6 processes .*3 .* 2 "),
        ({"machines": 2}, "machines=2.*rendezvous"),
        ({"machines": 2, "rendezvous": "first"}, "rendezvous(.|\\n)*pattern"),
        ({"processes": 0}, "launch.processes"),
        ({"sharding": "fsdp2"}, "sharding=fsdp2.*processes=2.*sharding=none"),
        ({"sharding": "fsdp1"}, "launch.sharding(.|\\n)*'none' or 'fsdp2'"),
    ],
)
def test_processes_that_cannot_share_a_batch_or_meet_are_refused(launch, facts):
    with pytest.raises(ValidationError, match=facts):
        train_options(batch_size=4, launch={**ALONE, **launch})


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"compile": "blocks"}, "compile=blocks.*launch.sharding=fsdp2.*compile=none"),
        ({"channels_last": True}, "channels_last=True.*launch.sharding=fsdp2"),
        ({"roles": "lora"}, "roles=lora.*launch.sharding=none"),
        (
            {"fake_score": {**OPTIMIZER, "kind": "adamw_8bit"}},
            "fake_score.kind=adamw_8bit.*kind=adamw .*launch.sharding=none",
        ),
    ],
)
def test_options_that_cannot_be_sharded_are_refused(changes, facts):
    train_options(launch=SHARED, **changes)
    with pytest.raises(ValidationError, match=facts):
        train_options(launch={**SHARED, "sharding": "fsdp2"}, **changes)
