"""Options of the prompts stage."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from dpdmd_pipeline.training.launch_options import LaunchOptions


class PromptsOptions(BaseModel):
    """Options for splitting and encoding prompts.

    `eval_share` is the share of `raw_prompts` for evaluation instead of training, chosen by a hash of the text; null
    takes the evaluation prompts from `raw_eval_prompts`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    eval_share: float | None = Field(gt=0, lt=1)
    batch_size: PositiveInt  # prompts per call of the text encoders
    shard_size: PositiveInt  # prompts per file of the cache; as many are in memory
    device: Literal["auto", "cpu", "cuda"]  # of the text encoders
    launch: LaunchOptions  # processes that share the encoding
