"""Messages of the app without a remembered verdict: judged, cleaned, and passed to the bus. No I/O."""

from collections.abc import Collection
from dataclasses import replace
from typing import Final, Protocol

from broker.gate.dumps import ReplyAction
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial, denial, refusal
from broker.gate.filter.name_owners import NameOwners
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL, InterceptedCall, Replier
from broker.gate.filter.verdict_cache import remember_shape
from broker.gate.filter.visibility import NameVisibility
from broker.gate.output import Chunk
from broker.wire import errors
from broker.wire.errors import PeerProtocolError
from broker.wire.header import Flag, Header, MessageType, serialise_header
from broker.wire.interfaces import DRIVER, INSTANCE_FIELD, INSTANCE_PREFIX
from broker.wire.marshal import read_reply
from policy.match import NO_SEND, Verdict
from policy.rules import Identity

# dbus-daemon takes 16 and ends a connection that sends more (max_message_unix_fds).
MAX_FDS: Final = 16
KNOWN_FLAGS: Final = 7
TO_ITSELF: Final = Verdict(allowed=True, rule=None, reason="a connection may send to itself")


class DriverCalls(Protocol):
    """The app's calls to the bus itself, or without a destination (driver_calls.py)."""

    def call(self, header: Header, data: bytes) -> bool:
        """Take a call. False: the message must wait until the owners are known."""


