"""Fair times on a busy machine: contenders alternate in one process, and ratios are taken within a round."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple

import torch

BUSY = 2.5  # load average; a result measured above it says so
UNITS = {"cpu": "of this process's processor time", "wall": "by the wall"}  # "seconds are" in a result
_LOAD = os.getloadavg()[0]  # before the benchmark starts


class Duration(NamedTuple):
    """Seconds by the wall clock, and of this process's own processor time, which other processes disturb less."""

    wall: float
    cpu: float


def measure(work: Callable[[], object]) -> Duration:
    """Time one call; a GPU's queue is empty before and after."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    _synchronize()
    return Duration(time.perf_counter() - wall, time.process_time() - cpu)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    contenders: Mapping[str, Callable[[], object]], budget: float, at_least: int
) -> dict[str, list[Duration]]:
    """Time all contenders in turn, round after round, after one untimed round.

    Args:
        contenders: calls by name.
        budget: seconds after which no further round starts.
        at_least: minimum number of rounds.
    """
    for work in contenders.values():
        work()
    durations: dict[str, list[Duration]] = {name: [] for name in contenders}
    start, rounds = time.perf_counter(), 0
    while rounds < at_least or time.perf_counter() - start < budget:
        for name, work in contenders.items():
            durations[name].append(measure(work))
        rounds += 1
    return durations


def clock(device: torch.device) -> str:
    """The clock to report: processor time on a CPU, wall time where a GPU works."""
    return "cpu" if device.type == "cpu" else "wall"


def seconds(durations: Sequence[Duration], which: str) -> list[float]:
    """Seconds by one of the two clocks, `cpu` or `wall`."""
    return [getattr(duration, which) for duration in durations]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of the values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": middle, "quartile_1": low, "quartile_3": high, "n": len(values)}


def ratios(above: Sequence[Duration], below: Sequence[Duration], which: str) -> dict[str, float]:
    """Spread of above / below, round by round."""
    return spread([a / b for a, b in zip(seconds(above, which), seconds(below, which), strict=True)])


def conditions() -> dict[str, object]:
    """The machine's load when the benchmark started."""
    load: dict[str, object] = {"load average before": round(_LOAD, 2)}
    if _LOAD > BUSY:
        load["beside other work"] = f"the load was above {BUSY} before the benchmark began"
    return load


class Shares:
    """Seconds per kind of work. Nested work is charged to the outermost kind.

    Attributes:
        spent: seconds by kind.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._is_inside = False

    @contextmanager
    def charged(self, kind: str) -> Iterator[None]:
        """Charge the body to `kind`, unless an outer body is being charged."""
        if self._is_inside:
            yield
            return
        self._is_inside = True
        _synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            _synchronize()
            self.spent[kind] = self.spent.get(kind, 0.0) + time.perf_counter() - start
            self._is_inside = False

    def wrapped(self, kind: str, function: Callable) -> Callable:
        """The function, with its time charged to `kind`."""

        @wraps(function)
        def call(*args, **kwargs):
            with self.charged(kind):
                return function(*args, **kwargs)

        return call


@contextmanager
def replaced(owner: object, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace the function `owner.name` by `wrap` of it inside the context."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
