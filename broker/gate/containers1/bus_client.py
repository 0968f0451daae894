"""Connections of the gate to buses that have Containers1, for calls by the supervisor.

A bus that has Containers1 ends a server when the connection that requested the server leaves, and
the gate outlives the supervisor. So the supervisor's calls go through connections of the gate. Each
bus and user has a connection, which is made for the first call. No rules apply to these
connections.

The result of a call with `undo` is unclaimed until a sandbox claims the result. If the supervisor
leaves before that, or no longer waits for the answer, the gate undoes the call. So no server is
left without a sandbox, whichever process dies.

    supervisor            gate                                     bus
     | CallBus AddServer -> | -- Hello, AddMatch, AddServer -----> |
     |                      | <-- /c1 and the address ------------ |
     | <-- Called --------- | unclaimed: /c1                       |
     | AddSandbox --------> | claimed: /c1 by the sandbox          |
     |                      |                                      |
     | CallBus AddServer -> | -- AddServer ----------------------> |
     | dies                 | <-- /c2 ---------------------------- |
     |                      | -- StopInstance /c2 ---------------> |
     |                      |                                      |
     |                      | <-- InstanceRemoved /c1 ------------ |
     |                      | -- Ping ---------------------------> |
     |                      | <-- an answer: the server alone ended |
     |                      |     no answer: the bus itself ends    |

The content of the bus's messages is trusted. The bus is not trusted to answer or to read. So calls
have a deadline, and the number of waiting calls is limited.
"""

import logging
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, Protocol

from broker.control_protocol.messages import CallBus, Called, ContainerServer, Refused
from broker.gate.dumps import BusClientCallDump, BusClientDump, Fds
from broker.gate.filter.bus_state import BusState
from broker.gate.io.connect import connect_unix
from broker.gate.io.loop import Loop
from broker.gate.io.stream import SocketStream, StreamClosedError
from broker.posix.descriptors import close_fds
from broker.posix.sockets import stream_socket_from_fd
from broker.wire import errors, marshal
from broker.wire.errors import CallRefusedError, PeerProtocolError
from broker.wire.header import (
    BUS_LIMITS,
    FIXED_SIZE,
    READ_LIMITS,
    Flag,
    Header,
    MessageType,
    measure,
    measure_header,
    parse_header,
)
from broker.wire.interfaces import CONTAINERS1, DRIVER, DRIVER_PATH, PEER
from broker.wire.reader import Reader
from broker.wire.sasl import SaslClient
from broker.wire.skim import skim_fixed, skim_header

LOGGER: Final = logging.getLogger(__name__)
# Seconds. A caller on a bus waits longer than the two calls of AddServer together may take.
CALL_SECONDS: Final = 5.0
# Seconds until a connection without calls and servers is closed. Most buses receive a single call,
# about the supported features.
IDLE_SECONDS: Final = 10.0
# Calls without an answer on one connection, including calls that the supervisor has given up.
MAX_WAITING: Final = 1024
# The most bytes of a reply, and of data that the bus has not read. Longer messages are skipped,
# because any program on the bus may send such a message to the gate.
MAX_BYTES: Final = 16 * 1024 * 1024
_HELLO: Final = 1
_ADD_MATCH: Final = 2
_FIRST_CALL: Final = 3
_LAST_SERIAL: Final = 0xFFFFFFFF
_MATCH: Final = (
    f"type='signal',sender='{DRIVER}',interface='{CONTAINERS1}',member='InstanceRemoved'"
)


class BusClientOwner(Protocol):
    """The part of the gate that these connections use."""

    def answer(self, request_serial: int, answer: Called | Refused) -> None:
        """Answer the supervisor's request with the serial `request_serial`."""

    def instance_removed(self, sandbox: str, bus: str) -> None:
        """Handle the end of a sandbox's server by the bus."""

    def server_lost(self, sandbox: str, bus: str) -> None:
        """Handle the end of a sandbox's server by the end of the connection."""


