"""Verdicts of the fuzz: an input is accepted, or refused in one line by an error of this project, in 10 s of work."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from hypothesis import HealthCheck, Phase, settings

from dpdmd_pipeline.planning.messages import error_line

SECONDS = 10  # for one input
LONGEST = 1000  # characters of a refusal, without those of the folder of the test
COUNTS: Counter[str] = Counter()  # inputs by kind and verdict; tests/conftest.py shows them

# Open faults by kind and damage, with the reason. Remove an entry with its fault: a test fails for each that is mended.
KNOWN: dict[tuple[str, str], str] = {}


def seeded(max_examples: int) -> settings:
    """The same inputs in every run, on machines of any speed."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # the other phases trace every line
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def refusal(kind: str, read: Callable[[], Any], declared: type[Exception] | None = None) -> str:
    """The line that refuses an input; empty if it is accepted. Any other outcome fails the test.

    Args:
        declared: an error that is a refusal, beside those that end a run in one line.
    """
    try:
        with _time_limit():
            read()
    except click.ClickException as error:
        line = error.message
    except Exception as error:
        line = str(error) if declared and isinstance(error, declared) else error_line(error)
        if line is None:
            raise
    else:
        COUNTS[f"{kind}: accepted"] += 1
        return ""
    COUNTS[f"{kind}: refused"] += 1
    assert line and "\n" not in line and len(line) <= LONGEST, f"{len(line)} characters: {line[:LONGEST]!r}"
    return line


@contextmanager
def tolerant(kind: str, damage: str) -> Iterator[None]:
    """Let a fault of KNOWN pass."""
    try:
        yield
    except Exception:
        if (kind, damage) not in KNOWN:
            raise
        COUNTS[f"{kind}: known"] += 1


class TooSlowError(BaseException):
    """An input took more than its time; no reader catches this."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """Stop after SECONDS of work, or after some more of waiting: a busy machine is slow, and a pipe waits for ever."""

    def stop(*_: Any) -> None:
        raise TooSlowError(f"more than {SECONDS} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 6 * SECONDS)}
    handlers = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
