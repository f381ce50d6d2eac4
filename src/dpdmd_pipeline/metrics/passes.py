"""How pictures go through a network, so that a number does not depend on how they were grouped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Passes:
    """Where a network runs, and how many pictures go through it at once.

    On the CPU it is always one picture and one thread: a product of matrices sums in another order in another
    batch, or on another number of threads. More cores are used by more processes. On a GPU, batches differ in the
    last bits.

    Attributes:
        device: cpu or cuda.
        batch_size: pictures a pass on a GPU.
    """

    device: str
    batch_size: int

    def run(self, network: Callable[[Sequence[Any]], Tensor], images: Sequence[Any]) -> Tensor:
        """Rows of the network's answers, float32 on the CPU, in the order of the pictures (or texts, or pairs)."""
        size = 1 if self.device == "cpu" else self.batch_size
        with torch.no_grad(), _one_thread(self.device == "cpu"):
            chunks = [network(images[start : start + size]) for start in range(0, len(images), size)]
            return torch.cat([chunk.float().cpu() for chunk in chunks])


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
