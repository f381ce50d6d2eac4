"""Options of the evaluate stage."""

from typing import Literal, Self

from pydantic import model_validator

from dpdmd_pipeline.backbones.options import TeacherStart
from dpdmd_pipeline.bounds import Few, Pairs, Seed, Size, StrictModel
from dpdmd_pipeline.training.launch_options import LaunchOptions


class EvaluateOptions(StrictModel):
    """Number of pictures, and metrics that score them.

    The batch sizes hold on a GPU. A CPU always draws 16 pictures at once and scores one, so that no result changes.
    """

    judge: Literal["shapes"] | None  # the exact reader of the embedded world; null for prompts outside that world
    by: list[str]  # further metrics, or axes for their default metrics: names of scoring/presets.py
    seed: Seed  # of the pictures and of the bootstrap
    images_per_prompt: Pairs
    batch_size: Size  # pictures drawn at once, 64 at most
    metric_batch_size: Size  # pictures per batch of a metric's network
    metric_processes: Few  # processes that share the prompts while scoring
    grid_prompts: Size  # rows of the grids: the first evaluation prompts
    grid_columns: Size  # pictures of each prompt in the grids
    grid_tile: Size  # largest side of a picture in the grids, in pixels
    teacher_start: TeacherStart | None  # one more model: the DMD student, started by the teacher; null leaves it out
    save_pictures: bool  # also write every picture as a file, for `score`, `arena` and your own eyes
    strict: bool  # end with exit code 3 if a metric or a picture could not be measured; DVC takes that for a failure
    device: Literal["auto", "cpu", "cuda"]  # of models and metrics
    launch: LaunchOptions  # processes that share the drawing

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if self.judge is None and not self.by:
            raise ValueError("judge=null and by=[] measure nothing: name metrics or axes in `by`")
        return self
