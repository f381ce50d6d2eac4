"""The parameter group `prompts`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from dpdmd_pipeline.training.launch_options import LaunchOptions


class PromptsOptions(BaseModel):
    """How prompts are split and encoded.

    Attributes:
        eval_share: of `raw_prompts` that goes to evaluation, and then not to training, chosen by a hash of
            the text; None takes the evaluation prompts from `raw_eval_prompts`.
        batch_size: prompts the text encoders see at once.
        shard_size: prompts a file of the cache, and held in memory.
        device: of the text encoders.
        launch: processes that share the encoding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    eval_share: float | None = Field(gt=0, lt=1)
    batch_size: PositiveInt
    shard_size: PositiveInt
    device: Literal["auto", "cpu", "cuda"]
    launch: LaunchOptions
