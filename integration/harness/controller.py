"""A controller for dbus-broker, so that it runs without systemd: `python -m integration.harness.controller`.

It starts dbus-broker with one listening socket and a policy that allows everything, prints
`READY <pid of the broker>`, and starts a service's command when the broker asks for it. On SIGTERM it
closes the broker's controller socket, upon which the broker ends, and waits for that.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Final

from broker.wire.header import FIXED_SIZE, Header, MessageType, measure, parse_header
from integration.harness.messages import make_header, make_message
from integration.harness.values import Variant, decode

_PATH: Final = "/org/bus1/DBus/Broker"
_LISTENER: Final = "/org/bus1/DBus/Listener/0"
_NAMES: Final = "/org/bus1/DBus/Name"
_ANY_UID: Final = 2**32 - 1
_SEND: Final = "a(btssssuutt)"
_BATCH: Final = f"bta(btbs){_SEND}{_SEND}"
_POLICY_TYPE: Final = f"(a(u({_BATCH}))a(buu({_BATCH}))a(ss)bs)"
_ALLOW: Final = (True, 1, "", "", "", "", 0, 0, 0, 2**64 - 1)
_BATCHES: Final = [(_ANY_UID, (True, 1, [(True, 1, True, "")], [_ALLOW], [_ALLOW]))]
ALLOW_EVERYTHING: Final = Variant(_POLICY_TYPE, (_BATCHES, [], [], False, "session"))


class Controller:
    """The controlling end of one broker."""

    def __init__(self, path: Path, services: dict[str, list[str]]) -> None:
        self._address = f"unix:path={path}"
        self._services = services
        self._serial = 0
        self._children: list[subprocess.Popen[bytes]] = []
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._broker = _start_broker(theirs)
        self._authenticate()
        self._add_listener(path)
        for index, name in enumerate(services):
            self._call("AddName", "osu", f"{_NAMES}/{index}", name, os.getuid())

    @property
    def pid(self) -> int:
        return self._broker.pid

    def serve(self) -> None:
        """Start services when asked, until the broker ends."""
        while (item := self._read()) is not None:
            self._handle(*item)

    def close(self) -> None:
        """End the broker and the services, and wait for them."""
        self._sock.close()
        for child in self._children:
            child.terminate()
        for child in (*self._children, self._broker):
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _handle(self, header: Header, body: bytes) -> None:
        if header.type == MessageType.SIGNAL and header.member == "Activate":
            index = int((header.path or "").rpartition("/")[2])
            argv = list(self._services.values())[index]
            env = os.environ | {"DBUS_STARTER_ADDRESS": self._address}
            try:
                self._children.append(subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL))
            except OSError as exc:
                print(f"{argv[0]}: {exc.strerror}", file=sys.stderr)
        elif header.type == MessageType.ERROR:
            print(header.error_name, decode(header.signature or "", body), file=sys.stderr)

    def _authenticate(self) -> None:
        self._sock.sendall(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
        # Three lines: DATA, OK, AGREE_UNIX_FD. Byte by byte, so as not to eat what follows.
        lines = b""
        while lines.count(b"\r\n") < 3:
            lines += self._receive_exactly(1)

    def _add_listener(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(128)
            # A blocking one hangs the broker.
            listener.setblocking(False)
            self._call("AddListener", "ohv", _LISTENER, 0, ALLOW_EVERYTHING, fd=listener.fileno())

    def _call(self, member: str, signature: str, *values: Any, fd: int | None = None) -> None:
        self._serial += 1
        header = make_header(
            MessageType.METHOD_CALL,
            self._serial,
            path=_PATH,
            interface="org.bus1.DBus.Broker",
            member=member,
            signature=signature,
            unix_fds=0 if fd is None else 1,
        )
        data = make_message(header, values)
        socket.send_fds(self._sock, [data], [] if fd is None else [fd])
        while (item := self._read()) is not None:
            reply, body = item
            if reply.reply_serial != self._serial:
                self._handle(reply, body)
            elif reply.type == MessageType.ERROR:
                raise SystemExit(f"{member}: {reply.error_name}: {body!r}")
            else:
                return
        raise SystemExit("dbus-broker ended")

    def _read(self) -> tuple[Header, bytes] | None:
        try:
            fixed = self._receive_exactly(FIXED_SIZE)
            data = fixed + self._receive_exactly(measure(fixed) - FIXED_SIZE)
        except EOFError:
            return None
        header = parse_header(data)
        return header, data[header.size :]

    def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


def _start_broker(controller: socket.socket) -> subprocess.Popen[bytes]:
    fd = controller.fileno()
    machine_id = uuid.uuid4().hex
    argv = ["dbus-broker", "--controller", str(fd), "--machine-id", machine_id]
    argv += ["--max-bytes", "536870912", "--max-fds", "4096", "--max-matches", "131072"]
    return subprocess.Popen(argv, pass_fds=[fd], stdin=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--service", action="append", default=[], metavar="NAME=COMMAND")
    args = parser.parse_args()
    pairs = (text.partition("=") for text in args.service)
    controller = Controller(args.socket, {name: shlex.split(command) for name, _, command in pairs})
    signal.signal(signal.SIGTERM, _exit)
    try:
        print(f"READY {controller.pid}", flush=True)
        controller.serve()
    finally:
        controller.close()
    return 0


def _exit(*_: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