class AppMessages:
    """The slow path of the app side of a connection."""

    def __init__(
        self,
        state: ConnectionState,
        owners: NameOwners,
        visibility: NameVisibility,
        driver: DriverCalls,
    ) -> None:
        self._state: Final = state
        self._owners: Final = owners
        self._visibility: Final = visibility
        self._driver: Final = driver
        state.reply_handlers["refuse"] = self._refuse_now

    def message(self, header: Header, data: bytes, fds: tuple[int, ...]) -> bool:
        """Judge a whole message. False: the message must wait until the owners are known."""
        state = self._state
        if not state.unique_name and not self._is_hello(header):
            if state.greeting:
                return False
            self._refuse_before_hello(header)
            state.sandbox.close_fds(fds)
            return True
        if header.type == MessageType.METHOD_CALL:
            if header.destination is None or header.destination == DRIVER:
                if not self._driver.call(header, data):
                    return False
                state.sandbox.close_fds(fds)
                return True
            return self._call(header, data, fds)
        if header.type == MessageType.SIGNAL:
            if header.destination is None:
                self._broadcast(header, data, fds)
                return True
            return self._signal(header, data, fds)
        if header.type in (MessageType.METHOD_RETURN, MessageType.ERROR):
            self._reply(header, data, fds)
        else:  # unknown types are ignored, as the specification wants
            state.sandbox.close_fds(fds)
        return True

    # -- before Hello ---------------------------------------------------------------------------

    def _is_hello(self, header: Header) -> bool:
        return (
            header.type == MessageType.METHOD_CALL
            and header.destination == DRIVER
            and header.member == "Hello"
            and header.interface in (None, DRIVER)
        )

    def _refuse_before_hello(self, header: Header) -> None:
        if header.type != MessageType.METHOD_CALL or header.destination not in (None, DRIVER):
            raise PeerProtocolError("sent a message before Hello")
        if not header.flags & Flag.NO_REPLY_EXPECTED:
            self._state.answer_error(
                header.serial,
                errors.ACCESS_DENIED,
                "Client tried to send a message other than Hello without being registered",
            )

    def refuse_too_large(self, header: Header, text: str) -> None:
        """Refuse a message of which only the header is known, and tell the program that waits for it."""
        state = self._state
        key = (header.destination or "", header.reply_serial or 0)
        if header.type == MessageType.METHOD_CALL:
            if not header.flags & Flag.NO_REPLY_EXPECTED:
                state.answer_error(header.serial, errors.LIMITS_EXCEEDED, text)
        elif header.type != MessageType.SIGNAL and key in state.pending.calls_to_app:
            state.pending.calls_to_app.discard(key)
            state.refuse_caller(*key, errors.LIMITS_EXCEEDED, text)

    # -- calls and signals ------------------------------------------------------------------------

    def _call(self, header: Header, data: bytes, fds: tuple[int, ...]) -> bool:
        state = self._state
        replier = self._find_replier(header)
        if replier is None:
            return False
        if self._over_limit(header, fds):
            return True
        names, peer = self._other_end(header, replier)
        verdict = self._judge(header, replier, names, peer)
        if not verdict.allowed:
            state.sandbox.close_fds(fds)
            self._refuse(header, verdict, names, peer)
            return True
        if header.flags & Flag.NO_REPLY_EXPECTED:
            plain = self._emit(header, data, fds, replier)
            if plain:
                state.verdicts.app_mute.remember(
                    data[12 : header.size], True, *_names(header, replier)
                )
            return True
        plain = self._emit(header, data, fds, replier)
        if header.serial < FIRST_GATE_SERIAL:
            state.pending.calls_to_bus[header.serial] = replier
        if plain:
            state.verdicts.app_calls.remember(
                data[12 : header.size], replier, *_names(header, replier)
            )
        return True

    def _over_limit(self, header: Header, fds: tuple[int, ...]) -> bool:
        state = self._state
        mute = bool(header.flags & Flag.NO_REPLY_EXPECTED)
        if len(fds) > MAX_FDS:
            problem = (errors.LIMITS_EXCEEDED, f"{len(fds)} file descriptors, {MAX_FDS} at most")
        elif not mute and state.pending.awaits_reply(header.serial):
            problem = (errors.ACCESS_DENIED, f"a call with serial {header.serial} already waits")
        elif not mute and len(state.pending.calls_to_bus) >= state.sandbox.limits.pending_calls:
            problem = (
                errors.LIMITS_EXCEEDED,
                f"pending_calls={state.sandbox.limits.pending_calls} wait for a reply already",
            )
        else:
            return False
        state.sandbox.close_fds(fds)
        if header.type == MessageType.METHOD_CALL and not mute:
            state.answer_error(header.serial, *problem)
        return True

    def _signal(self, header: Header, data: bytes, fds: tuple[int, ...]) -> bool:
        state = self._state
        if header.destination == DRIVER:  # e.g. a forged ActivationFailure
            state.sandbox.close_fds(fds)
            verdict = Verdict(allowed=False, rule=None, reason="the bus takes no signals")
            state.sandbox.denied(state, denial("send", header, DRIVER, verdict))
            return True
        replier = self._find_replier(header)
        if replier is None:
            return False
        names, peer = self._other_end(header, replier)
        verdict = self._judge(header, replier, names, peer)
        if verdict.allowed and len(fds) <= MAX_FDS:
            if self._emit(header, data, fds, replier):
                state.verdicts.app_signals.remember(
                    data[12 : header.size], True, *_names(header, replier)
                )
        else:
            state.sandbox.close_fds(fds)
            state.sandbox.denied(state, denial("send", header, header.destination or "", verdict))
        return True

    def _broadcast(self, header: Header, data: bytes, fds: tuple[int, ...]) -> None:
        state = self._state
        verdict = state.judge.broadcast(header.path, header.interface, header.member)
        if verdict.allowed and len(fds) <= MAX_FDS:
            if self._emit(header, data, fds, None):
                state.verdicts.app_signals.remember(data[12 : header.size], True)
        else:
            state.sandbox.close_fds(fds)
            state.sandbox.denied(state, denial("send", header, "", verdict))

    def _find_replier(self, header: Header) -> Replier | None:
        """Return the receiver of a message; None if the bus has to be asked first."""
        name = header.destination or ""
        if name[:1] == ":":
            # The names that it owns must be known first, because one of them may be denied.
            return None if self._owners.waiting else Replier(name)
        replier = self._owners.names.get(name)
        if replier is None:
            if not self._state.judge.any_send and self._visibility.knows_enough(name):
                return Replier("", name)
            self._owners.look_up(name)
            return None
        self._owners.touch(name)
        return None if self._owners.waiting else replier

    def _other_end(self, header: Header, replier: Replier) -> tuple[set[str], Identity | None]:
        state = self._state
        name = header.destination or ""
        names = {name}
        if replier.owner and (replier.owner == name or not state.bus.judges_names_alone):
            names |= self._owners.names_of(replier.owner)
        return names, state.bus.peer(replier.owner)

    def _judge(
        self, header: Header, replier: Replier, names: Collection[str], peer: Identity | None
    ) -> Verdict:
        state = self._state
        verdict = state.judge.send(names, header.path, header.interface, header.member, peer)
        # A list that lets the app's own connections in has no reason to keep one from itself.
        is_open = state.judge.access.receive_from_host
        if verdict is NO_SEND and is_open and replier.owner == state.unique_name:
            return TO_ITSELF
        return verdict

    def _refuse(
        self, header: Header, verdict: Verdict, names: Collection[str], peer: Identity | None
    ) -> None:
        state = self._state
        name = header.destination or ""
        state.sandbox.denied(state, denial("send", header, name, verdict))
        if header.flags & Flag.NO_REPLY_EXPECTED:
            return
        seen = state.judge.see(names, peer).allowed
        question = "unique" if name[:1] == ":" else "call"
        if header.flags & Flag.NO_AUTO_START:
            question += "-no-start"
        text = refusal(header, name, verdict)
        if name in state.callers and not seen:
            # The app may see a caller as long as it is connected, and the gate is not told of its end.
            action = ReplyAction("refuse", (header.serial, name, question, text))
            state.call_driver("NameHasOwner", "s", (name,), action)
            return
        self._say_why(
            header.serial, name, question, text if seen or self._visibility.sees(name) else ""
        )

    def _refuse_now(
        self, action: ReplyAction, reply: Header, data: bytes, _fds: tuple[int, ...]
    ) -> None:
        serial, name, question, text = action.values
        assert isinstance(serial, int)
        callers = self._state.callers
        if reply.signature == "b" and not read_reply(reply, data, "b")[0]:
            callers.pop(str(name), None)
        self._say_why(serial, str(name), str(question), str(text) if name in callers else "")

    def _say_why(self, serial: int, name: str, question: str, text: str) -> None:
        """Refuse a call with a reason, or without one as if the name did not exist."""
        state = self._state
        if text:
            state.answer_error(serial, errors.ACCESS_DENIED, text)
        else:
            state.answer_error(serial, *state.bus.absent_name_error(question, name))

    # -- replies ----------------------------------------------------------------------------------

    def _reply(self, header: Header, data: bytes, fds: tuple[int, ...]) -> None:
        state = self._state
        key = (header.destination or "", header.reply_serial or 0)
        if key not in state.pending.calls_to_app or len(fds) > MAX_FDS:
            state.sandbox.close_fds(fds)
            if header.destination not in (None, DRIVER):
                state.sandbox.denied(
                    state,
                    Denial("send", "reply", key[0], "", "", "", "no call waits for it", ""),
                )
            return
        state.pending.calls_to_app.discard(key)
        if self._emit(header, data, fds, Replier(key[0])):
            remember_shape(
                state.verdicts.app_replies, state.verdicts.app_reply_at, header, data, key[0]
            )

    # -- onto the bus -------------------------------------------------------------------------------

    def _emit(
        self, header: Header, data: bytes, fds: tuple[int, ...], replier: Replier | None
    ) -> bool:
        """Pass a message on, cleaned; return True if it was unchanged and may be remembered."""
        state = self._state
        clean, untouched = cleaned(state, header, data, replier)
        if fds:
            state.to_bus.append(Chunk(clean, fds))
            return False
        state.to_bus.append(clean)
        return untouched and header.little


