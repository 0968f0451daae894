"""The service's connections to buses, opened again after each loss.

Theory of operation. A ReconnectingBus holds a single BusConnection at a time. All state of a connection (name watches,
exported objects) is made anew with each connection, because a restarted bus gives the same unique names to others.
The id of the bus tells whether the bus was restarted or only dropped the connection.

    bus is missing at the start       error
    connection is lost                try again, with pauses that double; sandboxes wait
    lost for `gone_after` seconds     the bus counts as gone for good: `on_gone`, once; the tries continue
    connected again                   `on_back`
"""

import logging
import os
import random
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from broker.bus.connection import BUS_DRIVER, BusConnection, Call, open_bus
from broker.control_protocol.messages import BusSpec
from broker.engines.backoff import ExponentialBackoff
from broker.supervisor.storage.state_file import StateFile
from broker.wire.errors import BrokerError, CallRefusedError
from broker.wire.header import Header


class BusIds:
    """The id of the bus last seen under each name, kept in the state file.

    A different id means that the bus restarted, and that known unique names are invalid.
    """

    def __init__(self, state: StateFile) -> None:
        self._state: Final = state
        self._ids: Final = state.load_bus_ids()

    def meet(self, bus: str, id_: str) -> bool:
        """Record the id of a bus; return whether the id is unchanged.

        True for a bus without an earlier id.
        """
        before = self._ids.get(bus, id_)
        if self._ids.get(bus) != id_:
            self._ids[bus] = id_
            try:
                self._state.put_bus_id(bus, id_)
            except CallRefusedError as exc:
                LOGGER.warning("bus %s: %s", bus, exc)
        return before == id_


LOGGER: Final = logging.getLogger(__name__)
FIRST_PAUSE: Final = 0.1  # seconds; doubles
LONGEST_PAUSE: Final = 5.0
# Seconds of a connection after which the pauses begin anew, because the bus is well.
STEADY_AFTER: Final = 1.0


class StartError(BrokerError):
    """The service cannot start here: a line to the operator, and exit status 1."""


class Answerer(Protocol):
    """An object tree that answers calls."""

    async def serve(self, bus: BusConnection, call: Call) -> None:
        """Carry out and answer a call."""

    def look(self, header: Header) -> None:
        """Refuse a call by the header alone, if possible. Raises CallRefusedError."""


class ReconnectingBus:
    """A bus that is connected to again after a loss.

    Set `on_back` and `on_gone` before `keep_open`.
    """

    def __init__(self, spec: BusSpec, name: str, gone_after: float) -> None:
        self.name: Final = spec.name
        self.on_back: Callable[[BusConnection], Awaitable[None]] = _ignore_back
        self.on_gone: Callable[[], None] = _ignore_gone
        self._address: Final = spec.address
        self._wanted: Final = name  # the name to own on the bus
        self._gone_after: Final = gone_after
        self._backoff: Final = ExponentialBackoff(FIRST_PAUSE, LONGEST_PAUSE, chance=random.random)
        self.id = ""  # of the bus at the last connection
        self._bus: BusConnection | None = None
        self._changed = trio.Event()
        self._gone_at = 0.0
        self.is_gone = False  # for good

    @property
    def bus(self) -> BusConnection | None:
        """The open connection; None while there is none."""
        return self._bus

    async def keep_open(
        self, *, task_status: trio.TaskStatus[BusConnection] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep a connection open until cancelled. Raises StartError if the first try fails."""

        def ready(bus: BusConnection) -> None:
            task_status.started(bus)

        try:
            await self._stay(ready)
        except BrokerError as exc:
            raise StartError(f"bus {self.name}: {exc}") from exc
        while True:
            await self._reconnect()

    async def wait_open(self) -> BusConnection:
        """Wait for an open connection."""
        while self._bus is None:
            await self._changed.wait()
        return self._bus

    async def _stay(self, ready: Callable[[BusConnection], None] | None = None) -> None:
        """Connect, and wait until the bus is lost. Raises BrokerError if connecting fails."""
        opening = open_bus(self._address, runtime_dir=os.environ.get("XDG_RUNTIME_DIR"))
        async with opening as bus:
            if not await bus.request_name(self._wanted):
                raise StartError(f"the name {self._wanted} is already taken by another program")
            (id_,) = await bus.call(BUS_DRIVER, "GetId")
            self.id = str(id_)
            if ready is not None:
                ready(bus)
            else:
                await self.on_back(bus)
                LOGGER.info("bus %s: connected again", self.name)
            self.is_gone = False
            begun = trio.current_time()
            self._set(bus)
            try:
                await bus.lost.wait()
            finally:
                self._set(None)
            self._lost(begun)

    def _lost(self, begun: float) -> None:
        now = trio.current_time()
        self._gone_at = now + self._gone_after
        if now - begun > STEADY_AFTER:
            self._backoff.reset()
        LOGGER.error("bus %s: connection lost: its sandboxes wait until the bus is back", self.name)

    async def _reconnect(self) -> None:
        await self._pause(self._backoff.next())
        try:
            await self._stay()
        except BrokerError as exc:
            LOGGER.info("bus %s: %s", self.name, exc)

    async def _pause(self, seconds: float) -> None:
        LOGGER.info("bus %s: next try in %.2f s", self.name, seconds)
        left = self._gone_at - trio.current_time()
        if self.is_gone or left > seconds:
            await trio.sleep(seconds)
            return
        await trio.sleep(max(0.0, left))
        self.is_gone = True
        LOGGER.error("bus %s: gone for good, after %.0f s", self.name, self._gone_after)
        self.on_gone()
        await trio.sleep(max(0.0, seconds - left))

    def _set(self, bus: BusConnection | None) -> None:
        self._bus = bus
        changed, self._changed = self._changed, trio.Event()
        changed.set()


async def serve_calls(
    line: ReconnectingBus, make_objects: Callable[[BusConnection], Answerer], closing: trio.Event
) -> None:
    """Answer calls on a bus, on each connection after the other, until `closing`."""
    while not closing.is_set():
        bus = await line.wait_open()
        await _serve_connection(bus, make_objects(bus), closing)
        if not closing.is_set():
            await bus.lost.wait()  # the bus is lost, because the calls have ended


async def _serve_connection(bus: BusConnection, objects: Answerer, closing: trio.Event) -> None:
    bus.look_at_call = objects.look

    async def answer(call: Call) -> None:
        with bus.in_its_place(call):
            with call:
                await objects.serve(bus, call)
            await bus.wait_room()

    async with trio.open_nursery() as turns:
        turns.start_soon(bus.calls.give_turns)
        async with trio.open_nursery() as nursery, trio.open_nursery() as accepting:
            accepting.start_soon(_cancel_at, closing, accepting.cancel_scope)
            while (call := await bus.next_call()) is not None:
                nursery.start_soon(answer, call)
            accepting.cancel_scope.cancel()
        turns.cancel_scope.cancel()


async def _cancel_at(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _ignore_back(_bus: BusConnection) -> None:
    await trio.lowlevel.checkpoint()


def _ignore_gone() -> None:
    pass
