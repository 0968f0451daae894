"""Apps that never stop talking, each in a thread: what comes back is compared byte by byte with what was sent."""

import hashlib
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from integration.harness.messages import Message
from integration.harness.rawclient import RawClient
from integration.harness.service import ECHO, PATH

LARGEST: Final = 1024 * 1024
# Calls on their way at the same time, by one app.
DEPTH: Final = 4


class Talker:
    """One app: it echoes texts of 1 B to 1 MiB, has files summed now and then, and counts."""

    def __init__(self, client: RawClient, seed: int) -> None:
        self.client: Final = client
        self.calls = 0
        self.failure: Exception | None = None
        self._random: Final = random.Random(seed)
        self._stop: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let it take the answers that are still out, and raise what went wrong."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "an answer is missing"
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._round()
        except Exception as exc:  # noqa: BLE001 - `stop` raises it
            self.failure = exc

    def _round(self) -> None:
        asked = [self._ask() for _ in range(DEPTH)]
        for serial, digest in asked:
            reply = self.client.wait_reply(serial, timeout=60)
            assert reply.error is None, (reply.error, reply.values)
            assert _digest(reply) == digest, "what came back is not what was sent"
            self.calls += 1

    def _ask(self) -> tuple[int, str]:
        if self._random.random() < 0.1:
            return self._ask_sum()
        size = int(LARGEST ** self._random.random())
        text = self._random.randbytes(size // 2 + 1).hex()[:size]
        serial = self.client.start_call(ECHO, PATH, ECHO, "Echo", "s", (text,))
        return serial, hashlib.sha256(text.encode()).hexdigest()

    def _ask_sum(self) -> tuple[int, str]:
        data = self._random.randbytes(100)
        read_end, write_end = os.pipe()
        os.write(write_end, data)
        os.close(write_end)
        serial = self.client.start_call(ECHO, PATH, ECHO, "Sum", "h", (0,), fds=[read_end])
        os.close(read_end)
        return serial, str(sum(data))


def _digest(reply: Message) -> str:
    if reply.fds:
        (fd,) = reply.fds
        text = os.read(fd, 100).decode()
        os.close(fd)
        return text
    (text,) = reply.values
    return hashlib.sha256(text.encode()).hexdigest()


class Caller:
    """A host that calls an app, again and again; and the app, which answers. Both count."""

    def __init__(self, host: RawClient, app: RawClient) -> None:
        self.calls = 0
        self._app: Final = app
        self._host: Final = host
        self._threads: Final = [
            threading.Thread(target=self._guarded, args=(run,), daemon=True)
            for run in (self._call, self._answer)
        ]
        self._stop: Final = threading.Event()
        self.failure: Exception | None = None

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a call or an answer is missing"
        if self.failure is not None:
            raise self.failure

    def _guarded(self, run: Any) -> None:
        try:
            run()
        except Exception as exc:  # noqa: BLE001 - `stop` raises it
            self.failure = self.failure or exc

    def _call(self) -> None:
        name = self._app.unique_name
        while not self._stop.is_set():
            text = f"number {self.calls}"
            reply = self._host.call(name, PATH, ECHO, "Echo", "s", (text,), timeout=60)
            assert (reply.error, reply.values) == (None, (text,))
            self.calls += 1
        self._host.call(name, PATH, ECHO, "Quit", timeout=60)

    def _answer(self) -> None:
        while (call := self._app.receive(timeout=60)).header.member != "Quit":
            self._app.reply(call, "s", call.values)
        self._app.reply(call)


class Emitter:
    """A host that sends numbered signals, and an app that is to hear each of them, in order."""

    def __init__(self, host: RawClient, app: RawClient) -> None:
        self.sent = 0
        self.heard: list[int] = []
        self._host: Final = host
        self._app: Final = app
        self._stop: Final = threading.Event()
        self._threads: Final = [
            threading.Thread(target=run, daemon=True) for run in (self._emit, self._hear)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a signal is missing"
        assert self.heard == list(range(self.sent))

    def _emit(self) -> None:
        while not self._stop.wait(0.002):
            self._host.emit(PATH, ECHO, "Tick", "u", (self.sent,))
            self.sent += 1
        self._host.emit(PATH, ECHO, "Last")

    def _hear(self) -> None:
        while (signal := self._app.receive(timeout=60)).header.member != "Last":
            if signal.header.member == "Tick":
                self.heard.append(signal.values[0])


@contextmanager
def under_load(parties: Sequence[Talker | Caller | Emitter]) -> Iterator[None]:
    """Have all of them talk for as long as the block, and check at its end that nothing is amiss."""
    with ExitStack() as stack:
        for party in parties:
            party.start()
            stack.callback(party.stop)
        yield
