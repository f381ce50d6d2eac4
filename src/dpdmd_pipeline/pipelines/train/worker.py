"""Training of one student in several processes."""

from collections.abc import Iterator
from contextlib import closing, nullcontext

from dpdmd_pipeline.backbones.options import resolve_device
from dpdmd_pipeline.pipelines.train.setup import Job, start
from dpdmd_pipeline.training.launch import launched
from dpdmd_pipeline.training.member import Launch, Member


def train_in_processes(job: Job) -> Iterator[dict]:
    """Train in other processes; yields the new cycles' records. The student is in the last checkpoint."""
    options = job.options.launch
    cuda = resolve_device(job.options.device).type == "cuda"
    launch = Launch(options.processes, options.machines, options.rendezvous, job.checkpoints.folder.name, cuda)
    return launched(train_share, job, launch)


def train_share(job: Job, member: Member) -> bool:
    """Run the loop in one process; returns True if it came to its end."""
    # The writing process holds the lock: it outlives a killed parent until its cycle is done.
    with job.checkpoints.locked() if member.rank == 0 else nullcontext():
        member.wait_for_all()
        with closing(start(job, job.checkpoints.load_latest())[1]) as records:  # saves if the loop stops early
            if member.asked_to_stop():
                return False
            for record in records:
                member.report(record)
                if member.asked_to_stop():
                    return record["step"] == job.options.max_steps
    return True
