"""Options of the evaluate stage."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from dpdmd_pipeline.backbones.options import TeacherStart
from dpdmd_pipeline.training.launch_options import LaunchOptions


class EvaluateOptions(BaseModel):
    """Number of pictures, and metrics that score them.

    The batch sizes hold on a GPU. A CPU always draws 16 pictures at once and scores one, so that no result changes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    judge: Literal["shapes"] | None  # the exact reader of the embedded world; null for prompts outside that world
    by: list[str]  # further metrics, or axes for their default metrics: names of scoring/presets.py
    seed: NonNegativeInt  # of the pictures and of the bootstrap
    images_per_prompt: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt  # pictures drawn at once, 64 at most
    metric_batch_size: PositiveInt  # pictures per batch of a metric's network
    metric_processes: PositiveInt  # processes that share the prompts while scoring
    grid_prompts: PositiveInt  # rows of the grids: the first evaluation prompts
    grid_columns: PositiveInt  # pictures of each prompt in the grids
    grid_tile: PositiveInt  # largest side of a picture in the grids, in pixels
    teacher_start: TeacherStart | None  # one more model: the DMD student, started by the teacher; null leaves it out
    save_pictures: bool  # also write every picture as a file, for `score`, `arena` and your own eyes
    device: Literal["auto", "cpu", "cuda"]  # of models and metrics
    launch: LaunchOptions  # processes that share the drawing

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if self.judge is None and not self.by:
            raise ValueError("judge=null and by=[] measure nothing: name metrics or axes in `by`")
        return self