def _names(header: Header, replier: Replier) -> tuple[str, str]:
    """Return the names that a verdict rests on: the destination, and its owner with all that it owns."""
    return header.destination or "", replier.owner


def cleaned(
    state: ConnectionState, header: Header, data: bytes, replier: Replier | None
) -> tuple[bytes, bool]:
    """Return the message as the bus may have it, and whether it is unchanged.

    Fields that the app may not set are left out. A serial of the gate's own range is translated (pending_calls.py).
    """
    extra = {}
    if _may_reach_who_wants_tags(state, header, replier):
        extra[INSTANCE_FIELD] = ("o", INSTANCE_PREFIX + state.sandbox.id)
    dirty = (
        header.has_unknown
        or header.has_misplaced  # a path in a reply, for example
        or header.sender is not None
        or header.flags & ~KNOWN_FLAGS
    )
    serial = header.serial
    if serial >= FIRST_GATE_SERIAL:
        serial = state.pending.next_gate_serial()
        if header.type == MessageType.METHOD_CALL and not header.flags & Flag.NO_REPLY_EXPECTED:
            state.pending.calls_to_bus[serial] = InterceptedCall(
                state.pending.translated(header.serial), replier
            )
    elif not dirty and not extra:
        return data, True
    new = serialise_header(replace(header, serial=serial), extra=extra)
    return new + data[header.size :], False


def _may_reach_who_wants_tags(
    state: ConnectionState, header: Header, replier: Replier | None
) -> bool:
    """Return whether a receiver of the message may have asked for header field 10.

    Only a unique name tells the receiver. A well-known name may have another owner when the bus delivers the message. A
    name without an owner may be a service's that is being started, which may ask before it reads the message.
    """
    name = header.destination
    if not state.bus.gives_instance_field:
        return False
    if name is not None and name[:1] == ":":
        return name in state.bus.wants_instance_field
    return bool(state.bus.wants_instance_field) or (replier is not None and not replier.owner)
