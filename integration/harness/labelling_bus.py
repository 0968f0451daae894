"""A bus that says it has Containers1 and does not do as it should: `python -m integration.harness.labelling_bus --socket PATH --mode MODE`.

Modes are those of tests.helpers.fake_driver; "dies" ends the process right after AddServer was answered; "old" has the method
names of the first proposal; "rules" takes the named argument Allow, and SetContainerAccess. Prints READY, and then a line of
JSON for each call of its driver that is about instances.
"""

import argparse
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import trio

from broker.bus.values import pack, plain
from broker.wire.errors import CallRefusedError
from broker.wire.header import Header, MessageType, serialise_header
from broker.wire.interfaces import CONTAINERS1
from integration.harness.buses import DAEMON, Bus
from integration.harness.processes import PROJECT, PYTHON, Process, running
from tests.helpers.fake_bus import DRIVER, FakeBus, send
from tests.helpers.fake_driver import FakeDriver

OTHER_INTERFACES: Final = (
    "org.freedesktop.DBus.Introspectable",
    "org.freedesktop.DBus.Properties",
    "org.freedesktop.DBus.Peer",
)


class LabellingBus(FakeBus):
    """A bus of one process; sandboxes' servers are sockets beside its own."""

    def __init__(self, path: Path, mode: str, nursery: trio.Nursery) -> None:
        super().__init__(address=f"unix:path={path}")
        self._path: Final = path
        self._nursery: Final = nursery
        self._dies: Final = mode == "dies"
        self.driver: Final = make_driver(mode)
        self.driver.make_address = self._listen

    def listen(self, path: Path) -> None:
        """Serve whoever connects there, which can be done when this returns."""
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen(16)
        self._nursery.start_soon(self._accept, trio.socket.from_stdlib_socket(listening))

    async def _accept(self, listening: trio.socket.SocketType) -> None:
        with listening:
            while True:
                sock, _ = await listening.accept()
                self._nursery.start_soon(self.serve, sock)

    def _listen(self, instance: str) -> str:
        path = self._path.with_name(f"server-{instance.rpartition('/')[2]}")
        self.listen(path)
        return f"unix:path={path}"

    async def _drive(self, name: str, header: Header, values: list[Any]) -> None:
        if header.interface not in (CONTAINERS1, *OTHER_INTERFACES):
            await super()._drive(name, header, values)
            return
        if header.interface == CONTAINERS1:
            print(json.dumps([header.member, plain(values)], default=repr), flush=True)
        error, signature, result = "", "", list[Any]()
        try:
            answer = self.driver.answer(header.member or "", values)
        except CallRefusedError as exc:
            error, signature, result = exc.dbus_name, "s", [str(exc)]
        else:
            if answer is None:
                return
            signature, result = answer
        await self._reply(name, header, signature, result, error)
        if self._dies and header.member == self.driver.add:
            os._exit(0)

    async def _reply(
        self, name: str, call: Header, signature: str, values: list[Any], error: str
    ) -> None:
        if call.flags & 1 or name not in self.clients:
            return
        body = pack(signature, values) if signature else b""
        header = Header(
            little=True,
            type=MessageType.ERROR if error else MessageType.METHOD_RETURN,
            flags=1,
            body_length=len(body),
            serial=self._next(),
            error_name=error or None,
            reply_serial=call.serial,
            destination=name,
            sender=DRIVER,
            signature=signature,
        )
        await send(self.clients[name], serialise_header(header, sender=True) + body)


def make_driver(mode: str) -> FakeDriver:
    """Return the driver of a mode."""
    if mode == "old":
        return FakeDriver(add="AddContainerServer", stop="RemoveContainerServer", stop_listening="")
    if mode == "rules":
        return FakeDriver(arguments=("Allow",), set_access="SetContainerAccess")
    return FakeDriver(mode=mode)


@contextmanager
def open_labelling_bus(folder: Path, mode: str) -> Iterator[tuple[Bus, Process]]:
    """Run one; what it prints is what it was asked."""
    path = folder / "bus"
    argv = [
        PYTHON,
        "-m",
        "integration.harness.labelling_bus",
        "--socket",
        str(path),
        "--mode",
        mode,
    ]
    env = {"XDG_RUNTIME_DIR": str(folder), "HOME": str(folder), "PYTHONPATH": str(PROJECT)}
    with running(argv, env=env, log=folder / "bus.log") as process:
        process.wait_line("READY")
        yield Bus(kind=DAEMON, address=f"unix:path={path}", pid=process.pid), process


def read_calls(process: Process, last: str) -> list[tuple[str, list[Any]]]:
    """Return the calls about instances up to the next one of that member."""
    calls: list[tuple[str, list[Any]]] = []
    while not calls or calls[-1][0] != last:
        member, values = json.loads(process.read_line())
        calls.append((member, values))
    return calls


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--mode", default="good")
    options = parser.parse_args(argv)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            LabellingBus(options.socket, options.mode, nursery).listen(options.socket)
            print("READY", flush=True)
            await trio.sleep_forever()

    trio.run(run)


if __name__ == "__main__":
    main()
