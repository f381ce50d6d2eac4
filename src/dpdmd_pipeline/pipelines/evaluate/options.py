"""Options of the evaluate stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from dpdmd_pipeline.training.launch_options import LaunchOptions


class EvaluateOptions(BaseModel):
    """Number of pictures, and metrics that score them.

    Attributes:
        judge: `shapes` is the exact reader of the embedded world; null for prompts outside that world.
        by: further metrics, or axes for their default metrics: names of scoring/presets.py.
        seed: seed of the pictures and of the bootstrap.
        images_per_prompt: pictures of each prompt.
        batch_size: pictures per batch on a GPU, 64 at most; a CPU always uses 16, so that its pictures do not change.
        metric_batch_size: pictures per batch of a metric's network on a GPU; a CPU always uses one.
        metric_processes: processes that share the prompts while scoring.
        grid_prompts: rows of the grids: the first evaluation prompts.
        grid_columns: pictures of each prompt in the grids.
        grid_tile: largest side of a picture in the grids, in pixels.
        save_pictures: if true, every picture is also written as a file, for `score`, `arena` and your own eyes.
        device: device of models and metrics.
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
            raise ValueError("judge=null and by=[] measure nothing: name metrics or axes in `by`")
        return self
