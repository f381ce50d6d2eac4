"""The stage in two processes, and what is refused before any is started."""

import pytest
from pydantic import ValidationError
from tests.pipelines.conftest import ONE, PROMPTS, TWO, anchor_options, backbone_options, train_options

from dpdmd_pipeline.backbones.student_file import load_header
from dpdmd_pipeline.pipelines.train.nodes import train_student


def test_a_student_of_two_processes_is_written_as_one_of_a_single_process_and_reused_by_it(
    tiny_teacher, embeddings, anchors, tmp_path, caplog
):
    given = PROMPTS, embeddings, anchors, tiny_teacher, tmp_path / "state", backbone_options(), anchor_options()
    write, history = train_student(*given, train_options(launch=TWO))
    (tmp_path / "student").mkdir()
    write(tmp_path / "student")
    assert load_header(tmp_path / "student").sigmas == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [row["step"] for row in history] == [1, 2] and "reused" not in caplog.text
    with caplog.at_level("INFO"):
        _, again = train_student(*given, train_options(launch=ONE))
    assert again == history and "finished student reused" in caplog.text


@pytest.mark.parametrize(
    "launch, message",
    [
        ({"processes": 3}, r"batch_size=4 cannot be shared evenly by 3 processes"),
        ({"machines": 2, "rendezvous": "first:29400", "processes": 3}, r"by 6 processes \(launch: 3 on each of 2"),
        ({"machines": 2}, r"machines=2 need a rendezvous: host:port"),
        ({"machines": 2, "rendezvous": "first"}, "pattern"),
        ({"processes": 0}, "greater than 0"),
    ],
)
def test_processes_that_cannot_share_a_batch_or_meet_are_refused(launch, message):
    with pytest.raises(ValidationError, match=message):
        train_options(batch_size=4, launch={**ONE, **launch})
