"""Train and judge the students of a study; several processes can share the work."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.model_folder import folder_hash
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.evaluate.sampling import StartOptions, sample_model
from dpdmd_pipeline.planning.identity import code_hash
from dpdmd_pipeline.publishing import Folders, LockedError, locked, write_atomically

log = logging.getLogger(__name__)

Student = tuple[int, str]  # seed and run

_POLL = 5.0  # seconds between checks of students that other processes train


class Judge(NamedTuple):
    """The exact reader, applied to a model's pictures of the evaluation's prompts and seeds."""

    chosen: dict[int, str]  # text of every evaluation prompt, by row
    embeddings: Any
    teacher: Path
    backbone: BackboneOptions
    options: EvaluateOptions
    state: Path  # folder of the stored results

    def measure(self, student: Path | None, start: StartOptions | None = None) -> dict[str, Any]:
        """Quality and diversity of a student's folder, or of the teacher for None."""
        from dpdmd_pipeline.metrics.shapes import judge

        models = (self.embeddings, self.teacher, self.backbone, self.options)
        samples = sample_model(student, self.chosen, *models, start)
        per_prompt = [samples["image"][samples["prompt"] == row] / 255 for row in self.chosen]
        return judge(per_prompt, list(self.chosen.values()), self.options.seed)

    def path(self, identity: str, start: StartOptions | None) -> Path:
        """File of the result of a student's identity; its name hashes everything that decides it."""
        options = self.options.model_dump(mode="json", include={"judge", "seed", "images_per_prompt"})
        inputs = (list(self.chosen.items()), options, folder_hash(self.teacher), start and start.model_dump())
        key = fingerprint(identity, *inputs, code_hash("pipelines.study.students"))
        return self.state / f"judged_{key[:16]}.json"


Trained = tuple[Callable[[Path], None], list[dict]]  # function that writes the student, and its history


def judge_student(
    train: Callable[[], Trained], judge: Judge, identity: str, start: StartOptions | None = None
) -> dict[str, Any]:
    """Quality, diversity and last history record of a student; train and judge it unless its result is stored."""
    path = judge.path(identity, start)
    with locked(Folders.of(path)):
        with suppress(FileNotFoundError, ValueError):  # it may be incomplete
            return json.loads(path.read_bytes())
        write, history = train()
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            result = {**judge.measure(Path(folder), start), "last": history[-1]}
        text = json.dumps(result)
        write_atomically(path, lambda temporary: temporary.write_text(text))
        return result


def make_all(students: Sequence[Student], make: Callable[[Student], dict[str, Any]]) -> dict[Student, dict[str, Any]]:
    """Make every student in turn, then wait for the students of other processes.

    You can start the same command once per core, and on several machines with a shared file system.

    Args:
        make: trains and judges one student; raises LockedError if another process trains it.
    """
    results: dict[Student, dict[str, Any]] = {}
    logged: set[Student] = set()
    while remaining := [student for student in students if student not in results]:
        for seed, run in remaining:
            try:
                results[seed, run] = make((seed, run))
                log.info("study: %s, seed %d is done: %d of %d students", run, seed, len(results), len(students))
            except LockedError as error:
                if (seed, run) not in logged:
                    log.info("study: another process trains %s, seed %d: %s", run, seed, error)
                logged.add((seed, run))
        if all(student not in results for student in remaining):
            time.sleep(_POLL)
    return results
