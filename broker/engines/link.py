"""One control connection to a gate: requests out, answers and events in."""

import array
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import trio

from broker.engines.base import EngineLostError, Listener
from broker.gate.control import (
    Answer,
    Connected,
    Denied,
    Ended,
    Envelope,
    FrameReader,
    Gone,
    Refused,
    Request,
    Snapshot,
    make_frame,
)
from broker.wire.errors import CallRefusedError, PeerProtocolError

LOGGER: Final = logging.getLogger(__name__)
_CHUNK: Final = 64 * 1024
# Seconds for one frame to leave: a gate that reads nothing for so long is none.
SEND_TIMEOUT: Final = 10.0


class Link:
    """A connection that is open. Use it in a `with`; it is dead after `run` has returned."""

    def __init__(self, sock: trio.socket.SocketType, listener: Listener) -> None:
        self._sock: Final = sock
        self._listener: Final = listener
        self._waiting: Final[dict[int, _Waiter]] = {}
        self._serial = 0
        self._sending: Final = trio.Lock()
        self._dead = False
        self.ended: Final = trio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. Requests that wait fail."""
        self._dead = True
        self._sock.close()
        self.ended.set()
        for waiter in self._waiting.values():
            waiter.done.set()

    async def request(self, body: Request, fds: Sequence[int] = ()) -> Answer:
        """Return the answer. Raises CallRefusedError if it is Refused, and EngineLostError."""
        waiter = _Waiter()
        self._serial += 1
        serial = self._serial
        self._waiting[serial] = waiter
        try:
            await self._send(Envelope(serial=serial, body=body, fds=len(fds)), fds)
            await waiter.done.wait()
        finally:
            del self._waiting[serial]
        if waiter.answer is None:
            raise EngineLostError("the gate went away")
        if isinstance(waiter.answer, Refused):
            raise CallRefusedError(waiter.answer.error, waiter.answer.text)
        return waiter.answer

    async def run(self) -> None:
        """Read until the gate hangs up."""
        reader = FrameReader()
        try:
            while data := await self._sock.recv(_CHUNK):
                for envelope, _ in reader.feed(data):
                    self._take(envelope)
        except (OSError, trio.ClosedResourceError):
            pass  # as good as its end
        except PeerProtocolError as exc:
            LOGGER.error("the gate broke the control protocol: %s", exc)  # noqa: TRY400 - no defect of ours
        finally:
            self.close()

    def _take(self, envelope: Envelope) -> None:
        body = envelope.body
        if isinstance(body, Connected | Gone | Ended | Denied):
            self._listener.take_event(body)
            return
        waiter = self._waiting.get(envelope.serial)
        if isinstance(body, Snapshot):
            # Here and not in the task that asked: the events that follow are about this one.
            self._listener.take_snapshot(body)
        if waiter is not None and isinstance(body, Answer):
            waiter.answer = body
            waiter.done.set()

    async def _send(self, envelope: Envelope, fds: Sequence[int]) -> None:
        """Send a frame whole, cancelled or not: half of one would end the connection."""
        async with self._sending:
            if self._dead:
                raise EngineLostError("the gate went away")
            with trio.move_on_after(SEND_TIMEOUT, shield=True) as scope:
                try:
                    await self._send_all(make_frame(envelope), fds)
                except (OSError, trio.ClosedResourceError) as exc:
                    self.close()
                    raise EngineLostError("the gate went away") from exc
            if scope.cancelled_caught:
                self.close()
                raise EngineLostError("the gate does not read")

    async def _send_all(self, data: bytes, fds: Sequence[int]) -> None:
        rest = memoryview(data)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while rest:
            sent = await self._sock.sendmsg([rest], ancillary)
            ancillary = []
            rest = rest[sent:]


class _Waiter:
    """Who waits for an answer."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done: Final = trio.Event()
        self.answer: Answer | None = None


async def connect(control: Path) -> trio.socket.SocketType | None:
    """Connect to a gate's control socket; None if nobody listens there."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(os.fspath(control))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock
