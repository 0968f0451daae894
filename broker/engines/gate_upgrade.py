"""Replacing the serving gate by a new gate without closing a connection.

The supervisor starts the new gate, and the two gates do the rest (broker/gate/handover/channel.py):

    supervisor                        old gate                        new gate
    starts the new gate, with
    one end of a socket pair    ----------------------------->
                                                                <-    Offer (the versions it can read)
    HandOver, with the other end ->   stops all other work
                                      state and descriptors     ->    loads them, checks its judgement
                                                                <-    Ready
                                      Go, and exits             ->    serves
                                 <----------------------------        HandedOver, on the same control connection

Requests that come meanwhile wait in the control connection, for answers of the new gate. If any step fails, the
old gate continues to serve.
"""

import socket
from collections.abc import Sequence
from typing import Final

import trio

from broker.control_protocol.messages import (
    PROTOCOL,
    Answer,
    HandedOver,
    HandOver,
    Started,
    StartNext,
)
from broker.engines.base import EngineLostError
from broker.engines.control_connection import ControlConnection
from broker.engines.gate_process import GateError, GateProcess
from broker.wire.errors import FAILED, NOT_SUPPORTED, CallRefusedError

# Seconds for each step. No app is served for so long if the new gate hangs.
HAND_OVER_TIMEOUT: Final = 5.0
# Seconds for the answer, in case the old gate hangs. A hand-over of 10 000 sandboxes takes less.
ANSWER_TIMEOUT: Final = 60.0


async def upgrade(link: ControlConnection, process: GateProcess) -> None:
    """Replace the gate. Raises CallRefusedError if the old gate continues to serve, and EngineLostError."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as exc:  # too few descriptors, which must not end the supervisor
        text = f"the new gate cannot be started: {exc.strerror}"
        raise CallRefusedError(FAILED, text) from exc
    with ours:
        with theirs:
            pid = await _start(link, process, theirs.fileno())
        try:
            answer = await _ask(link, ours.fileno())
        except CallRefusedError:
            process.give_up(pid)
            raise
    if not isinstance(answer, HandedOver):
        raise EngineLostError(f"the gate answered HandOver with {type(answer).__name__}")
    process.replaced(answer.pid)


async def _start(link: ControlConnection, process: GateProcess, fd: int) -> int:
    async def ask(argv: tuple[str, ...], environment: dict[str, str], fds: Sequence[int]) -> int:
        try:
            answer = await link.request(StartNext(argv, environment), fds)
        except CallRefusedError as exc:
            if (
                exc.dbus_name == NOT_SUPPORTED
            ):  # no service of systemd: the supervisor starts the gate
                return 0
            raise
        return answer.pid if isinstance(answer, Started) else 0

    try:
        return await process.start_next(fd, ask)
    except GateError as exc:
        raise CallRefusedError(FAILED, f"the new gate cannot take over: {exc}") from exc


async def _ask(link: ControlConnection, fd: int) -> Answer:
    with trio.move_on_after(ANSWER_TIMEOUT):
        return await link.request(HandOver(HAND_OVER_TIMEOUT, PROTOCOL), [fd])
    raise EngineLostError(f"the gate did not answer HandOver in {ANSWER_TIMEOUT:.0f} s")
