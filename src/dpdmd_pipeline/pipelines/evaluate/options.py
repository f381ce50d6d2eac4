"""Options of the evaluate stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from dpdmd_pipeline.training.launch_options import LaunchOptions


class EvaluateOptions(BaseModel):
    """How many pictures are drawn, how, and what judges them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    judge: Literal["shapes"]  # the exact reader of the embedded world
    seed: NonNegativeInt
    images_per_prompt: Annotated[int, Field(ge=2)]
    batch_size: (
        PositiveInt  # pictures a GPU draws at once, 64 at most; a CPU draws 16: its pictures are always the same
    )
    grid_columns: PositiveInt  # pictures per prompt in the grids
    device: Literal["auto", "cpu", "cuda"]
    launch: LaunchOptions  # processes that share the drawing
