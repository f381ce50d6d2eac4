"""Base and numbers of all option models: nothing unknown, converted or not finite, and every count has a largest value.

The largest values lie above any use; they refuse a slip of the keyboard before it fills the memory or the disk.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_MOST = 9_999_999  # checkpoints are sorted by names with seven digits

LAST_SEED = 2**32 - 1  # a Mersenne Twister is seeded with 32 bits
Seed = Annotated[int, Field(ge=0, le=LAST_SEED)]
Count = Annotated[int, Field(ge=1, le=_MOST)]  # of updates, and of what a loop makes one by one
CountOrZero = Annotated[int, Field(ge=0, le=_MOST)]
Size = Annotated[int, Field(ge=1, le=2**16)]  # of a batch, a shard, a picture's side: what is in memory at once
Pairs = Annotated[int, Field(ge=2, le=2**16)]  # pictures of a prompt; diversity needs a pair
Few = Annotated[int, Field(ge=1, le=1024)]  # sampling steps, processes, kept files


Text = Annotated[str, Field(min_length=1, max_length=512)]  # a name or a link


class StrictModel(BaseModel):
    """Options without unknown names, converted types, or numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
