"""What each of many processes does: its share of one student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.pipelines.train.nodes import start
from dpdmd_pipeline.pipelines.train.options import TrainOptions
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.launch import Launch, Member, launched


@dataclass(frozen=True)
class Job:
    """Everything a process needs to set up the run by itself; pickled, so files are given by their place."""

    rows: list[int]
    embeddings: Any
    anchors: Any
    teacher: Path
    backbone: BackboneOptions
    options: TrainOptions
    checkpoints: Checkpoints


def train_in_processes(job: Job) -> Iterator[dict]:
    """Train in as many processes as the options say; yields the new steps' records. The checkpoint has the student."""
    where = job.options.launch
    cuda = resolve_device(job.options.device).type == "cuda"
    launch = Launch(where.processes, where.machines, where.rendezvous, job.checkpoints.folder.name, cuda)
    return launched(train_share, job, launch)


def train_share(job: Job, member: Member) -> bool:
    """The loop in one process; returns whether it came to its end."""
    # Held by the process that writes: it outlives a killed parent until its step is done.
    with job.checkpoints.held() if member.rank == 0 else nullcontext():
        member.wait_for_all()
        resumed = job.checkpoints.load_latest()
        *_, records = start(
            job.rows, job.embeddings, job.anchors, job.teacher, job.backbone, job.options, job.checkpoints, resumed
        )
        with closing(records):  # broken off, it saves
            if member.asked_to_stop():
                return False
            for record in records:
                member.report(record)
                if member.asked_to_stop():
                    return record["step"] == job.options.max_steps
    return True
