"""Messages of the bus without a remembered verdict: judged, cleaned, and passed to the app. No I/O."""

from dataclasses import replace
from typing import Final, NamedTuple

from broker.gate.dumps import ReplyAction
from broker.gate.filter.bus_state import UNKNOWN
from broker.gate.filter.connection_state import ConnectionState
from broker.gate.filter.costs import ANSWER_COST, HEARD_COST, QUESTION_COST, TOLD_COST
from broker.gate.filter.denials import Denial, denial
from broker.gate.filter.name_owners import NameOwners
from broker.gate.filter.pending_calls import InterceptedCall, Replier
from broker.gate.filter.verdict_cache import remember_shape
from broker.gate.filter.visibility import NameVisibility
from broker.wire import errors, marshal
from broker.wire.header import (
    READ_LIMITS,
    Flag,
    Header,
    MessageType,
    parse_header,
    serialise_header,
)
from broker.wire.interfaces import DRIVER
from policy.match import Verdict

# The sender's own rules may restrict the receivers of broadcasts, and those rules are not known any more.
NOT_KNOWN: Final = Verdict(
    allowed=False,
    rule=None,
    reason="its sender was in a sandbox of which nothing is known any more",
)


class Arrived(NamedTuple):
    """A whole message of the bus."""

    header: Header
    data: bytes
    fds: tuple[int, ...]


