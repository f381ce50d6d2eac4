"""The parameter group `prompts`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from dpdmd_pipeline.training.launch_options import LaunchOptions


class PromptsOptions(BaseModel):
    """Options for splitting and encoding prompts.

    Attributes:
        eval_share: share of `raw_prompts` for evaluation instead of training, chosen by a hash of the text;
            None takes the evaluation prompts from `raw_eval_prompts`.
        batch_size: prompts per call of the text encoders.
        shard_size: prompts per file of the cache; as many are in memory.
        device: of the text encoders.
        launch: processes that share the encoding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    eval_share: float | None = Field(gt=0, lt=1)
    batch_size: PositiveInt
    shard_size: PositiveInt
    device: Literal["auto", "cpu", "cuda"]
    launch: LaunchOptions
