"""The stage in two processes, and what is refused before any is started."""

import pytest
from pydantic import ValidationError
from tests.pipelines.conftest import ONE, OPTIMIZER, PROMPTS, TWO, anchor_options, backbone_options, train_options

from dpdmd_pipeline.backbones.student_file import load_header
from dpdmd_pipeline.pipelines.train import worker
from dpdmd_pipeline.pipelines.train.nodes import train_student

ALONE, SHARED = ({**launch, "sharding": "none"} for launch in (ONE, TWO))


def test_a_student_of_two_processes_that_share_its_weights_is_written_as_one_of_a_single_process_and_reused_by_it(
    tiny_teacher, embeddings, anchors, tmp_path, caplog
):
    given = PROMPTS, embeddings, anchors, tiny_teacher, tmp_path / "state", backbone_options(), anchor_options()
    write, history = train_student(*given, train_options(launch={**SHARED, "sharding": "fsdp2"}))
    (tmp_path / "student").mkdir()
    write(tmp_path / "student")
    assert load_header(tmp_path / "student").sigmas == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [row["step"] for row in history] == [1, 2] and "reused" not in caplog.text
    with caplog.at_level("INFO"):
        _, again = train_student(*given, train_options(launch=ALONE))
    assert again == history and "finished student reused" in caplog.text


def test_a_state_that_is_gone_when_the_processes_end_is_said(tiny_teacher, embeddings, anchors, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "train_in_processes", lambda job: (record for record in ()))  # leaves nothing
    given = PROMPTS, embeddings, anchors, tiny_teacher, tmp_path / "state", backbone_options(), anchor_options()
    with pytest.raises(ValueError, match=r"no whole state is left in .*state/[0-9a-f]{16}: was it deleted"):
        train_student(*given, train_options(launch=SHARED))


@pytest.mark.parametrize(
    "launch, message",
    [
        ({"processes": 3}, r"batch_size=4 cannot be shared evenly by 3 processes"),
        ({"machines": 2, "rendezvous": "first:29400", "processes": 3}, r"by 6 processes \(launch: 3 on each of 2"),
        ({"machines": 2}, r"machines=2 need a rendezvous: host:port"),
        ({"machines": 2, "rendezvous": "first"}, "pattern"),
        ({"processes": 0}, "greater than 0"),
        ({"sharding": "fsdp2"}, "sharding=fsdp2 cuts nothing in one process: set processes=2 or sharding=none"),
        ({"sharding": "fsdp1"}, "'none' or 'fsdp2'"),
    ],
)
def test_processes_that_cannot_share_a_batch_or_meet_are_refused(launch, message):
    with pytest.raises(ValidationError, match=message):
        train_options(batch_size=4, launch={**ALONE, **launch})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"weighting": "balanced"},
            "weighting=balanced does not go with launch.sharding=fsdp2: set weighting=fixed",
        ),
        ({"compile": "blocks"}, "compile=blocks does not go with launch.sharding=fsdp2: set compile=none, or"),
        ({"channels_last": True}, "channels_last=True does not go with launch.sharding=fsdp2"),
        ({"roles": "lora"}, "roles=lora cannot be sharded, its adapters are small: set launch.sharding=none"),
        (
            {"fake_score": {**OPTIMIZER, "kind": "adamw_8bit"}},
            "fake_score.kind=adamw_8bit cannot be sharded: set kind=adamw or launch.sharding=none",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes, message):
    train_options(launch=SHARED, **changes)
    with pytest.raises(ValidationError, match=message):
        train_options(launch={**SHARED, "sharding": "fsdp2"}, **changes)