class BusMessages:
    """The slow path of the bus side of a connection."""

    def __init__(
        self, state: ConnectionState, owners: NameOwners, visibility: NameVisibility
    ) -> None:
        self._state: Final = state
        self._owners: Final = owners
        self._visibility: Final = visibility
        # The payer of the current message, and its cost.
        self._cause = ""
        self._cost = 0
        self._arrives = False  # the message announces the payer's own connection
        state.reply_handlers["count-callers"] = self._counted

    def message(self, header: Header, data: bytes, fds: tuple[int, ...]) -> bool:
        """Judge a whole message. False: the message must wait until the owners are known."""
        self._cause, self._cost, self._arrives = self._state.unique_name, ANSWER_COST, False
        if header.type in (MessageType.METHOD_RETURN, MessageType.ERROR):
            if self._owners.waiting and self._kind_of(header) == "list":
                return False
            self._reply(header, data, fds)
        elif header.type == MessageType.SIGNAL and header.sender in (DRIVER, None):
            if self._owners.waiting and header.member == "NameOwnerChanged":
                return False
            self._state.sandbox.close_fds(fds)
            self._driver_signal(header, data)
        elif header.type in (MessageType.METHOD_CALL, MessageType.SIGNAL):
            if self._owners.waiting or not self._state.unique_name:
                return False
            self._from_peer(header, data, fds)
        else:
            self._state.sandbox.close_fds(fds)
        return True

    def charge(self, size: int, took: int) -> None:
        """Charge the last message to the sandbox that caused it: its cost, or its time if that is more.

        `size` is the cost of its bytes, `took` that of its time.
        """
        cost = max(self._cost + size, took)
        if self._arrives:
            self._state.bus.payers.charge_arrival(self._cause, cost)
        else:
            self._state.bus.payers.charge(self._cause, cost)

    # -- replies -----------------------------------------------------------------------------------

    def _kind_of(self, header: Header) -> str:
        """Return the kind of the action for a reply, or "" if the reply is passed on."""
        entry = self._state.pending.calls_to_bus.get(header.reply_serial or 0)
        if not isinstance(entry, InterceptedCall):
            return ""
        action = entry.action.after if entry.action.kind == "translate" else entry.action
        return action.kind if action is not None else ""

    def _reply(self, header: Header, data: bytes, fds: tuple[int, ...]) -> None:
        state = self._state
        sender = header.sender or DRIVER
        entry = state.pending.calls_to_bus.get(header.reply_serial or 0)
        if entry is None or not self._may_answer(entry, sender):
            state.sandbox.close_fds(fds)
            if sender != DRIVER:
                self._cause, self._cost = sender, HEARD_COST
                state.sandbox.denied(
                    state, Denial("receive", "reply", sender, "", "", "", "not asked for", "")
                )
            return
        # The bus may add descriptors to credentials. The app never gets them, so they are no reason to refuse.
        app_gets_fds = self._kind_of(header) != "credentials"
        del state.pending.calls_to_bus[header.reply_serial or 0]
        if fds and not state.app_takes_fds and app_gets_fds:
            state.sandbox.close_fds(fds)
            fds = ()
            header, data = without_fds(header)
        untouched = not header.has_unknown
        if not untouched:
            data = self._clean(header, data)
            header = parse_header(data, 0, READ_LIMITS)
        if isinstance(entry, InterceptedCall):
            if entry.is_own:
                self._cost = QUESTION_COST
            state.handle_reply(entry.action, header, data, fds)
            return
        state.deliver(data, fds)
        if untouched and not fds and header.little and header.sender:
            remember_shape(
                state.verdicts.bus_replies, state.verdicts.bus_reply_at, header, data, sender
            )

    def _may_answer(self, entry: Replier | InterceptedCall, sender: str) -> bool:
        """Return whether the sender may reply to a call.

        Besides the owner that was called and later owners, the bus may: the name has no owner, the owner is gone, or the
        bus did not allow the call.
        """
        replier = entry.replier if isinstance(entry, InterceptedCall) else entry
        if not (replier.owner or replier.name):  # NO_REPLIER
            return False
        return sender in (DRIVER, replier.owner) or sender in replier.former

    # -- signals of the bus itself -----------------------------------------------------------------

    def _driver_signal(self, header: Header, data: bytes) -> None:
        state = self._state
        self._cost = HEARD_COST
        if header.member == "NameOwnerChanged" and header.interface == DRIVER:
            self._owner_changed(header, data)
        elif header.destination is not None:  # NameAcquired, NameLost
            self._find_mover(header, data)
            state.deliver(self._clean(header, data))
        else:
            self._cause = ""
            verdict = state.judge.receive(
                (DRIVER,), header.path, header.interface, header.member, None, broadcast=True
            )
            if verdict.allowed:
                state.deliver(self._clean(header, data))

    def _owner_changed(self, header: Header, data: bytes) -> None:
        if header.signature != "sss":
            return
        arguments = marshal.read_body("sss", data[header.size :], little=header.little)
        name, old, new = (str(argument) for argument in arguments)
        self._cause = self._state.bus.payers.who_moved(name, new, old)
        self._arrives = name[:1] == ":" and not old
        changes = self._visibility.owner_changed(name, old, new)
        self._cost += len(changes) * TOLD_COST
        for change in changes:
            said = self._clean(header, data) if change == (name, old, new) else None
            self._visibility.tell_owner_change(*change, said)

    def _find_mover(self, header: Header, data: bytes) -> None:
        """Charge NameAcquired or NameLost to the connection that caused it."""
        if header.signature == "s":
            (name,) = marshal.read_body("s", data[header.size :], little=header.little)
            self._cause = self._state.bus.payers.who_asked(str(name)) or self._cause

    # -- calls and signals of others -----------------------------------------------------------------

    def _from_peer(self, header: Header, data: bytes, fds: tuple[int, ...]) -> None:
        state = self._state
        sender = header.sender or ""
        self._cause, self._cost = sender, HEARD_COST
        is_call = header.type == MessageType.METHOD_CALL
        wants_reply = is_call and not header.flags & Flag.NO_REPLY_EXPECTED
        verdict = self._judge(header, sender)
        problem = None
        if not verdict.allowed:
            refused = denial("receive", header, sender, verdict)
            state.sandbox.denied(state, refused)
            if header.destination is None and not fds and header.little:
                state.verdicts.bus_refused.remember(data[12 : header.size], refused, sender)
            problem = (
                errors.ACCESS_DENIED,
                f"The sandboxed receiver takes no such call: {verdict.reason}",
            )
        elif fds and not state.app_takes_fds:
            problem = (errors.NOT_SUPPORTED, "The receiver takes no file descriptors")
        elif wants_reply and len(state.pending.calls_to_app) >= state.sandbox.limits.pending_calls:
            problem = (errors.LIMITS_EXCEEDED, "Too many calls wait for the receiver's reply")
            self._count_callers()
        if problem is not None:
            state.sandbox.close_fds(fds)
            if wants_reply:
                state.refuse_caller(sender, header.serial, *problem)
            return
        state.deliver(self._clean(header, data), fds)
        if is_call:
            state.remember_caller(sender)
        if wants_reply:
            state.pending.calls_to_app.add((sender, header.serial))
        if not fds and header.little and not header.has_unknown:
            self._remember(header, data[12 : header.size], sender)

    def _judge(self, header: Header, sender: str) -> Verdict:
        """Judge by the app's rules; a sandbox's broadcast also by the sender's, if they restrict its receivers."""
        state = self._state
        peer = state.bus.peer(sender)
        broadcast = header.destination is None
        verdict = state.judge.receive(
            self._owners.names_of(sender),
            header.path,
            header.interface,
            header.member,
            peer,
            broadcast=broadcast,
        )
        if not broadcast or not verdict.allowed:
            return verdict
        if peer is UNKNOWN:
            return NOT_KNOWN
        sender_judge = state.bus.broadcast_judges.get(sender)
        if sender_judge is None:
            return verdict
        return sender_judge.judge_broadcast_receiver(
            header.path, header.interface, header.member, state.sandbox.identity
        )

    def _count_callers(self) -> None:
        """Ask the bus for the connected callers, because calls of the others may never be answered."""
        if not self._state.counts_callers:
            self._state.counts_callers = True
            self._state.call_driver("ListNames", "", (), ReplyAction("count-callers"))

    def _counted(
        self, _action: ReplyAction, reply: Header, data: bytes, _fds: tuple[int, ...]
    ) -> None:
        self._state.counts_callers = False
        if reply.signature == "as":
            (names,) = marshal.read_body("as", data[reply.size :], little=reply.little)
            assert isinstance(names, tuple)
            there = frozenset(names)
            asked = self._state.pending.calls_to_app
            asked -= {key for key in asked if key[0] not in there}

    def _remember(self, header: Header, key: bytes, sender: str) -> None:
        state = self._state
        if header.type == MessageType.SIGNAL:
            state.verdicts.bus_signals.remember(key, sender, sender)
        elif header.flags & Flag.NO_REPLY_EXPECTED:
            state.verdicts.bus_mute.remember(key, sender, sender)
        else:
            state.verdicts.bus_calls.remember(key, sender, sender)

    def _clean(self, header: Header, data: bytes) -> bytes:
        """Leave out header fields that D-Bus does not define, because a sender could have forged them."""
        if not header.has_unknown:
            return data
        return serialise_header(header, sender=True) + data[header.size :]


def without_fds(header: Header) -> tuple[Header, bytes]:
    """Return an error in place of a reply with descriptors, for an app that takes none."""
    body = marshal.make_body("s", ("The reply has file descriptors, which were not negotiated",))
    error = replace(
        header,
        little=True,
        type=MessageType.ERROR,
        error_name=errors.NOT_SUPPORTED,
        signature="s",
        body_length=len(body),
        unix_fds=0,
        has_unknown=False,
        has_misplaced=False,
    )
    made = serialise_header(error, sender=True) + body
    return parse_header(made), made
