"""People who call the supervisor as fast as they can, in threads, and one who asks for a list meanwhile."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Self

from broker.wire.header import MessageType
from integration.harness.messages import make_header, make_message
from integration.harness.rawclient import RawClient
from integration.harness.supervised import (
    CONTAINERS,
    CONTAINERS_PATH,
    MANAGE,
    MANAGE_PATH,
    NAME,
    TYPE,
    Warden,
    wait_for,
)
from integration.harness.threats import processor_time
from integration.harness.values import Variant

MIB: Final = 1024 * 1024
_SERIAL_AT: Final = 8


def call_bytes(
    path: str, interface: str, member: str, signature: str = "", values: Sequence[Any] = ()
) -> bytes:
    """Return a call to the supervisor, with any serial."""
    header = make_header(
        MessageType.METHOD_CALL,
        1,
        path=path,
        interface=interface,
        member=member,
        destination=NAME,
        signature=signature,
    )
    return make_message(header, values)


def many_variants(size: int = 8 * MIB) -> bytes:
    """Return a call of no method with a body of so many bytes of variants."""
    return call_bytes(
        MANAGE_PATH, MANAGE, "NoSuchMethod", "av", [[Variant("y", 0)] * (size // 4 - 4)]
    )


def list_call() -> bytes:
    return call_bytes(MANAGE_PATH, MANAGE, "List")


def add_server(rules: Sequence[str]) -> bytes:
    """Return a call of AddServer with these rules, as text."""
    named = {"Rules": Variant("a(bs)", [(False, rule) for rule in rules])}
    values: tuple[Any, ...] = (TYPE, "org.example.Flood", {}, named)
    return call_bytes(CONTAINERS_PATH, CONTAINERS, "AddServer", "ssa{sv}a{sv}", values)


def long_bad_list(count: int = 9_999) -> bytes:
    """Return a call of AddServer with as many rules as it may have, the last of which is none."""
    return add_server([f"send:org.example.Name{n}@/a/b/{n}:org.i.M" for n in range(count)] + ["?"])


class Flood:
    """A connection that sends calls in batches without end and reads the answers."""

    def __init__(self, address: str, data: bytes, batch: int = 1) -> None:
        self._client: Final = RawClient.connect(address)
        self._data: Final = bytearray(data * batch)
        self._starts: Final = [n * len(data) for n in range(batch)]
        self._stop: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._run)
        self.answered = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._client.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        serial = 1000
        with contextlib.suppress(OSError, EOFError):
            while not self._stop.is_set():
                for start in self._starts:
                    serial += 1
                    struct.pack_into("<I", self._data, start + _SERIAL_AT, serial)
                self._client.sock.settimeout(60)
                self._client.sock.sendall(self._data)
                for _ in self._starts:
                    self._client.receive(timeout=60)
                    self.answered += 1


@contextmanager
def flooding(warden: Warden, data: bytes, *, callers: int = 3, batch: int = 1) -> Iterator[None]:
    """Flood the supervisor from `callers` connections during the block."""
    with ExitStack() as stack:
        floods = [
            stack.enter_context(Flood(warden.bus.address, data, batch)) for _ in range(callers)
        ]
        wait_for(lambda: all(flood.answered for flood in floods), timeout=60)
        yield


def list_costs(warden: Warden, count: int = 6) -> list[float]:
    """Ask for the list again and again; return how many seconds of its processor the supervisor took until each answer.

    That is the time that a machine with nothing else to do would have it take, whatever this one has to do.
    """
    costs = []
    with RawClient.connect(warden.bus.address) as person:
        for _ in range(count):
            begun = processor_time(warden.process.pid)
            reply = person.call(NAME, MANAGE_PATH, MANAGE, "List", timeout=60)
            assert reply.error is None, reply.values
            costs.append(processor_time(warden.process.pid) - begun)
    return sorted(costs)
