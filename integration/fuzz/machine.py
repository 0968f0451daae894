"""Of all that happens around a filter, exactly what the rules in force allow passes, once, and who asked is answered.

A state machine of an app, its rules, the peers on the bus and who owns which name. `Witness` and `World` check
that no more passes; here it is also checked that no less does, as long as the bus does not keep the filter waiting.
"""

import sys
import time
from collections import deque
from typing import Final

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.wire.errors import NAME_HAS_NO_OWNER
from broker.wire.header import Flag, MessageType, parse_header
from broker.wire.interfaces import DRIVER
from integration.fuzz.pieces import cut
from integration.fuzz.runs import WORK
from integration.fuzz.vocabulary import (
    CALLS,
    DRESSES,
    LISTS,
    MUCH,
    RULES,
    SERIALS,
    SIGNALS,
    SIZES,
    USUAL_CALLS,
    USUAL_SIGNALS,
    same,
)
from integration.fuzz.world import BOXED, LIMITS, NAMES, PEERS, STRANGER, World, answer_to
from policy.rules import Access, AccessList, Rule
from tests.helpers.messages import big, call, changed, driver_call
from tests.helpers.modelbus import ME

EXAMPLES_A_ROUND: Final = 25
NOBODY: Final = ""
REMEMBERED: Final = 8  # messages, to be sent again


