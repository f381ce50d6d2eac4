"""Options of the evaluate stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from dpdmd_pipeline.training.launch_options import LaunchOptions


class EvaluateOptions(BaseModel):
    """How many pictures are drawn, and what judges them.

    Attributes:
        judge: `shapes` is the exact reader of the embedded world; null where prompts are not of that world.
        by: further metrics, or axes for their default ones: names of scoring/presets.py.
        seed: of the pictures and of resampling.
        images_per_prompt: pictures of each prompt.
        batch_size: pictures a GPU draws at once, 64 at most; a CPU draws 16, so that its pictures are always the same.
        metric_batch_size: pictures that a metric's network sees at once on a GPU; on a CPU it is always one.
        metric_processes: over which prompts are spread when they are judged.
        grid_prompts: rows of the grids, the first so many prompts.
        grid_columns: pictures of each prompt in the grids.
        grid_tile: largest side of a picture in the grids, in pixels.
        save_pictures: whether every drawn picture is also written as a file, for `score`, `arena`, and to look at.
        device: where models and metrics run.
        launch: processes that share the drawing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    judge: Literal["shapes"] | None
    by: list[str]
    seed: NonNegativeInt
    images_per_prompt: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt
    metric_batch_size: PositiveInt
    metric_processes: PositiveInt
    grid_prompts: PositiveInt
    grid_columns: PositiveInt
    grid_tile: PositiveInt
    save_pictures: bool
    device: Literal["auto", "cpu", "cuda"]
    launch: LaunchOptions

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if self.judge is None and not self.by:
            raise ValueError("judge=null and by=[]: nothing would be measured, name metrics or axes in `by`")
        return self
