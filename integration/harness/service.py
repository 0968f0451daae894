"""A small D-Bus service to call: `python -m integration.harness.service --address A --name org.example.Echo`.

It answers on any path, for any interface, and prints READY when it owns its names. Methods: Echo(s) -> s,
Sender() -> s (who called), Sum(h) -> h (the sum of the bytes of a file, as text, in a pipe), Size(ay) -> u,
Emit() (broadcasts Emitted(s) on the path of the call), EmitTo(s) (the same to one destination), Ask(ssss) -> s
(calls destination, path, interface, member and tells the first value or the error's name), Slow(u) -> s
(answers after that many milliseconds), Fail() (an error), Quit().
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from broker.wire.header import Flag, MessageType
from integration.harness.messages import Message
from integration.harness.processes import PYTHON, Process, running
from integration.harness.rawclient import CallError, RawClient

ECHO: Final = "org.example.Echo"
PATH: Final = "/org/example/Echo"
INTROSPECTION: Final = """<node>
 <interface name="org.example.Echo">
  <method name="Echo"><arg type="s" direction="in"/><arg type="s" direction="out"/></method>
  <method name="Sender"><arg type="s" direction="out"/></method>
  <method name="Sum"><arg type="h" direction="in"/><arg type="h" direction="out"/></method>
  <method name="Size"><arg type="ay" direction="in"/><arg type="u" direction="out"/></method>
  <method name="Emit"/>
  <method name="EmitTo"><arg type="s" direction="in"/></method>
  <method name="Slow"><arg type="u" direction="in"/><arg type="s" direction="out"/></method>
  <method name="Fail"/>
  <method name="Quit"/>
  <signal name="Emitted"><arg type="s"/></signal>
 </interface>
</node>
"""


@contextmanager
def running_service(address: str, *names: str) -> Iterator[Process]:
    """Run the service as a process, for as long as the block; it owns its names at once."""
    argv = [PYTHON, "-m", "integration.harness.service", "--address", address]
    for name in names or (ECHO,):
        argv += ["--name", name]
    with running(argv) as process:
        process.wait_line("READY")
        yield process


class Service:
    """The service on one connection."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._done = False
        self._methods: Final[dict[str, Callable[[Message], None]]] = {
            "Echo": lambda call: self._answer(call, "s", call.values),
            "Sender": lambda call: self._answer(call, "s", (call.header.sender,)),
            "Size": lambda call: self._answer(call, "u", (len(call.values[0]),)),
            "Introspect": lambda call: self._answer(call, "s", (INTROSPECTION,)),
            "Ping": self._answer,
            "Sum": self._sum,
            "Emit": self._emit,
            "EmitTo": self._emit,
            "Ask": self._ask,
            "Slow": self._slow,
            "Fail": self._fail,
            "Quit": self._quit,
        }

    def serve(self) -> None:
        """Answer calls until Quit, or until the bus closes the connection."""
        while not self._done:
            try:
                message = self._client.receive(timeout=3600)
            except (EOFError, ConnectionError):
                return
            if message.header.type == MessageType.METHOD_CALL:
                self._methods.get(message.header.member or "", self._unknown)(message)
            for fd in message.fds:
                os.close(fd)

    def _answer(
        self,
        call: Message,
        signature: str = "",
        values: Sequence[object] = (),
        *,
        fds: Sequence[int] = (),
        error: str | None = None,
    ) -> None:
        if not call.header.flags & Flag.NO_REPLY_EXPECTED:
            self._client.reply(call, signature, values, fds=fds, error=error)

    def _sum(self, call: Message) -> None:
        (index,) = call.values
        total = 0
        while data := os.read(call.fds[index], 65536):
            total += sum(data)
        read_end, write_end = os.pipe()
        os.write(write_end, str(total).encode())
        os.close(write_end)
        self._answer(call, "h", (0,), fds=[read_end])
        os.close(read_end)

    def _emit(self, call: Message) -> None:
        destination = call.values[0] if call.values else None
        interface = call.header.interface or ECHO
        values = (call.header.sender,)
        path = call.header.path or "/"
        self._client.emit(path, interface, "Emitted", "s", values, destination=destination)
        self._answer(call)

    def _ask(self, call: Message) -> None:
        destination, path, interface, member = call.values
        try:
            values = self._client.ask(destination, path, interface, member)
        except CallError as exc:
            values = (exc.name,)
        self._answer(call, "s", (str(values[0]) if values else "",))

    def _slow(self, call: Message) -> None:
        time.sleep(call.values[0] / 1000)
        self._answer(call, "s", ("late",))

    def _fail(self, call: Message) -> None:
        self._answer(call, "s", ("as you wish",), error="org.example.Error.Wished")

    def _unknown(self, call: Message) -> None:
        error = "org.freedesktop.DBus.Error.UnknownMethod"
        self._answer(call, "s", (f"no method {call.header.member}",), error=error)

    def _quit(self, call: Message) -> None:
        self._answer(call)
        self._done = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    starter = os.environ.get("DBUS_STARTER_ADDRESS")
    parser.add_argument("--address", default=starter, required=starter is None)
    parser.add_argument("--name", action="append", default=[])
    args = parser.parse_args()
    with RawClient.connect(args.address) as client:
        for name in args.name:
            if client.request_name(name) != 1:
                print(f"cannot own {name}", file=sys.stderr)
                return 1
        print(f"READY {client.unique_name}", flush=True)
        Service(client).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
