"""The machines of a run meet, hear of every job and of the end, and notice that one of them has gone."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.raising import refuses

from dpdmd_pipeline.training import machines
from dpdmd_pipeline.training.launch import meet_or_help
from dpdmd_pipeline.training.machines import OtherMachineError, Place, meet


@pytest.fixture(autouse=True)
def _no_meeting_of_another_test(monkeypatch):
    monkeypatch.setattr(machines, "meet", meet.__wrapped__)  # a process is on one machine only, here it is on all
    machines.meet.cache_clear = lambda: None


@pytest.fixture
def rendezvous() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def outcomes(*calls) -> list:
    """Results or errors of functions that run at once."""
    with ThreadPoolExecutor(len(calls)) as threads:
        futures = [threads.submit(call) for call in calls]
    return [future.exception() or future.result() for future in futures]


def met(rendezvous: str, count: int = 2) -> list[machines.Meeting]:
    """Meetings of all machines, in their order."""
    return sorted(outcomes(*[lambda: machines.meet(rendezvous, count)] * count), key=lambda one: one.machine)


def test_every_machine_hears_of_each_job_and_of_the_end(rendezvous):
    first, *others = met(rendezvous, 3)
    for number in range(2):
        place = first.call({"processes": number})
        assert place == Place(0, "127.0.0.1", place.port)
        for machine, other in enumerate(others, start=1):
            assert other.next_call() == ({"processes": number}, place._replace(machine=machine))
            assert not other.is_over()
    first.end()
    assert [other.next_call() for other in others] == [None, None]


def test_a_machine_that_has_gone_is_noticed_on_both_sides(rendezvous):
    first, other = met(rendezvous)
    assert not first.is_over() and not other.is_over()
    other.leave()
    assert first.is_over(timeout=5)
    first, other = met(rendezvous)
    first.leave()
    with refuses(OtherMachineError, "every machine"):
        other.next_call()


def test_a_machine_with_other_options_is_refused(rendezvous):
    ours, theirs = outcomes(lambda: machines.meet(rendezvous, 2), lambda: machines.meet(rendezvous, 3))
    kinds = {type(error): str(error) for error in (ours, theirs)}
    assert kinds.keys() == {ValueError, OtherMachineError} and "machines" in kinds[ValueError]


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1"])
def test_a_rendezvous_that_cannot_be_reached_is_refused(monkeypatch, host):
    monkeypatch.setattr(machines, "_TIMEOUT", 0)
    with refuses(ValueError, f"launch.rendezvous={host}:29400"):
        machines.meet(f"{host}:29400", 2)


def test_machines_that_do_not_come_are_counted(monkeypatch, rendezvous):
    monkeypatch.setattr(machines, "_TIMEOUT", 0.1)
    with refuses(ValueError, f"launch.rendezvous={rendezvous}", "1 of 2 machines"):
        machines.meet(rendezvous, 2)


def test_a_machine_that_refuses_the_run_ends_the_others_at_once(rendezvous):
    def outcome(first, other):
        with ThreadPoolExecutor() as threads:
            running = threads.submit(*first)
            time.sleep(0.2)  # it listens
            return running, threads.submit(*other).exception()

    start, meet_two = time.monotonic(), (machines.meet, rendezvous, 2)
    first, error = outcome((machines.refuse, rendezvous, 2, "too large: lower it"), meet_two)
    assert first.exception() is None and isinstance(error, ValueError) and "too large: lower it" in str(error)
    first, error = outcome(meet_two, (machines.refuse, rendezvous, 2, "no GPU"))
    assert error is None and isinstance(first.exception(), OtherMachineError) and time.monotonic() - start < 5


def test_a_machine_that_refuses_the_run_waits_for_nobody_for_long(rendezvous, monkeypatch):
    monkeypatch.setattr(machines, "_GRACE", 0.1)
    for address in (rendezvous, "203.0.113.1:29400", "no.such.host.invalid:1"):
        machines.refuse(address, 2, "too large")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["first", "elsewhere", "helping"])
def test_a_signal_ends_the_wait_for_other_machines_at_once(rendezvous, monkeypatch, number, place):
    if place == "helping":
        first, other = met(rendezvous)
        monkeypatch.setattr("dpdmd_pipeline.training.launch.meet", lambda *_: other)
    address = "203.0.113.1:29400" if place == "elsewhere" else rendezvous
    before = signal.signal(number, signal.default_int_handler)  # as hooks.py does for every run
    start = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            meet_or_help(address, 2) if place == "helping" else machines.meet(address, 2)
    finally:
        signal.signal(number, before)
    assert time.monotonic() - start < 3
    if place == "helping":
        assert first.is_over(timeout=5)  # the first machine stops, too
