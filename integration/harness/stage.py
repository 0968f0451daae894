"""Apps in sandboxes and services on the host, in one process and without a wait: for tests of the rules.

Nothing here waits for a message that must not come. `settle` asks the bus something on a connection and
takes the answer: all that was sent before on it has been judged then, and has been delivered, and all that was
delivered to it before has arrived. So what has not arrived after it never will.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Final

from broker.wire.header import Flag, MessageType
from integration.harness.messages import Message
from integration.harness.rawclient import BUS, RawClient
from integration.harness.supervised import Sandbox, Usos, Warden
from integration.harness.values import Variant

ERROR: Final = "org.freedesktop.DBus.Error."
PASSED: Final = "passed"
DENIED: Final = f"{ERROR}AccessDenied"
UNKNOWN: Final = f"{ERROR}ServiceUnknown"
NO_OWNER: Final = f"{ERROR}NameHasNoOwner"
PATH: Final = "/org/example/Thing"
INTERFACE: Final = "org.example.Thing"
OWNER_CHANGED: Final = f"type='signal',sender='{BUS}',member='NameOwnerChanged'"

_NUMBERS: Final = itertools.count(1)


class Stage:
    """Who takes part in one test. Everybody leaves at the end of it, with the warden's help."""

    def __init__(self, warden: Warden) -> None:
        self.warden: Final = warden
        self._sandboxes: Final[dict[RawClient, Sandbox]] = {}

    def name(self) -> str:
        """Return a bus name that nobody has used: the bus outlives the test."""
        return f"org.example.n{next(_NUMBERS)}.Service"

    def host(self, *names: str) -> RawClient:
        """Return a connection in no sandbox that owns these names."""
        client = self.warden.connect_host()
        for name in names:
            assert client.request_name(name) == 1
        return client

    def app(
        self,
        *rules: str,
        deny: Sequence[str] = (),
        allow: Sequence[Usos] = (),
        app: str = "org.example.App",
        component: str | None = None,
        from_host: bool | None = None,
    ) -> RawClient:
        """Return a connection in a sandbox of its own, under these rules."""
        named: dict[str, Any] = {} if component is None else {"Component": Variant("s", component)}
        if from_host is not None:
            named["ReceiveFromHost"] = Variant("b", from_host)
        sandbox = self.warden.add_server(app, rules=rules, deny=deny, allow=allow, **named)
        client = self.warden.connect(sandbox)
        self._sandboxes[client] = sandbox
        return client

    def owner(
        self, name: str, *rules: str, app: str = "org.example.Peer", **named: Any
    ) -> RawClient:
        """Return a connection in a sandbox that owns a name, and may be called by anybody."""
        client = self.app(f"own:{name}", "receive:", *rules, app=app, **named)
        assert client.request_name(name) == 1
        return client

    def sandbox(self, client: RawClient) -> Sandbox:
        return self._sandboxes[client]

    def set_rules(self, client: RawClient, *rules: str, deny: Sequence[str] = ()) -> None:
        """Replace all rules of the app's sandbox."""
        self.warden.change_access(self.sandbox(client), rules=rules, deny=deny, replace=True)

    def denials(self, client: RawClient) -> list[dict[str, Any]]:
        """Return what the supervisor says was refused, oldest first."""
        # The gate reports on another socket than it answers on: a change of rules comes after all reports.
        self.warden.change_access(self.sandbox(client))
        return list(self.warden.show(self.sandbox(client))["denials"])


def settle(*clients: RawClient) -> None:
    """See to it that what these sent has been dealt with, and what was sent to them is here: in that order."""
    for client in clients:
        client.round_trip()


def arrivals(client: RawClient) -> list[Message]:
    """Return, and take, what peers sent to a connection: the bus's own signals do not count."""
    settle(client)
    messages = [message for message in client.queue if message.header.sender != BUS]
    client.queue.clear()
    return messages


def members(client: RawClient, kind: MessageType) -> list[str | None]:
    """Return the members of the calls or signals that arrived."""
    return [each.header.member for each in arrivals(client) if each.header.type == kind]


def call(
    sender: RawClient,
    receiver: RawClient,
    destination: str,
    *,
    path: str = PATH,
    interface: str | None = INTERFACE,
    member: str = "Do",
) -> str:
    """Call `receiver` by some name of its; return PASSED if it got the call, and its caller the reply, or the error."""
    # Each connection is told for itself who owns a name by now, and this one maybe not yet.
    settle(sender)
    serial = sender.start_call(destination, path, interface, member, "s", ("hello",))
    settle(sender)
    got = [each for each in arrivals(receiver) if each.header.type == MessageType.METHOD_CALL]
    for each in got:
        header = each.header
        assert (header.sender, header.path, header.interface, header.member, each.values) == (
            sender.unique_name,
            path,
            interface,
            member,
            ("hello",),
        )
        receiver.reply(each, "s", ("answer",))
    reply = sender.wait_reply(serial)
    if reply.error is not None:
        assert not got, "the call was refused, and passed all the same"
        return reply.error
    assert len(got) == 1
    assert (reply.values, reply.header.sender) == (("answer",), receiver.unique_name)
    return PASSED


def mute_call(sender: RawClient, receiver: RawClient, destination: str, **named: Any) -> bool:
    """Send a call that wants no reply; return whether it arrived. Nothing may come back."""
    settle(sender)
    member = named.get("member", "Do")
    sender.start_call(destination, PATH, INTERFACE, member, flags=Flag.NO_REPLY_EXPECTED)
    return _went(sender, receiver, MessageType.METHOD_CALL, member)


def signal(
    sender: RawClient,
    receiver: RawClient,
    destination: str | None = None,
    *,
    path: str = PATH,
    interface: str = INTERFACE,
    member: str = "Done",
) -> bool:
    """Emit a signal; return whether it arrived. Nothing may come back."""
    settle(sender)
    sender.emit(path, interface, member, "s", ("news",), destination=destination)
    return _went(sender, receiver, MessageType.SIGNAL, member)


def listen(client: RawClient) -> RawClient:
    """Subscribe to every signal of the tests' interfaces, and return the client."""
    client.add_match("type='signal',path_namespace='/org/example'")
    return client


def told(client: RawClient) -> list[tuple[str, str, str]]:
    """Return, and take, the owner changes that the bus told a connection."""
    # Who owns the names of a pattern takes two answers: which there are, then whose they are.
    settle(client, client)
    changes = [each.values for each in client.queue if each.header.member == "NameOwnerChanged"]
    client.queue.clear()
    return [(str(name), str(old), str(new)) for name, old, new in changes]


def refusal(client: RawClient, *args: Any, **named: Any) -> tuple[str, str] | None:
    """Call, and return the error's name and text, or None if there was none."""
    reply = client.call(*args, **named)
    return None if reply.error is None else (reply.error, str(reply.values[0]))


def _went(sender: RawClient, receiver: RawClient, kind: MessageType, member: str) -> bool:
    settle(sender)
    got = members(receiver, kind)
    assert got in ([], [member])
    back = [each for each in arrivals(sender) if each.header.sender != sender.unique_name]
    assert not back, "something came back"
    return bool(got)
