"""What each of many processes does: its share of one student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext

from dpdmd_pipeline.backbones.options import resolve_device
from dpdmd_pipeline.pipelines.train.setup import Job, start
from dpdmd_pipeline.training.launch import Launch, Member, launched


def train_in_processes(job: Job) -> Iterator[dict]:
    """Train in as many processes as the options say; yields the new steps' records. The checkpoint has the student."""
    where = job.options.launch
    cuda = resolve_device(job.options.device).type == "cuda"
    launch = Launch(where.processes, where.machines, where.rendezvous, job.checkpoints.folder.name, cuda)
    return launched(train_share, job, launch)


def train_share(job: Job, member: Member) -> bool:
    """The loop in one process; returns whether it came to its end."""
    # Held by the process that writes: it outlives a killed parent until its step is done.
    with job.checkpoints.locked() if member.rank == 0 else nullcontext():
        member.wait_for_all()
        resumed = job.checkpoints.load_latest()
        *_, records = start(job, resumed)
        with closing(records):  # broken off, it saves
            if member.asked_to_stop():
                return False
            for record in records:
                member.report(record)
                if member.asked_to_stop():
                    return record["step"] == job.options.max_steps
    return True
