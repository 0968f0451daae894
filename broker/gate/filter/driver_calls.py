"""Calls of an app to the bus itself (org.freedesktop.DBus), or without a destination. No I/O.

An allow-list: a call in none of the tables here needs a rule, and a few calls are refused by any rules.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, NoReturn

from broker.gate.dumps import ReplyAction
from broker.gate.filter.chores import NAME_WORK, STEP_WORK, Work
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.filter.name_owners import NameOwners
from broker.gate.filter.pending_calls import BUS_DRIVER, FIRST_GATE_SERIAL, InterceptedCall, Replier
from broker.gate.filter.visibility import NameVisibility
from broker.wire import errors, marshal
from broker.wire.errors import CallRefusedError, PeerProtocolError, PeerQuotaError
from broker.wire.header import Flag, Header, MessageType, parse_header, serialise_header
from broker.wire.interfaces import DRIVER, DRIVER_PATH, PEER, PROPERTIES
from broker.wire.marshal import Value, read_reply
from broker.wire.matchrule import MatchRule, parse_match_rule
from broker.wire.names import is_bus_name, is_well_known_name
from broker.wire.reader import Reader, skip_value
from policy.bus_calls import LOOK_UPS, NEVER, NEVER_INTERFACES, judge_bus_call
from policy.match import Verdict
from policy.tables import MAX_PATH

_PROPERTIES: Final = "a{sv}"
_HANDLE: Final = "h"  # the type of a descriptor


def arguments(call: Header, data: bytes, signature: str) -> tuple[Value, ...]:
    """Return the arguments of a call. Raises CallRefusedError if they are of other types."""
    if call.signature != signature:
        raise CallRefusedError(
            errors.INVALID_ARGS, f"{call.member} takes ({signature}), not ({call.signature})"
        )
    return marshal.read_body(signature, data[call.size :], little=call.little)


def bus_name(call: Header, data: bytes) -> str:
    """Return the bus name that is the argument of a call. Raises CallRefusedError if it is no name."""
    name = str(arguments(call, data, "s")[0])
    if not is_bus_name(name):
        raise CallRefusedError(errors.INVALID_ARGS, f"not a bus name: {name[:40]!r}")
    return name


def without_descriptors(data: bytes) -> bytes:
    """Return a reply of type `a{sv}` without its descriptors and the entries that refer to them.

    The caller closes the descriptors. Raises PeerProtocolError if the reply is of another type.
    """
    reply = parse_header(data)
    if reply.signature != _PROPERTIES:
        raise PeerProtocolError(f"the bus answered ({reply.signature}) instead of ({_PROPERTIES})")
    body = data[reply.size :]
    reader = Reader(body, little=reply.little)
    end = reader.array_end("{")
    kept = bytearray()
    while reader.at < end:
        reader.align(8)
        start = reader.at
        reader.string()
        kind = reader.variant_type()
        skip_value(reader, kind)
        if _HANDLE not in kind:
            # An entry begins at a multiple of eight, so its bytes are the same at any other multiple.
            kept += bytes(-len(kept) % 8) + body[start : reader.at]
    reader.finish()
    order: Literal["little", "big"] = "little" if reply.little else "big"
    new = len(kept).to_bytes(4, order) + bytes(4) + kept
    header = replace(reply, unix_fds=0, body_length=len(new))
    return serialise_header(header, sender=True) + new


# The flags of RequestName in the specification.
REQUEST_NAME_FLAGS: Final = 7
# Replies to RequestName: the app owns the name, waits in its queue, or owned it already.
HAS_NAME: Final = (1, 2, 4)


class BusDriverCalls:
    """The calls of an app to the bus."""

    def __init__(
        self, state: ConnectionState, owners: NameOwners, visibility: NameVisibility
    ) -> None:
        self._state: Final = state
        self._owners: Final = owners
        self._visibility: Final = visibility
        state.reply_handlers["hello"] = self._greeted
        state.reply_handlers["add-match"] = self._added_match
        state.reply_handlers["list"] = self._listed
        state.reply_handlers["credentials"] = self._told_credentials
        state.reply_handlers["request-name"] = self._requested_name

    def call(self, header: Header, data: bytes) -> bool:
        """Forward, answer or refuse a call. False: the message must wait until the owners are known."""
        state = self._state
        wants_reply = not header.flags & Flag.NO_REPLY_EXPECTED
        if wants_reply and state.pending.awaits_reply(header.serial):
            text = f"a call with serial {header.serial} already waits"
            state.answer_error(header.serial, errors.ACCESS_DENIED, text)
            return True
        if wants_reply and len(state.pending.calls_to_bus) >= state.sandbox.limits.pending_calls:
            text = f"pending_calls={state.sandbox.limits.pending_calls} wait for a reply already"
            state.answer_error(header.serial, errors.LIMITS_EXCEEDED, text)
            return True
        try:
            return self._dispatch(header, data)
        except CallRefusedError as exc:
            if wants_reply:
                state.answer_error(header.serial, exc.dbus_name, str(exc))
            return True

    def _dispatch(self, header: Header, data: bytes) -> bool:
        member = header.member or ""
        if header.destination is None:
            return self._nobody(header, data)
        # Nothing reaches the bus that `explain` would call denied: both ask the same function.
        verdict = judge_bus_call(self._state.judge, header.path, header.interface, header.member)
        if not verdict.allowed:
            self._refuse(header, verdict)
        method = self._METHODS.get(member) if header.interface in (None, DRIVER) else None
        if method is not None:
            return method(self, header, data)
        if header.interface in (None, PROPERTIES) and member in ("Get", "GetAll", "Set"):
            body = data[header.size :]
            if any(name.encode() in body for name in NEVER_INTERFACES):
                self._refuse(header, NEVER)
        return self._pass(header, data)

    def _nobody(self, header: Header, data: bytes) -> bool:
        """Handle a call without a destination. Buses answer org.freedesktop.DBus.Peer alone there."""
        if header.interface in (None, PEER):
            if header.member == "Ping":
                return self._pass(header, data)
            if header.member == "GetMachineId":
                verdict = judge_bus_call(
                    self._state.judge, header.path, header.interface, header.member
                )
                if not verdict.allowed:
                    self._refuse(header, verdict)
                return self._pass(header, data)
        raise CallRefusedError(
            errors.UNKNOWN_METHOD,
            f"{header.interface}.{header.member} is not understood without a destination",
        )

    def _refuse(self, header: Header, verdict: Verdict) -> NoReturn:
        origin = verdict.rule.origin if verdict.rule is not None else ""
        self._report(header, verdict.reason, origin=origin)
        called = f"{header.interface}.{header.member}" if header.interface else header.member
        raise CallRefusedError(
            errors.ACCESS_DENIED, f"This sandbox may not call {called} of the bus: {verdict.reason}"
        )

    def _report(
        self,
        header: Header,
        reason: str,
        *,
        direction: str = "send",
        name: str = DRIVER,
        origin: str = "",
    ) -> None:
        denial = Denial(
            direction,
            "call",
            name,
            (header.path or "")[:MAX_PATH],
            header.interface or "",
            header.member or "",
            reason,
            origin,
        )
        self._state.sandbox.denied(self._state, denial)

    # -- passing on --------------------------------------------------------------------------------

    def _pass(self, header: Header, data: bytes) -> bool:
        """Forward a call with its body unchanged."""
        return self._send(header, data[header.size :], None)

    def _call(
        self,
        header: Header,
        signature: str,
        values: Sequence[Value],
        action: ReplyAction | None = None,
    ) -> bool:
        """Forward a call with these arguments instead; `action` is for the reply."""
        body = marshal.make_body(signature, values)
        made = replace(header, little=True, signature=signature, body_length=len(body))
        return self._send(made, body, action)

    def _send(self, header: Header, body: bytes, action: ReplyAction | None) -> bool:
        state = self._state
        serial = header.serial
        wants_reply = not header.flags & Flag.NO_REPLY_EXPECTED
        # dbus-daemon also replies to calls that want no reply, and sends errors about messages that it cannot pass on. So
        # after Hello a reply to a serial of the app's may be about any message that had the serial.
        is_safe = not state.unique_name or (action is None and wants_reply)
        if serial >= FIRST_GATE_SERIAL or not is_safe:
            serial = state.pending.next_gate_serial()
            if wants_reply:
                action = state.pending.translated(header.serial, action)
        made = replace(header, serial=serial, unix_fds=0)
        state.to_bus.append(serialise_header(made) + body)
        if wants_reply:
            state.pending.calls_to_bus[serial] = (
                BUS_DRIVER if action is None else InterceptedCall(action)
            )
        return True

    # -- Hello --------------------------------------------------------------------------------------

    def _hello(self, header: Header, _data: bytes) -> bool:
        state = self._state
        if state.unique_name or state.greeting:
            raise CallRefusedError(errors.FAILED, "Already handled an Hello message")
        if header.flags & Flag.NO_REPLY_EXPECTED:
            raise PeerProtocolError("a Hello that wants no reply")
        state.greeting = True
        return self._call(header, "", (), ReplyAction("hello"))

    def _greeted(
        self, _action: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        state = self._state
        if reply.type != MessageType.METHOD_RETURN:
            raise PeerQuotaError(f"the bus refused Hello: {reply.error_name}")
        state.unique_name = str(read_reply(reply, data, "s")[0])
        state.sandbox.said_hello(state)
        state.bus.set_broadcast_judge(state.unique_name, state.judge)
        self._owners.hold(self._owners.follow(state.judge.uses))
        if not state.bus.knows_absent_name_errors:
            self._owners.look_up_absent_names()
        state.deliver(data, fds)

    # -- match rules ------------------------------------------------------------------------------

    def _add_match(self, header: Header, data: bytes) -> bool:
        state = self._state
        rule = _match_rule(header, data)
        limit = state.sandbox.limits.match_rules
        if state.all_match_rules >= limit:
            raise CallRefusedError(
                errors.LIMITS_EXCEEDED, f"match_rules={limit} are in use already"
            )
        state.matches.add(rule)
        text = rule.canonical()
        return self._call(header, "s", (text,), ReplyAction("add-match", (text,)))

    def _added_match(
        self, action: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        if reply.type == MessageType.ERROR:
            rule = parse_match_rule(str(action.values[0]))
            if rule in self._state.matches:
                self._state.matches.drop(rule)
        self._state.deliver(data, fds)

    def _remove_match(self, header: Header, data: bytes) -> bool:
        rule = _match_rule(header, data)
        if rule not in self._state.matches:
            raise CallRefusedError(
                errors.MATCH_RULE_NOT_FOUND,
                "The given match rule wasn't found and can't be removed",
            )
        self._state.matches.drop(rule)
        return self._call(header, "s", (rule.canonical(),))

    # -- looking names up ---------------------------------------------------------------------------

    def _look_up(self, header: Header, data: bytes) -> bool:
        name = bus_name(header, data)
        if not self._visibility.knows_enough(name):
            self._owners.look_up(name)
            return False
        if self._owners.waiting:
            return False
        if self._visibility.sees(name):
            action = (
                ReplyAction("credentials") if header.member == "GetConnectionCredentials" else None
            )
            return self._call(header, "s", (name,), action)
        state = self._state
        self._report(header, "the name may not be seen", direction="see", name=name)
        if header.member == "NameHasOwner":
            if not header.flags & Flag.NO_REPLY_EXPECTED:
                state.answer(header.serial, "b", (False,))
            return True
        raise CallRefusedError(*state.bus.absent_name_error(header.member or "", name))

    def _told_credentials(
        self, _action: ReplyAction, _reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        state = self._state
        if fds:
            # From dbus 1.16 on ProcessFD is among the credentials. On an app's connection it is the gate's process, on
            # a service's a process of the host. No sandbox may hold either.
            state.sandbox.close_fds(fds)
            data = without_descriptors(data)
        state.deliver(data)

    def _start_service(self, header: Header, data: bytes) -> bool:
        name, flags = arguments(header, data, "su")
        name = str(name)
        if not is_well_known_name(name):
            raise CallRefusedError(errors.INVALID_ARGS, f"not a well-known name: {name[:40]!r}")
        replier = self._owners.names.get(name)
        if replier is None and self._state.judge.any_send:
            self._owners.look_up(name)
            return False
        if self._owners.waiting:
            return False
        if name == DRIVER or self._may_start(name, replier):
            return self._call(header, "su", (name, flags))
        state = self._state
        self._report(header, "no rule allows sending to it", name=name)
        if self._visibility.sees(name):
            raise CallRefusedError(
                errors.ACCESS_DENIED,
                f"This sandbox may not start {name}: no rule allows sending to it",
            )
        raise CallRefusedError(*state.bus.absent_name_error("StartServiceByName", name))

    def _may_start(self, name: str, replier: Replier | None) -> bool:
        state = self._state
        owner = replier.owner if replier is not None else ""
        names = {name}
        if owner and not state.bus.judges_names_alone:
            names |= self._owners.names_of(owner)
        return state.judge.start(names, state.bus.peer(owner)).allowed

    def _list(self, header: Header, _data: bytes) -> bool:
        if self._owners.waiting:
            return False
        return self._call(header, "", (), ReplyAction("list"))

    def _listed(
        self, _action: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        state = self._state
        if reply.type != MessageType.METHOD_RETURN:
            state.deliver(data, fds)
            return
        (names,) = read_reply(reply, data, "as")
        assert isinstance(names, (list, tuple))
        at = reply.reply_serial_at
        serial = int.from_bytes(data[at : at + 4], "little" if reply.little else "big")
        self._owners.hold(self._give_list(reply.serial, serial, names))

    def _give_list(self, serial: int, asked: int, names: Sequence[Value]) -> Work:
        """Answer the call `asked` with the visible ones of these names."""
        state = self._state
        seen: list[str] = []
        for name in names:
            steps = state.judge.steps
            if self._visibility.sees(str(name)):
                seen.append(str(name))
            yield NAME_WORK + STEP_WORK * (state.judge.steps - steps)
        state.deliver(
            marshal.make_return(
                serial,
                reply_serial=asked,
                destination=state.unique_name,
                sender=DRIVER,
                signature="as",
                values=(seen,),
            )
        )

    # -- owning names -------------------------------------------------------------------------------

    def _request_name(self, header: Header, data: bytes) -> bool:
        state = self._state
        name, flags = arguments(header, data, "su")
        name = str(name)
        assert isinstance(flags, int)
        if not self._may_own(header, name):
            return False
        limit = state.sandbox.limits.names
        if name not in state.requested_names and state.all_names >= limit:
            raise CallRefusedError(errors.LIMITS_EXCEEDED, f"names={limit} are in use already")
        state.bus.payers.moves(state.unique_name, name)
        state.name_requests += 1
        request = state.requested_names[name] = state.name_requests
        action = ReplyAction("request-name", (name, request))
        return self._call(header, "su", (name, flags & REQUEST_NAME_FLAGS), action)

    def _requested_name(
        self, action: ReplyAction, reply: Header, data: bytes, fds: tuple[int, ...]
    ) -> None:
        name, request = action.values
        names = self._state.requested_names
        got = (
            reply.type == MessageType.METHOD_RETURN and read_reply(reply, data, "u")[0] in HAS_NAME
        )
        # A later request for the name may have another answer.
        if not got and names.get(str(name)) == request:
            del names[str(name)]
        self._state.deliver(data, fds)

    def _release_name(self, header: Header, data: bytes) -> bool:
        name = str(arguments(header, data, "s")[0])
        if not self._may_own(header, name):
            return False
        self._state.bus.payers.moves(self._state.unique_name, name)
        self._state.requested_names.pop(name, None)
        return self._call(header, "s", (name,))

    def _list_queued(self, header: Header, data: bytes) -> bool:
        name = str(arguments(header, data, "s")[0])
        # The waiting connections are answered as well, though they may not be seen otherwise: the app
        # that may own a name has to know whom it would follow, and the bus tells no more than numbers.
        return self._may_own(header, name) and self._call(header, "s", (name,))

    def _may_own(self, header: Header, name: str) -> bool:
        """Return False if the call must wait until the owner is known. Raises CallRefusedError.

        A hidden name is refused as an absent service, because a refusal must not tell that the name is there.
        """
        if not is_well_known_name(name):
            raise CallRefusedError(errors.INVALID_ARGS, f"not a well-known name: {name[:40]!r}")
        state = self._state
        verdict = state.judge.own(name)
        if verdict.allowed:
            return True
        if not self._visibility.knows_enough(name):
            self._owners.look_up(name)
            return False
        if self._owners.waiting:
            return False
        origin = verdict.rule.origin if verdict.rule is not None else ""
        self._report(header, verdict.reason, direction="own", name=name, origin=origin)
        if self._visibility.sees(name):
            raise CallRefusedError(
                errors.ACCESS_DENIED, f"This sandbox may not own {name}: {verdict.reason}"
            )
        question = "call-no-start" if header.flags & Flag.NO_AUTO_START else "call"
        raise CallRefusedError(*state.bus.absent_name_error(question, name))

    # One table for all connections, which saves two KB in each.
    _METHODS: Final[Mapping[str, Callable[["BusDriverCalls", Header, bytes], bool]]] = {
        "Hello": _hello,
        "AddMatch": _add_match,
        "RemoveMatch": _remove_match,
        "GetId": _pass,
        "ListNames": _list,
        "ListActivatableNames": _list,
        "StartServiceByName": _start_service,
        "RequestName": _request_name,
        "ReleaseName": _release_name,
        "ListQueuedOwners": _list_queued,
        **dict.fromkeys(LOOK_UPS, _look_up),
    }


def _match_rule(header: Header, data: bytes) -> MatchRule:
    """Return the rule of AddMatch or RemoveMatch. Raises CallRefusedError, PeerProtocolError."""
    rule = parse_match_rule(str(arguments(header, data, "s")[0]))
    if rule.sender == DRIVER and rule.path_namespace == DRIVER_PATH:
        # The bus sends from that path alone, so `path` matches the same signals. The gate's own rules have
        # `path_namespace`. So no RemoveMatch of the app can remove one of them.
        return replace(rule, path=DRIVER_PATH, path_namespace=None)
    return rule
