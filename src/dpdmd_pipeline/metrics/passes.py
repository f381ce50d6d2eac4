"""Run networks so that a number does not depend on how pictures are grouped into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Passes:
    """Device and batch size of a network.

    On the CPU, a network always sees one picture on one thread: the order of a matrix product's sums depends on batch
    size and number of threads. More processes use more cores. On a GPU, batch sizes differ in the last bits.
    """

    device: str  # cpu or cuda
    batch_size: int  # pictures per pass on a GPU

    def run(self, network: Callable[[Sequence[Any]], Tensor], images: Sequence[Any]) -> Tensor:
        """Outputs of the network as float32 rows on the CPU, in the order of the pictures (or texts, or pairs)."""
        size = 1 if self.device == "cpu" else self.batch_size
        with torch.no_grad(), _one_thread(self.device == "cpu"):
            chunks = [network(images[start : start + size]) for start in range(0, len(images), size)]
            return torch.cat([chunk.float().cpu() for chunk in chunks])


@contextmanager
def _one_thread(enabled: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    if enabled:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
