"""Several machines of one run: the first one runs the pipeline, the others start processes when it asks for them.

The first machine has the address of the rendezvous, the others connect to it. A closed connection tells both sides that
the other machine has ended. Messages are JSON: nothing that comes from the network is unpickled here.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.publishing import files_hash
from dpdmd_pipeline.wording import printable, short

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_TIMEOUT = 900  # seconds in which all machines must have come
_GRACE = 20  # seconds in which they hear that this machine refuses the run
_POLL = 0.5  # seconds
_MAX_BYTES = 100_000  # of a message


class OtherMachineError(ChildProcessError):
    """A process on another machine has failed; the message there tells more."""

    def __str__(self) -> str:
        return (
            "a process on another machine has ended: read the error there, then run the same command on every machine "
            "again; finished work is kept"
        )


class Place(NamedTuple):
    """A machine's place in one job."""

    machine: int  # 0 is the first
    host: str  # of the first machine
    port: int  # there, where the processes of all machines meet


@dataclass(frozen=True)
class Meeting:
    """The machines of one run, as seen by one of them."""

    machine: int  # 0 is the first
    host: str  # of the first machine
    connections: list[Connection]  # to all others; on the others, to the first machine

    def call(self, launch: dict[str, Any]) -> Place:
        """Ask the other machines for their processes of a job; returns the place of the first."""
        with socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
        self._send_all({"launch": launch, "port": port})
        return Place(0, self.host, port)

    def next_call(self) -> tuple[dict[str, Any], Place] | None:
        """Wait for the first machine's next job; None if its run has ended well. Signals interrupt it."""
        while not self.is_over(_POLL):
            pass
        message = _receive(self.connections[0])
        return (message["launch"], Place(self.machine, self.host, message["port"])) if message else None

    def is_over(self, timeout: float = 0) -> bool:
        """True if another machine has ended, or the first one is done with this job."""
        return bool(wait(self.connections, timeout))

    def end(self) -> None:
        """Tell the other machines that the run has ended well."""
        self._send_all({})
        self.leave()

    def leave(self) -> None:
        """Close the connections: the other machines end, with an error if the run has not ended well."""
        for connection in self.connections:
            connection.close()
        meet.cache_clear()

    def _send_all(self, message: dict[str, Any]) -> None:
        for connection in self.connections:
            _send(connection, message)


@cache
def meet(rendezvous: str, machines: int) -> Meeting:
    """Wait for all machines of a run. Signals interrupt it.

    Raises:
        ValueError: if they do not come, or differ in their number or code.
    """
    host, _, port = rendezvous.rpartition(":")
    name = f"launch.rendezvous={rendezvous}"
    facts = {"machines": machines, "code": files_hash(_PACKAGE, _PACKAGE.rglob("*.py"))}
    if listener := _listen(host, int(port), name):
        with listener:
            return Meeting(0, host, _accept_all(listener, facts, name))
    connection = _connect(host, int(port), name, _TIMEOUT)
    if not connection.poll(_TIMEOUT):
        raise ValueError(f"{name}: another program answers there: choose a port that nothing uses")
    theirs = _receive(connection)
    if "refused" in theirs:
        connection.close()
        raise ValueError(f"the first machine refuses this run: {short(printable(str(theirs['refused'])), 2000)}")
    if differing := [fact for fact, value in facts.items() if theirs[fact] != value]:
        connection.close()
        raise ValueError(
            f"{' and '.join(differing)} differ from the first machine's: start the same command and code on every one"
        )
    _send(connection, {})
    log.info("this is machine %d of %d: it helps the first one until that has finished", theirs["number"], machines)
    return Meeting(theirs["number"] - 1, host, [connection])


def refuse(rendezvous: str, machines: int, reason: str) -> None:
    """Tell the machines that come within seconds that this one refuses the run, so that they do not wait for it."""
    host, _, port = rendezvous.rpartition(":")
    log.info("this machine refuses the run: the other machines hear of it, if they come within %d seconds", _GRACE)
    with suppress(OSError, ValueError):
        if not (listener := _listen(host, int(port), "")):  # the first machine then sees a closed connection
            return _connect(host, int(port), "", _GRACE).close()
        with listener:
            listener.settimeout(_GRACE)
            for _ in range(machines - 1):
                connection = _connection(listener.accept()[0])
                _send(connection, {"refused": reason})
                connection.close()


def _listen(host: str, port: int, name: str) -> socket.socket | None:
    """A listening socket; None if the host is another machine, or another process of this one listens already."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
        return socket.create_server(("", port))
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return None
        raise ValueError(f"{name}: {error.strerror}; give host:port of the first machine") from error


def _connect(host: str, port: int, name: str, timeout: float) -> Connection:
    """A connection to the first machine, as soon as that listens."""
    log.info("waiting for the first machine, %s:%d", host, port)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(OSError):
            return _connection(socket.create_connection((host, port), timeout=5))
        time.sleep(_POLL)
    raise ValueError(
        f"{name}: nothing answers there: name the first machine by its own address, and start the same command on "
        f"every machine within {_TIMEOUT // 60} minutes"
    )


def _accept_all(listener: socket.socket, facts: dict[str, Any], name: str) -> list[Connection]:
    """Connections to all other machines, each of which has agreed to the facts."""
    connections: list[Connection] = []
    log.info("this is the first of %d machines: waiting for the others", facts["machines"])
    listener.settimeout(_TIMEOUT)
    try:
        while (number := len(connections) + 2) <= facts["machines"]:
            connections.append(_connection(listener.accept()[0]))
            _send(connections[-1], {**facts, "number": number})
            _receive(connections[-1])
    except TimeoutError as error:
        raise ValueError(
            f"{name}: only {number - 1} of {facts['machines']} machines have come: start the same command on every one "
            f"within {_TIMEOUT // 60} minutes"
        ) from error
    return connections


def _connection(link: socket.socket) -> Connection:
    """Messages over a socket; it closes a minute after the other machine has lost its power or network."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        link.setsockopt(socket.IPPROTO_TCP, option, value)
    return Connection(link.detach())


def _send(connection: Connection, message: dict[str, Any]) -> None:
    try:
        connection.send_bytes(json.dumps(message).encode())
    except OSError as error:
        raise OtherMachineError from error


def _receive(connection: Connection) -> dict[str, Any]:
    try:
        return json.loads(connection.recv_bytes(_MAX_BYTES))
    except (EOFError, OSError) as error:
        raise OtherMachineError from error
