"""A control connection to a gate: requests go out, answers and events come in.

The gate numbers the events that must not be lost (ends and refusals), and repeats unconfirmed ones to the next
supervisor. Each frame to the gate carries the number of the last event that was dealt with:

    gate                                    supervisor
    Ended(c1), number 7               ->    takes the event
    Denied(c2), number 8              ->    takes the event
                                            waits up to CONFIRM_PAUSE for a request to send anyway
    drops 7 and 8 from its journal    <-    any request, or Confirm, with number 8
"""

import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol, Self

import msgspec
import trio

from broker.control_protocol.framing import LOST, FrameReader, make_frame
from broker.control_protocol.messages import (
    Answer,
    Confirm,
    Connected,
    ContainerServerLost,
    Denied,
    Ended,
    Envelope,
    Event,
    Gone,
    Refused,
    Request,
    SandboxState,
    Snapshot,
)
from broker.engines.base import EngineLostError
from broker.posix.descriptors import ANCILLARY_SIZE, close_fds, received_fds, rights
from broker.posix.reserve import SCARCE
from broker.wire.errors import LIMITS_EXCEEDED, CallRefusedError, PeerProtocolError

LOGGER: Final = logging.getLogger(__name__)
_CHUNK: Final = 64 * 1024
# Seconds for one frame to be sent. A gate that reads nothing for so long counts as gone.
SEND_TIMEOUT: Final = 10.0
# Seconds in which events are gathered, to be confirmed together.
CONFIRM_PAUSE: Final = 0.1


class EventSink(Protocol):
    """The receiver of events and snapshots, called in step with the answers."""

    def take_event(self, event: Event) -> None:
        """Take note of an event."""

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """Take note of all that the gate has."""


class ControlConnection:
    """An open connection, for use in a `with`. Dead after `run` has returned."""

    def __init__(self, sock: trio.socket.SocketType, listener: EventSink) -> None:
        self._sock: Final = sock
        self._listener: Final = listener
        self._waiting: Final[dict[int, _PendingRequest]] = {}
        self._serial = 0
        self._sending: Final = trio.Lock()
        self._dead = False
        self._parts: Final[list[SandboxState]] = []  # of an incomplete snapshot
        self.broken = ""  # how the gate broke the protocol, if the connection ended for that
        self._heard = 0  # the number of the last event that the sink took
        self._confirmed = 0
        self._unconfirmed = trio.Event()
        self.ended: Final = trio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Waiting requests fail."""
        self._dead = True
        self._sock.close()
        self.ended.set()
        for waiter in self._waiting.values():
            waiter.done.set()
        self._unconfirmed.set()

    async def request(self, body: Request, fds: Sequence[int] = ()) -> Answer:
        """Send a request and return its answer. Raises CallRefusedError and EngineLostError."""
        answer, given = await self.request_fds(body, fds)
        close_fds(given)
        return answer

    async def request_fds(self, body: Request, fds: Sequence[int] = ()) -> tuple[Answer, list[int]]:
        """Send a request; return its answer and descriptors, which the caller owns. Raises as `request`."""
        waiter = _PendingRequest()
        self._serial += 1
        serial = self._serial
        self._waiting[serial] = waiter
        try:
            await self._send(serial, body, fds)
            await waiter.done.wait()
        except BaseException:
            close_fds(waiter.fds)
            raise
        finally:
            del self._waiting[serial]
        if waiter.answer is None:
            raise EngineLostError("the gate went away")
        if isinstance(waiter.answer, Refused):
            raise CallRefusedError(waiter.answer.error, waiter.answer.text)
        return waiter.answer, waiter.fds

    async def confirm_events(self) -> None:
        """Confirm events that no other request has confirmed, until the gate hangs up."""
        while not self._dead:
            await self._unconfirmed.wait()
            with trio.move_on_after(CONFIRM_PAUSE):
                await self.ended.wait()
            self._unconfirmed = trio.Event()
            if self._confirmed < self._heard and not self._dead:
                with contextlib.suppress(EngineLostError):
                    await self.request(Confirm())

    async def run(self) -> None:
        """Read until the gate hangs up."""
        reader = FrameReader()
        try:
            while True:
                data, ancillary, flags, _ = await self._sock.recvmsg(
                    _CHUNK, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
                )
                given, cut = received_fds(ancillary), bool(flags & socket.MSG_CTRUNC)
                if cut:  # an incomplete set of descriptors is of no use
                    close_fds(given)
                    given = []
                for envelope, fds in reader.feed(data, given, cut=cut):
                    self._take(envelope, fds)
                if not data:
                    break
        except (OSError, trio.ClosedResourceError):
            pass  # the same as end of file
        except PeerProtocolError as exc:
            self.broken = str(exc)
            LOGGER.error("the gate broke the control protocol: %s", exc)  # noqa: TRY400 - no defect of ours
        finally:
            close_fds(reader.take_all_fds())
            self.close()

    def _take(self, envelope: Envelope, fds: list[int]) -> None:
        body = envelope.body
        if isinstance(body, Connected | Gone | Ended | Denied | ContainerServerLost):
            self._listener.take_event(body)
            if envelope.number:
                self._heard = envelope.number
                self._unconfirmed.set()
            return
        waiter = self._waiting.get(envelope.serial)
        if isinstance(body, Snapshot):
            self._parts.extend(body.sandboxes)
            if body.more:
                return
            body = msgspec.structs.replace(body, sandboxes=tuple(self._parts))
            self._parts.clear()
            # Here and not in the requesting task, because the events that follow build on this snapshot.
            self._listener.take_snapshot(body)
        if envelope.fds == LOST:
            body = Refused(LIMITS_EXCEEDED, "the supervisor has no file descriptors left")
        if waiter is not None and isinstance(body, Answer):
            waiter.answer = body
            waiter.fds = fds
            waiter.done.set()
        else:
            close_fds(fds)

    async def _send(self, serial: int, body: Request, fds: Sequence[int]) -> None:
        """Send a whole frame, even if cancelled."""
        # Half a frame would end the connection.
        async with self._sending:
            if self._dead:
                raise EngineLostError("the gate went away")
            with trio.move_on_after(SEND_TIMEOUT, shield=True) as scope:
                self._confirmed = self._heard
                envelope = Envelope(serial=serial, body=body, fds=len(fds), number=self._heard)
                try:
                    await self._send_all(make_frame(envelope), fds)
                except (OSError, trio.ClosedResourceError) as exc:
                    if fds and getattr(exc, "errno", None) in SCARCE:  # nothing was sent
                        text = "too many file descriptors are in flight to the gate: try again"
                        raise CallRefusedError(LIMITS_EXCEEDED, text) from exc
                    self.close()
                    raise EngineLostError("the gate went away") from exc
            if scope.cancelled_caught:
                self.close()
                raise EngineLostError("the gate does not read")

    async def _send_all(self, data: bytes, fds: Sequence[int]) -> None:
        rest = memoryview(data)
        while rest:
            sent = await self._sock.sendmsg([rest], rights(fds))
            fds = ()
            rest = rest[sent:]


class _PendingRequest:
    """A request whose answer has not come yet."""

    __slots__ = ("answer", "done", "fds")

    def __init__(self) -> None:
        self.done: Final = trio.Event()
        self.answer: Answer | None = None
        self.fds: list[int] = []


async def connect(control: Path) -> trio.socket.SocketType | None:
    """Connect to a gate's control socket; return None if no gate listens there."""
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
