"""Fair times on a machine that does other things, too: contenders take turns, each round is compared in itself."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple

import torch

BUSY = 2.5  # load average from which a result says that it was measured beside other work
_LOAD = os.getloadavg()[0]  # before anything of ours ran


class Taken(NamedTuple):
    """Seconds of one turn: by the wall, and of this process's own processor time, which neighbours disturb less."""

    wall: float
    cpu: float


def seconds(work: Callable[[], object]) -> Taken:
    """Time one call; a GPU's queue is empty before and after."""
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    _wait()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(contenders: Mapping[str, Callable[[], object]], budget: float, at_least: int) -> dict[str, list[Taken]]:
    """All contenders in turn, round after round, after one round that is not timed.

    Args:
        contenders: what is timed, by its name.
        budget: seconds after which no other round begins.
        at_least: rounds that are made however long they take.
    """
    for work in contenders.values():
        work()
    taken: dict[str, list[Taken]] = {name: [] for name in contenders}
    begun, rounds = time.perf_counter(), 0
    while rounds < at_least or time.perf_counter() - begun < budget:
        for name, work in contenders.items():
            taken[name].append(seconds(work))
        rounds += 1
    return taken


def clock(device: torch.device) -> str:
    """Which of the two times a result is taken from: the processor's on a CPU, the wall's where a GPU works."""
    return "cpu" if device.type == "cpu" else "wall"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, and how many values these are of."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": middle, "quartile_1": low, "quartile_3": high, "n": len(values)}


def of(taken: Sequence[Taken], which: str) -> list[float]:
    """One of the two times of each turn."""
    return [getattr(each, which) for each in taken]


def ratios(above: Sequence[Taken], below: Sequence[Taken], which: str) -> dict[str, float]:
    """Spread of above / below, round by round."""
    return spread([a / b for a, b in zip(of(above, which), of(below, which), strict=True)])


def conditions() -> dict[str, object]:
    """The machine's load when the benchmark began."""
    found: dict[str, object] = {"load average before": round(_LOAD, 2)}
    if _LOAD > BUSY:
        found["beside other work"] = f"the load was above {BUSY} before the benchmark began"
    return found


class Shares:
    """Where time goes: the outermost of nested pieces of work is charged.

    Attributes:
        spent: seconds by the name of the piece.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inside = False

    @contextmanager
    def charged(self, name: str) -> Iterator[None]:
        """What runs inside is charged to `name`, unless it lies inside another piece."""
        if self._inside:
            yield
            return
        self._inside = True
        _wait()
        begun = time.perf_counter()
        try:
            yield
        finally:
            _wait()
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begun
            self._inside = False

    def wrapped(self, name: str, function: Callable) -> Callable:
        """The function, charged to `name`."""

        @wraps(function)
        def call(*args, **kwargs):
            with self.charged(name):
                return function(*args, **kwargs)

        return call


@contextmanager
def replaced(owner: object, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """For a while, an attribute that is a function is what `make` makes of it."""
    plain = getattr(owner, name)
    setattr(owner, name, make(plain))
    try:
        yield
    finally:
        setattr(owner, name, plain)
