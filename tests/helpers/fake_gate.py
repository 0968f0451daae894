"""A gate that serves nobody: it speaks the control protocol and keeps a list of what it was given.

Run as a program it takes the options of the real one, and serves one supervisor after the other until it is told to
shut down. An app called "die" makes it exit without an answer, and "die once" one that is the first there; one called
"brief" ends with the answer. A file called "refuse" beside the socket keeps it from starting.
"""

import argparse
import array
import os
import socket
import stat
import sys
from collections.abc import Sequence

import msgspec

from broker.control_protocol.framing import FrameReader, make_frame
from broker.control_protocol.messages import (
    PROTOCOL,
    AddSandbox,
    Answer,
    CallBus,
    Connected,
    Done,
    Ended,
    Envelope,
    Event,
    Listeners,
    Refused,
    Request,
    SandboxOf,
    SandboxSpec,
    SandboxState,
    SetContainerServer,
    Shutdown,
    Snapshot,
    StopSandbox,
    TakeListeners,
    TakeSnapshot,
    WhoIs,
)
from broker.wire.errors import NOT_CONTAINER, UNKNOWN_METHOD


class FakeGate:
    """What it has. `answer` returns the events that come before the answer, and the answer."""

    def __init__(self, protocol: int = PROTOCOL) -> None:
        self.protocol = protocol
        self.sandboxes: dict[str, SandboxSpec] = {}
        self.asked: list[Request] = []
        self.folder = "."  # of the control socket

    def dies_of(self, app: str) -> bool:
        """Say whether this app is the end. Of a gate that died before us there is a record."""
        died = any("crash" in name for name in os.listdir(self.folder))  # noqa: PTH208
        return app == "die" or (app == "die once" and not died)

    def answer(self, request: Request) -> tuple[list[Event], Answer]:  # noqa: PLR0911 - a table
        self.asked.append(request)
        match request:
            case AddSandbox(spec) if spec.identity.app == "refused":
                return [], Refused(UNKNOWN_METHOD, "not that one")
            case AddSandbox(spec):
                self.sandboxes[spec.id] = spec
                return [Connected(spec.id, "session", ":1.5")], Done()
            case StopSandbox(sandbox):
                if self.sandboxes.pop(sandbox, None) is None:
                    return [], Refused(NOT_CONTAINER, sandbox)
                return [Ended(sandbox, "stopped")], Done()
            case WhoIs(unique_name=name):
                return [], SandboxOf(name if name in self.sandboxes else None)
            case TakeSnapshot():
                return [], self.snapshot()
            case CallBus():
                return [], Refused(UNKNOWN_METHOD, "this bus is no bus")
            case TakeListeners():
                return [], Listeners(())
            case SetContainerServer(sandbox, bus, upstream):
                upstreams = {bus: upstream} if upstream is not None else {}
                spec = msgspec.structs.replace(self.sandboxes[sandbox], container_servers=upstreams)
                self.sandboxes[sandbox] = spec
                return [], Done()
            case _:
                return [], Done()

    def frames(self, request: Request, serial: int) -> bytes:
        """Return all that is sent on a request."""
        events, answer = self.answer(request)
        bodies = [Envelope(serial=0, body=event) for event in events]
        bodies.append(Envelope(serial=serial, body=answer))
        if isinstance(request, AddSandbox) and request.spec.identity.app == "brief":
            del self.sandboxes[request.spec.id]
            bodies.append(Envelope(serial=0, body=Ended(request.spec.id, "close-notify")))
        return b"".join(map(make_frame, bodies))

    def snapshot(self) -> Snapshot:
        states = tuple(
            SandboxState(spec=spec, listening=True, connections=(), opening=0, denied=0)
            for spec in self.sandboxes.values()
        )
        return Snapshot(protocol=self.protocol, pid=os.getpid(), buses=(), sandboxes=states)


def serve(gate: FakeGate, connection: socket.socket) -> bool:
    """Serve one supervisor; return whether to go on."""
    reader = FrameReader()
    size = socket.CMSG_SPACE(64 * array.array("i").itemsize)
    while True:
        data, ancillary, _, _ = connection.recvmsg(65536, size)
        if not data:
            return True
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        for envelope, its_fds in reader.feed(data, fds.tolist()):
            for fd in its_fds:
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    os.write(fd, b"x")  # shows that it is the right one
                os.close(fd)
            request = envelope.body
            assert isinstance(request, Request)
            if isinstance(request, AddSandbox) and gate.dies_of(request.spec.identity.app):
                os._exit(3)
            connection.sendall(gate.frames(request, envelope.serial))
            if isinstance(request, Shutdown):
                return False


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--trace")
    parser.add_argument("--mode", default="good")
    options = parser.parse_args(argv)
    refusal = os.path.join(os.path.dirname(options.control), "refuse")  # noqa: PTH118, PTH120
    if options.mode == "refuse" or os.path.exists(refusal):  # noqa: PTH110
        sys.exit(3)
    gate = FakeGate(PROTOCOL + 1 if options.mode == "old" else PROTOCOL)
    gate.folder = os.path.dirname(options.control)  # noqa: PTH120
    with socket.socket(socket.AF_UNIX) as listening:
        if os.path.exists(options.control):  # noqa: PTH110 - of one that was killed
            os.unlink(options.control)  # noqa: PTH108
        listening.bind(options.control)
        listening.listen(8)
        os.write(options.ready_fd, b"x")
        os.close(options.ready_fd)
        go_on = True
        while go_on:
            connection, _ = listening.accept()
            with connection:
                go_on = serve(gate, connection)
    os.unlink(options.control)  # noqa: PTH108 - nothing more to import than is needed


if __name__ == "__main__":
    main(sys.argv[1:])