class BusClient:
    """A connection of the gate to a bus, as one user."""

    def __init__(self, loop: Loop, owner: BusClientOwner, bus: BusState, uid: int) -> None:
        self.bus: Final = bus
        self.uid: Final = uid
        self.claimed: Final[dict[str, str]] = {}  # instance -> sandbox
        self.unclaimed: Final[dict[str, tuple[str, str]]] = {}  # instance -> (interface, undo)
        self.is_closed = False
        self._loop: Final = loop
        self._owner: Final = owner
        self._sasl: Final = SaslClient(uid)
        self._is_greeting = True
        self._stream: SocketStream | None = None
        self._early: list[bytes] = []  # data to send once there is a stream
        self._buffer = bytearray()
        self._skip = 0  # bytes still to come of a message that is skipped
        self._waiting: Final[dict[int, BusClientCallDump]] = {}
        self._next_serial = _FIRST_CALL
        self._greeted = 0  # answers to Hello and AddMatch
        self._may_leave = False  # a timer for the end of an idle connection runs

    @property
    def is_ready(self) -> bool:
        """Return whether Hello and AddMatch were answered.

        Only such a connection is handed over.
        """
        return self._greeted == _ADD_MATCH

    def open(self) -> None:
        """Connect, and call Hello and AddMatch."""
        self._loop.call_later(CALL_SECONDS, self._check_ready)
        self._send(self._sasl.start())
        self._send_call(_HELLO, DRIVER, "Hello")
        body = marshal.make_body("s", (_MATCH,))
        self._send_call(_ADD_MATCH, DRIVER, "AddMatch", "s", body)
        try:
            connect_unix(self._loop, self.bus.address, self.uid, self._connected)
        except (
            OSError,
            LookupError,
        ) as exc:  # no such user, or the gate may not change to the user
            self.close(f"cannot act as user {self.uid}: {exc}")

    def close(self, reason: str) -> None:
        """End the connection.

        Waiting requests are refused, and the servers of the bus are lost.
        """
        if self.is_closed:
            return
        LOGGER.warning("own-connection-lost bus=%s: %s", self.bus.name, reason)
        self.hang_up()
        waiting, claimed = dict(self._waiting), dict(self.claimed)
        self._waiting.clear()
        self.claimed.clear()
        self.unclaimed.clear()
        lost = [*claimed.values(), *(call.removed for call in waiting.values() if call.removed)]
        for call in waiting.values():
            self._refuse(call, errors.DISCONNECTED, f"bus {self.bus.name}: {reason}")
        for sandbox in lost:
            self._owner.server_lost(sandbox, self.bus.name)

    def hang_up(self) -> None:
        """End the connection without telling the owner."""
        self.is_closed = True
        if self._stream is not None:
            self._stream.close()

    # -- calls ------------------------------------------------------------------------------------

    def call(self, request: CallBus, request_serial: int) -> None:
        """Call the bus, and answer the request with the reply. Raises CallRefusedError."""
        if len(self._waiting) >= MAX_WAITING:
            text = f"bus {self.bus.name}: {MAX_WAITING} calls wait for an answer"
            raise CallRefusedError(errors.LIMITS_EXCEEDED, text)
        serial = self._take_serial()
        self._waiting[serial] = BusClientCallDump(
            serial=serial,
            request=request_serial,
            interface=request.interface,
            member=request.member,
            undo=request.undo,
            leave=request.leave,
        )
        self._loop.call_later(CALL_SECONDS, partial(self._check_answered, serial))
        self._send_call(serial, request.interface, request.member, request.signature, request.body)

    def call_no_reply(self, interface: str, member: str, instance: str) -> None:
        """Call a method that ends an instance, without requesting a reply."""
        self.unclaimed.pop(instance, None)
        self.claimed.pop(instance, None)
        self._call_instance(interface, member, instance)
        self._leave_soon()

    def stop_listening(self, member: str, instance: str) -> None:
        """Ask the bus to accept no more connections for an instance."""
        self._call_instance(CONTAINERS1, member, instance)

    def supervisor_lost(self) -> None:
        """Give up all requests, and undo all unclaimed results."""
        for serial, call in self._waiting.items():
            self._waiting[serial] = call.given_up()
        for instance, (interface, undo) in list(self.unclaimed.items()):
            self.call_no_reply(interface, undo, instance)

    def _call_instance(self, interface: str, member: str, instance: str) -> None:
        if not self.is_closed:
            serial = self._take_serial()
            body = marshal.make_body("o", (instance,))
            self._send_call(serial, interface, member, "o", body, mute=True)

    def _check_answered(self, serial: int) -> None:
        call = self._waiting.get(serial)
        if call is not None and call.request:
            # The call stays, because a late reply may bring an instance that has to be undone.
            self._waiting[serial] = call.given_up()
            text = f"bus {self.bus.name} did not answer {call.member} in {CALL_SECONDS:g} s"
            self._refuse(call, errors.NO_REPLY, text)

    def _check_ready(self) -> None:
        if not self.is_ready:
            self.close(f"no answer to Hello in {CALL_SECONDS:g} s")

    def _refuse(self, call: BusClientCallDump, error: str, text: str) -> None:
        if call.request:
            self._owner.answer(call.request, Refused(error, text))

    @property
    def _is_idle(self) -> bool:
        return not (self.claimed or self.unclaimed or self._waiting)

    def _leave_soon(self) -> None:
        if self._is_idle and not self._may_leave:
            self._may_leave = True
            self._loop.call_later(IDLE_SECONDS, self._leave)

    def _leave(self) -> None:
        self._may_leave = False
        if self._is_idle and not self.is_closed:
            self.hang_up()

    def _take_serial(self) -> int:
        serial = self._next_serial
        # The serials of Hello and AddMatch are not reused. Otherwise a later reply could pass for a
        # reply to Hello or AddMatch.
        self._next_serial = serial + 1 if serial < _LAST_SERIAL else _FIRST_CALL
        return serial

    # -- writing ------------------------------------------------------------------------------------

    def _send_call(
        self,
        serial: int,
        interface: str,
        member: str,
        signature: str = "",
        body: bytes = b"",
        *,
        mute: bool = False,
    ) -> None:
        self._send(
            marshal.make_call(
                serial,
                destination=DRIVER,
                path=DRIVER_PATH,
                interface=interface,
                member=member,
                signature=signature,
                body=body,
                flags=int(Flag.NO_REPLY_EXPECTED) if mute else 0,
            )
        )

    def _send(self, data: bytes) -> None:
        if self._stream is None:
            self._early.append(data)
            return
        try:
            self._stream.write([data])
        except StreamClosedError:
            self.close("the bus hung up")
            return
        if self._stream.queued > MAX_BYTES:
            self.close("the bus does not read")

    def _connected(self, sock: socket.socket | None) -> None:
        if self.is_closed:
            if sock is not None:
                sock.close()
            return
        if sock is None:
            self.close("the bus cannot be reached")
            return
        self._stream = SocketStream(self._loop, sock, self._readable, _nothing)
        early, self._early = b"".join(self._early), []
        self._send(early)

    # -- reading ------------------------------------------------------------------------------------

    def _readable(self) -> None:
        assert self._stream is not None
        try:
            data, fds = self._stream.read()
            close_fds(fds)
            self._feed(data)
        except BlockingIOError:
            return
        except StreamClosedError:
            self.close("the bus hung up")
        except (PeerProtocolError, OSError) as exc:
            self.close(str(exc))

    def _feed(self, data: bytes) -> None:
        if self._is_greeting:
            self._sasl.feed(data)
            self._is_greeting = not self._sasl.done
            if self._is_greeting:
                return
            # If the bus has restarted, all knowledge of unique names is discarded.
            self.bus.authenticated(self._sasl.guid)
            data = self._sasl.leftover
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._buffer += data[skipped:]
        while len(self._buffer) >= FIXED_SIZE and not self.is_closed:
            length = measure(self._buffer, 0, BUS_LIMITS)
            if length > MAX_BYTES:
                if not self._skip_message(length):
                    return
                continue
            if len(self._buffer) < length:
                return
            message = bytes(self._buffer[:length])
            del self._buffer[:length]
            try:
                header = parse_header(message, 0, READ_LIMITS)
            except PeerProtocolError as exc:
                self._report_skipped(skim_header(message), str(exc))
            else:
                self._take(header, message)

    def _skip_message(self, length: int) -> bool:
        """Skip a message that is too long. Return False if the header is still incomplete."""
        header_size = measure_header(self._buffer, 0, BUS_LIMITS)
        if header_size > MAX_BYTES:
            header = skim_fixed(self._buffer)
        elif len(self._buffer) < header_size:
            return False
        else:
            header = skim_header(self._buffer)
        self._skip = max(0, length - len(self._buffer))
        del self._buffer[:length]
        self._report_skipped(header, f"a message of {length} bytes")
        return True

    def _report_skipped(self, header: Header, why: str) -> None:
        """Log a skipped message, and refuse the message if it is a call.

        Raises PeerProtocolError for a message of the bus itself.
        """
        if header.sender == DRIVER:
            raise PeerProtocolError(f"the bus sent an unreadable message: {why}")
        LOGGER.warning("left-out bus=%s sender=%s: %s", self.bus.name, header.sender, why)
        if header.type == MessageType.METHOD_CALL:
            self._refuse_call(header)

    def _take(self, header: Header, message: bytes) -> None:
        if header.type == MessageType.METHOD_CALL:
            self._refuse_call(header)
        elif header.sender != DRIVER:
            return
        elif header.type == MessageType.SIGNAL:
            is_removal = header.interface == CONTAINERS1 and header.member == "InstanceRemoved"
            if is_removal and header.signature == "o":
                body = message[header.size :]
                (instance,) = marshal.read_body("o", body, little=header.little)
                self._removed(str(instance))
        elif header.reply_serial in (_HELLO, _ADD_MATCH):
            if header.type == MessageType.ERROR:
                raise PeerProtocolError(f"the bus refused the connection: {header.error_name}")
            self._greeted = max(self._greeted, header.reply_serial)
        elif (call := self._waiting.pop(header.reply_serial or 0, None)) is not None:
            if call.leave and self._is_idle:
                self.hang_up()
            self._take_reply(call, header, message[header.size :])
            self._leave_soon()

    def _take_reply(self, call: BusClientCallDump, header: Header, body: bytes) -> None:
        if call.removed:
            self._owner.instance_removed(call.removed, self.bus.name)
            return
        reader = Reader(body, little=header.little)
        if header.type == MessageType.ERROR:
            text = reader.string() if header.signature.startswith("s") else ""
            self._refuse(call, header.error_name or errors.FAILED, text)
            return
        if call.undo and header.signature.startswith("o"):
            instance = reader.object_path()
            if call.request:
                self.unclaimed[instance] = (call.interface, call.undo)
            else:
                self._call_instance(call.interface, call.undo, instance)
        if call.request:
            answer = Called(signature=header.signature, body=body, little=header.little)
            self._owner.answer(call.request, answer)

    def _removed(self, instance: str) -> None:
        self.unclaimed.pop(instance, None)
        sandbox = self.claimed.pop(instance, None)
        if sandbox is None:
            return
        # A bus that exits also removes all servers, and then hangs up. In that case the sandboxes
        # wait until the bus is back. A Ping tells the two cases apart.
        serial = self._take_serial()
        self._waiting[serial] = BusClientCallDump(
            serial=serial, interface=PEER, member="Ping", removed=sandbox
        )
        self._send_call(serial, PEER, "Ping")

    def _refuse_call(self, header: Header) -> None:
        """Answer a call from another program with an error, because the caller waits."""
        if header.flags & Flag.NO_REPLY_EXPECTED or header.sender is None:
            return
        serial = self._take_serial()
        self._send(
            marshal.make_error(
                serial,
                reply_serial=header.serial,
                name=errors.UNKNOWN_METHOD,
                text="this connection has no methods",
                destination=header.sender,
            )
        )

    # -- handing over ---------------------------------------------------------------------------------

    def dump(self, fds: Fds) -> BusClientDump:
        """Return the state, with descriptors as indexes. The connection must be ready."""
        assert self._stream is not None
        return BusClientDump(
            bus=self.bus.name,
            uid=self.uid,
            stream=self._stream.dump(fds),
            buffer=bytes(self._buffer),
            skip=self._skip,
            next_serial=self._next_serial,
            waiting=tuple(self._waiting.values()),
            claimed=tuple(self.claimed.items()),
            unclaimed=tuple((path, *undo) for path, undo in self.unclaimed.items()),
        )

    def load(self, dump: BusClientDump, fds: Sequence[int]) -> None:
        """Restore the state from `dump`."""
        self._is_greeting, self._greeted = False, _ADD_MATCH
        self._stream = SocketStream(
            self._loop, stream_socket_from_fd(fds[dump.stream.fd]), self._readable, _nothing
        )
        self._stream.load(dump.stream, fds)
        self._buffer += dump.buffer
        self._skip = dump.skip
        self._next_serial = dump.next_serial
        for call in dump.waiting:
            self._waiting[call.serial] = call
            self._loop.call_later(CALL_SECONDS, partial(self._check_answered, call.serial))
        self.claimed.update(dump.claimed)
        self.unclaimed.update({path: (interface, undo) for path, interface, undo in dump.unclaimed})
        self._leave_soon()


