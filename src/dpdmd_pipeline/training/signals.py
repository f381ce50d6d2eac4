"""Signals that ask a run to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def recorded_signals() -> Iterator[list[int]]:
    """Record the first Ctrl-C or SIGTERM, so that the run ends between two cycles; the second interrupts at once."""
    signals: list[int] = []

    def record(number: int, _frame: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield signals
        return
    before = {number: signal.signal(number, record) for number in STOP_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
