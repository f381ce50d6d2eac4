"""The students of a study, one after the other: each is trained once, by whichever process comes to it first."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.lineage import code_hash
from dpdmd_pipeline.datasets.model_folder import folder_hash
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.pipelines.evaluate import sampling
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.evaluate.sampling import sample_model
from dpdmd_pipeline.publishing import Folders, LockedError, locked, write_atomically

log = logging.getLogger(__name__)

Student = tuple[int, str]  # seed and run

# A judgement is only taken up by the code that made it.
CODE = (
    *sampling.CODE,
    "metrics/modes.py",
    "metrics/pixels.py",
    "metrics/shapes.py",
    "metrics/summary.py",
    "shapes/reader.py",
    "shapes/world.py",
)
_POLL = 5.0  # seconds between looks at students that other processes train


class Judge(NamedTuple):
    """The exact reader over one model's pictures of the evaluation's prompts and seeds.

    Attributes:
        chosen: row and text of every prompt.
        state: folder of the judgements that were made.
    """

    chosen: dict[int, str]
    embeddings: Any
    teacher: Path
    backbone: BackboneOptions
    options: EvaluateOptions
    state: Path

    def judged(self, student: Path | None) -> dict[str, Any]:
        """Quality and diversity of a student's folder, or of the teacher."""
        from dpdmd_pipeline.metrics.shapes import judge

        drawn = sample_model(student, self.chosen, self.embeddings, self.teacher, self.backbone, self.options)
        per_prompt = [drawn["image"][drawn["prompt"] == row] / 255 for row in self.chosen]
        return judge(per_prompt, list(self.chosen.values()), self.options.seed)

    def count(self) -> dict[str, int]:
        """Over how much each model is judged."""
        return {"prompts": len(self.chosen), "per_prompt": self.options.images_per_prompt}

    def record(self, identity: str) -> Path:
        """Where what is known of a student is kept; its name tells all that decides it.

        Args:
            identity: of the student.
        """
        asked = self.options.model_dump(mode="json", include={"judge", "seed", "images_per_prompt"})
        drawn = (list(self.chosen.items()), asked, folder_hash(self.teacher))
        return self.state / f"judged_{fingerprint(identity, *drawn, code_hash(*CODE))[:16]}.json"


Made = tuple[Callable[[Path], None], list[dict]]  # what writes a student, and its history


def judged_student(train: Callable[[], Made], judge: Judge, identity: str) -> dict[str, Any]:
    """Quality, diversity and last record of a student, which is trained and judged unless that is done.

    Raises:
        LockedError: if another process is training or judging it.
    """
    path = judge.record(identity)
    with locked(Folders.of(path)):
        known = _known(path)
        if known is not None:
            return known
        write, history = train()
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            found = {**judge.judged(Path(folder)), "last": history[-1]}
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(found)))
    return found


def _known(path: Path) -> dict[str, Any] | None:
    """A judgement that was kept; None if there is none, or not a whole one."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def make_all(students: Sequence[Student], make: Callable[[Student], dict[str, Any]]) -> dict[Student, dict[str, Any]]:
    """Make every student in turn; those that another process is training are waited for at the end.

    So the same command may be started as often as there are cores or machines over one file system.

    Args:
        students: in the order in which they are begun.
        make: trains and judges one; raises LockedError where somebody else trains it.
    """
    found: dict[Student, dict[str, Any]] = {}
    told: set[Student] = set()
    while left := [student for student in students if student not in found]:
        for seed, run in left:
            try:
                found[seed, run] = make((seed, run))
                log.info("study: %s, seed %d: %d of %d students are there", run, seed, len(found), len(students))
            except LockedError as error:
                if (seed, run) not in told:
                    log.info("study: %s, seed %d is left to another process: %s", run, seed, error)
                told.add((seed, run))
        if all(student not in found for student in left):
            time.sleep(_POLL)
    return found