def _nothing() -> None:
    pass


class BusClients:
    """The gate's connections to all buses, by bus and user."""

    def __init__(self, loop: Loop, owner: BusClientOwner) -> None:
        self._loop: Final = loop
        self._owner: Final = owner
        self._clients: Final[dict[tuple[str, int], BusClient]] = {}

    def call(self, bus: BusState, request: CallBus, request_serial: int) -> None:
        """Call the bus, and answer the request with the reply. Raises CallRefusedError."""
        client = self._get(bus.name, request.uid)
        if client is None:
            client = BusClient(self._loop, self._owner, bus, request.uid)
            self._clients[bus.name, request.uid] = client
            client.open()
            if client.is_closed:
                text = f"bus {bus.name} cannot be reached"
                raise CallRefusedError(errors.DISCONNECTED, text)
        client.call(request, request_serial)

    def claim(self, sandbox: str, uid: int, servers: Mapping[str, ContainerServer]) -> None:
        """Claim unclaimed servers for a sandbox.

        Raises CallRefusedError if a server has ended.
        """
        for bus, server in servers.items():
            client = self._get(bus, uid)
            if server.instance and (client is None or server.instance not in client.unclaimed):
                text = f"bus {bus} has no instance {server.instance} any more"
                raise CallRefusedError(errors.DISCONNECTED, text)
        for bus, server in servers.items():
            if server.instance and (client := self._get(bus, uid)) is not None:
                del client.unclaimed[server.instance]
                client.claimed[server.instance] = sandbox

    def stop_listening(self, uid: int, servers: Mapping[str, ContainerServer]) -> None:
        """Ask the buses to accept no more connections on these servers."""
        for bus, server in servers.items():
            client = self._get(bus, uid)
            if client is not None and server.instance in client.claimed and server.stop_listening:
                client.stop_listening(server.stop_listening, server.instance)

    def stop(self, uid: int, servers: Mapping[str, ContainerServer]) -> None:
        """Ask the buses to end these servers."""
        for bus, server in servers.items():
            client = self._get(bus, uid)
            if client is not None and server.instance in client.claimed:
                client.call_no_reply(CONTAINERS1, server.stop, server.instance)

    def supervisor_lost(self) -> None:
        """Give up all requests, and undo all unclaimed results."""
        for client in self._clients.values():
            client.supervisor_lost()

    def close(self) -> None:
        """End all connections without events. The buses end the servers."""
        for client in self._clients.values():
            client.hang_up()
        self._clients.clear()

    def dump(self, fds: Fds) -> tuple[BusClientDump, ...]:
        """Return the connections that are ready."""
        return tuple(client.dump(fds) for client in self._clients.values() if client.is_ready)

    def settle(self) -> None:
        """Close connections that are not ready for a hand-over, and so have no servers yet."""
        for client in list(self._clients.values()):
            if not client.is_ready:
                client.close("the gate is being replaced: try again")
        for key in [key for key, client in self._clients.items() if client.is_closed]:
            del self._clients[key]

    def load(
        self, dumps: Sequence[BusClientDump], buses: Mapping[str, BusState], fds: Sequence[int]
    ) -> None:
        """Restore the connections from `dumps`."""
        for dump in dumps:
            client = BusClient(self._loop, self._owner, buses[dump.bus], dump.uid)
            self._clients[dump.bus, dump.uid] = client
            client.load(dump, fds)

    def _get(self, bus: str, uid: int) -> BusClient | None:
        client = self._clients.get((bus, uid))
        return client if client is not None and not client.is_closed else None