class FilterMachine(RuleBasedStateMachine):
    """One connection of an app."""

    @initialize(rules=LISTS, takes_fds=st.booleans())
    def begin(self, rules: AccessList, takes_fds: bool) -> None:
        self.world = World(rules, app_takes_fds=takes_fds)
        self.witness = self.world.witness
        self.in_force = rules
        self.serial = 1000
        self.world.app(driver_call(2, "AddMatch", "s", ""))  # it wants to be told of all changes
        self.said = deque(USUAL_CALLS, maxlen=REMEMBERED)
        self.heard = deque(USUAL_SIGNALS, maxlen=REMEMBERED)

    def come_back(self) -> None:
        """A connection that ended is followed by another, and what was said is said to that one."""
        if self.world.ended:
            said, heard = self.said, self.heard
            self.begin(self.in_force, self.world.filter.state.app_takes_fds)
            self.said, self.heard = said, heard

    # -- the app -----------------------------------------------------------------------------------

    def say(self, message: bytes, sizes: list[int], fds: int = 0) -> tuple[int, int]:
        """Let the app send it in pieces; return how much had come and gone before."""
        self.come_back()
        marks = (len(self.world.got), len(self.world.sent))
        for part in cut(message, sizes):
            self.world.app(part, fds)
            fds = 0
        return marks

    @rule(message=CALLS | SIGNALS, dress=DRESSES, sizes=SIZES)
    def app_sends(self, message: bytes, dress: object, sizes: list[int]) -> None:
        """What the app sends leaves the sandbox if it may, or is answered; nothing else happens."""
        self.said.append((message, dress))
        for again in (message, self.numbered(message), message):
            self.check_sending(again, dress, sizes)

    def all_is_said_again(self) -> None:
        """A verdict that is remembered does not outlive what it rests on."""
        for message, dress in list(self.said):
            self.check_sending(self.numbered(message), dress, [0])
        if self.world.paused:
            return
        for message, sender in list(self.heard):
            self.check_arriving(self.numbered(message), sender)
        # So that there is room for other calls.
        for serial in list(self.witness.waiting):
            self.check_answer(serial, right=0)
            if serial in self.witness.waiting:
                self.check_answer(serial, right=self.serial)
        for caller, serial in list(self.world.filter.state.pending.calls_to_app):
            self.say(changed(answer_to(serial, ME), destination=caller, sender=None), [0])

    def numbered(self, message: bytes) -> bytes:
        """Return the message with a serial of its own."""
        self.serial += 1
        high = FIRST_GATE_SERIAL if self.serial % 4 == 0 else 0
        return changed(message, serial=high + self.serial)

    def check_sending(self, message: bytes, dress: object, sizes: list[int]) -> None:
        assert callable(dress)
        self.come_back()
        header = parse_header(message)
        exact = self.world.is_settled
        allowed = self.witness.may_send(header)
        wants_reply = header.type == MessageType.METHOD_CALL and not (
            header.flags & Flag.NO_REPLY_EXPECTED
        )
        full = len(self.world.filter.state.pending.calls_to_bus) >= LIMITS.pending_calls
        waits = self.world.filter.state.pending.awaits_reply(header.serial)
        got, sent = self.say(dress(message), sizes)
        if not exact or not self.world.is_settled:
            return
        passed = [m for m in self.world.sent[sent:] if same(m, message)]
        assert len(passed) == (allowed and not (wants_reply and (full or waits)))
        if wants_reply and not passed:
            assert [m.header.reply_serial for m in self.world.got[got:]] == [header.serial]

    @rule(fds=st.integers(0, 4), claimed=st.integers(0, 4), sizes=SIZES)
    def app_sends_descriptors(self, fds: int, claimed: int, sizes: list[int]) -> None:
        """Descriptors are passed on, or closed: `World` counts them."""
        message = changed(call(40, "org.a", flags=1), unix_fds=claimed)
        self.say(message, sizes, fds)

    @rule(
        caller=st.sampled_from(PEERS), serial=st.integers(50, 55), error=st.booleans(), sizes=SIZES
    )
    def app_answers(self, caller: str, serial: int, error: bool, sizes: list[int]) -> None:
        """An answer leaves the sandbox if the call came in and has no answer yet."""
        reply = changed(answer_to(serial, ME, error=error), destination=caller, sender=None)
        exact = self.world.is_settled
        expected = (caller, serial) in self.world.filter.state.pending.calls_to_app
        _, sent = self.say(reply, sizes)
        if exact and self.world.is_settled:
            assert len(self.world.sent) - sent == expected

    @rule(
        name=st.sampled_from([*NAMES, *PEERS, ME, STRANGER]),
        serial=SERIALS,
        member=st.sampled_from(["GetNameOwner", "NameHasOwner", "GetConnectionUnixUser"]),
    )
    def app_looks_up(self, name: str, serial: int, member: str) -> None:
        """Of a name the app is told what is so if it may be seen, and else that it is not there."""
        exact = self.world.is_settled and not self.busy(serial)
        got, _ = self.say(driver_call(serial, member, "s", name), [0])
        if not exact or not self.world.is_settled:
            return
        owner = name if name in self.world.model.uniques else self.world.model.owners.get(name)
        if name[:1] != ":" and owner in self.witness.callers:
            return  # the filter need not know that its owner has called
        there = owner is not None and self.witness.sees(name)
        (answer,) = self.world.got[got:]
        assert answer.header.reply_serial == serial
        if member == "NameHasOwner":
            assert answer.body == (there,)
        elif there:
            assert answer.body == (owner if member == "GetNameOwner" else 1000,)
        else:
            assert answer.header.error_name == NAME_HAS_NO_OWNER

    @rule(serial=SERIALS)
    def app_lists_names(self, serial: int) -> None:
        """The app is told the names that it may see."""
        exact = self.world.is_settled and not self.busy(serial)
        got, _ = self.say(driver_call(serial, "ListNames"), [0])
        if exact and self.world.is_settled:
            (names,) = self.world.got[got].body
            assert isinstance(names, tuple)
            unseen = [name for name in names if not self.witness.sees(name)]
            assert not unseen, unseen
            assert {DRIVER, ME} <= set(names)

    @rule(
        serial=SERIALS,
        name=st.sampled_from(NAMES),
        member=st.sampled_from(["RequestName", "ReleaseName"]),
    )
    def app_wants_name(self, serial: int, name: str, member: str) -> None:
        """A name is asked for if it may be owned."""
        arguments = ("su", name, 0) if member == "RequestName" else ("s", name)
        exact = self.world.is_settled and not self.busy(serial)
        used = self.world.filter.state.requested_names
        full = member == "RequestName" and name not in used and len(used) >= LIMITS.names
        allowed = self.witness.judge.own(name).allowed and not full
        _, sent = self.say(driver_call(serial, member, *arguments), [0])
        if exact and self.world.is_settled:
            # The gate may have asked who owns the name, for the words of a refusal.
            members = [m.header.member for m in self.world.sent[sent:]]
            assert members.count(member) == allowed
            assert allowed <= (len(members) == 1)

    @rule(
        serial=SERIALS,
        member=st.sampled_from(["AddMatch", "AddMatch", "RemoveMatch"]),
        text=st.sampled_from(
            ["", "member=Get", "type=signal", "sender=org.freedesktop.DBus", ",,"]
        ),
    )
    def app_matches(self, serial: int, member: str, text: str) -> None:
        """Match rules are counted, and only what was added is removed: the model bus insists."""
        self.say(driver_call(serial, member, "s", text), [0])

    @rule(data=st.binary(min_size=1, max_size=40), fds=st.integers(0, 1))
    def app_sends_garbage(self, data: bytes, fds: int) -> None:
        """What is no message ends the connection, and nothing else."""
        self.world.app(data, fds)

    def busy(self, serial: int) -> bool:
        """Say whether the next call with this serial is refused for that, or for their number."""
        state = self.world.filter.state
        return (
            state.pending.awaits_reply(serial)
            or len(state.pending.calls_to_bus) >= LIMITS.pending_calls
        )

    # -- the others ----------------------------------------------------------------------------------

    @rule(
        sender=st.sampled_from(PEERS),
        serial=st.integers(50, 55),
        message=CALLS | SIGNALS,
        broadcast=st.booleans(),
        dress=st.sampled_from([bytes, big]),
        fds=st.sampled_from([0, 0, 0, 1, 3]),
    )
    def peer_sends(
        self, sender: str, serial: int, message: bytes, broadcast: bool, dress: object, fds: int
    ) -> None:
        """What a peer sends comes in if it may, and a call that may not is answered."""
        assert callable(dress)
        is_call = parse_header(message).type == MessageType.METHOD_CALL
        destination = None if broadcast and not is_call else ME
        came = dress(changed(message, sender=sender, destination=destination, unix_fds=fds))
        self.heard.append((came, sender))
        self.check_arriving(changed(came, serial=serial), sender)
        self.check_arriving(self.numbered(came), sender)

    def check_arriving(self, came: bytes, sender: str) -> None:
        header = parse_header(came)
        fds = header.unix_fds
        is_call = header.type == MessageType.METHOD_CALL
        exact = self.world.is_settled
        state = self.world.filter.state
        wants_reply = is_call and not header.flags & Flag.NO_REPLY_EXPECTED
        full = wants_reply and len(state.pending.calls_to_app) >= LIMITS.pending_calls
        got, sent = len(self.world.got), len(self.world.sent)
        if sender not in self.world.model.uniques:
            return
        self.world.peer(came, fds)
        if not exact or not self.world.is_settled:
            return
        allowed = self.witness.may_receive(header) and not full
        allowed = allowed and (state.app_takes_fds or not fds)
        assert len(self.world.got) - got == allowed
        replies = [m for m in self.world.sent[sent:] if m.header.type == MessageType.ERROR]
        assert len(replies) == (wants_reply and not allowed)

    @precondition(lambda self: self.world.witness.waiting)
    @rule(
        which=st.integers(0, 5),
        sender=st.sampled_from(PEERS),
        right=st.integers(0, 3),
        error=st.booleans(),
    )
    def peer_answers(self, which: int, sender: str, right: int, error: bool) -> None:
        """An answer comes in if it is the first one, from somebody who was asked."""
        calls = list(self.witness.waiting)
        self.check_answer(calls[which % len(calls)], sender, right=right, error=error)

    def check_answer(
        self, serial: int, sender: str = BOXED, *, right: int, error: bool = False
    ) -> None:
        waiting = self.witness.waiting[serial]
        if right and waiting.responders:
            sender = sorted(waiting.responders)[right % len(waiting.responders)]
        expected = sender in waiting.responders
        exact = self.world.is_settled
        got = len(self.world.got)
        for _ in range(2):  # the second one was not asked for
            self.world.peer(answer_to(waiting.bus_serial, sender, error=error))
        if exact:
            came = [m.header.reply_serial for m in self.world.got[got:]]
            assert came == [serial] * expected

    @rule(name=st.sampled_from(NAMES), new=st.sampled_from([NOBODY, *PEERS]))
    def name_moves(self, name: str, new: str) -> None:
        """What follows from who owns a name changes with it."""
        if self.world.model.owners.get(name, NOBODY) != new and new in (
            NOBODY,
            *self.world.model.uniques,
        ):
            self.check_sending(self.numbered(call(1, name, "Get")), bytes, [0])
            self.world.change(name, new)
            self.all_is_said_again()

    @rule(who=st.sampled_from(PEERS))
    def peer_leaves(self, who: str) -> None:
        """A peer ends; its names have no owner."""
        if who in self.world.model.uniques:
            self.world.leave(who)
            self.all_is_said_again()

    @rule()
    def sandboxed_peer_hangs_up_with_a_backlog(self) -> None:
        """Deliver the backlog of a closed connection as that sandbox's own."""
        self.world.hang_up()
        self.all_is_said_again()

    @rule(rules=LISTS)
    def rules_change(self, rules: AccessList) -> None:
        """From now on these rules are in force."""
        self.in_force = rules
        self.world.use(rules)
        self.all_is_said_again()

    @rule(one=RULES, more=st.booleans())
    def rules_change_a_little(self, one: Rule, more: bool) -> None:
        """With one rule more or less, little changes but the verdicts."""
        rules = (*self.in_force.rules, one) if more else self.in_force.rules[:-1]
        self.rules_change(replace(self.in_force, rules=rules))

    @rule(name=st.sampled_from(NAMES), access=st.sampled_from(list(Access)))
    def name_is_denied_while_the_bus_is_slow(self, name: str, access: Access) -> None:
        """What depends on owners that are not known yet waits for them."""
        self.rules_change(AccessList(rules=MUCH))
        self.world.paused = True
        denial = Rule(access=frozenset({access}), deny=True, name=name)
        self.rules_change(AccessList(rules=(*MUCH, denial)))
        self.world.go_on()

    @rule(rules=LISTS)
    def speaker_uses(self, rules: AccessList) -> None:
        """Who hears the other sandbox's broadcasts changes with its rules."""
        self.world.speaker_uses(rules)
        self.all_is_said_again()

    @rule(who=st.sampled_from([None, *PEERS]))
    def somebody_new(self, who: str | None) -> None:
        """A sandbox connects, or a peer wants to know which one a message is from."""
        if who is None:
            self.world.stranger_appears()
        else:
            self.world.tag(who)
        self.all_is_said_again()

    @rule(pause=st.booleans())
    def bus_is_slow(self, pause: bool) -> None:
        """The bus takes its time, or not."""
        if pause:
            self.world.paused = True
        else:
            self.world.go_on()

    @precondition(lambda self: self.world.paused)
    @rule()
    def bus_does_one_thing(self) -> None:
        """The bus deals with one of what it was sent."""
        self.world.step()

    @invariant()
    def nothing_is_kept_for_nobody(self) -> None:
        """What waits in the filter waits for something."""
        assert self.world.ended or self.world.is_settled or self.world.paused or self.world.is_half

    def teardown(self) -> None:
        """End it."""
        if hasattr(self, "world"):
            self.world.finish()


def main(seconds: float) -> None:
    """Run examples, always new ones and first those that failed before, until the time is over."""
    database = DirectoryBasedExampleDatabase(WORK / "machine")
    end = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end:
        profile = settings(
            database=database,
            deadline=None,
            derandomize=False,
            max_examples=EXAMPLES_A_ROUND,
            stateful_step_count=60,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(FilterMachine, settings=profile)
        rounds += 1
    print(f"{seconds:.0f} s, {rounds * EXAMPLES_A_ROUND} runs of up to 60 steps")


if __name__ == "__main__":
    main(float(sys.argv[1]))
