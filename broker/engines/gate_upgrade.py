"""A new gate in place of the one that serves, without one connection closed: asked for, and seen to its end.

The two gates do it between themselves (broker/gate/handover/channel.py), and the control connection goes with the rest: what
is asked of the old one meanwhile the new one answers. Whatever goes wrong, the old one serves on.
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

# Seconds for each step: so long nobody is served if the new gate hangs.
HAND_OVER_TIMEOUT: Final = 5.0
# And for the answer, should the old one hang: more than 10 000 sandboxes take.
ANSWER_TIMEOUT: Final = 60.0


async def upgrade(link: ControlConnection, process: GateProcess) -> None:
    """Replace the gate. Raises CallRefusedError if the old one serves on, and EngineLostError."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as exc:  # too few descriptors: no reason for us to end
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
            if exc.dbus_name == NOT_SUPPORTED:  # it is nobody's service: we start it
                return 0
            raise
        return answer.pid if isinstance(answer, Started) else 0

    try:
        return await process.start_next(fd, ask)
    except GateError as exc:
        raise CallRefusedError(FAILED, f"the new gate does not take over: {exc}") from exc


async def _ask(link: ControlConnection, fd: int) -> Answer:
    with trio.move_on_after(ANSWER_TIMEOUT):
        return await link.request(HandOver(HAND_OVER_TIMEOUT, PROTOCOL), [fd])
    raise EngineLostError(f"the gate did not answer HandOver in {ANSWER_TIMEOUT:.0f} s")
