"""Options of the prompts stage."""

from typing import Literal

from pydantic import Field

from dpdmd_pipeline.bounds import Count, Seed, Size, StrictModel
from dpdmd_pipeline.training.launch_options import LaunchOptions


class PromptsOptions(StrictModel):
    """Options for splitting and encoding prompts.

    `take` chooses among the prompts of `raw_prompts` by a hash of text and `seed`; null takes all of them.
    `eval_share` is the share of `raw_prompts` for evaluation instead of training, chosen by a hash of the text; null
    takes the evaluation prompts from `raw_eval_prompts`.
    """

    take: Count | None
    seed: Seed  # of the choice
    eval_share: float | None = Field(gt=0, lt=1)
    batch_size: Size  # prompts per call of the text encoders
    shard_size: Size  # prompts per file of the cache; as many are in memory
    device: Literal["auto", "cpu", "cuda"]  # of the text encoders
    launch: LaunchOptions  # processes that share the encoding
