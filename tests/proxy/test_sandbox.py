"""A group of the proxy: what judges its connections, and in what its bus differs from a gate's."""

import os
import socket
from collections.abc import Iterator

import pytest

from broker.control_protocol.messages import Listener
from broker.gate.filter.filter import Filter
from broker.gate.io.loop import Loop
from broker.proxy.arguments import Command, parse_arguments
from broker.proxy.connect import Place, TcpPlace
from broker.proxy.judge import ProxyJudge
from broker.proxy.log import Printer
from broker.proxy.passthrough import PassthroughFilter
from broker.proxy.sandbox import (
    LIMITS,
    LoggedFilter,
    LoggedPassthroughFilter,
    ProxyBus,
    ProxyConnector,
    ProxySandbox,
)
from broker.wire import marshal
from broker.wire.address import UnixAddress
from broker.wire.header import MAX_MESSAGE
from broker.wire.sasl import SaslClient
from broker.wire.sasl_steps import MultiMechanismSaslClient
from tests.helpers.messages import access, call, driver_call, names
from tests.helpers.modelbus import ME, Dialogue

CHANGE = "type='signal',member='NameOwnerChanged'"

# Where nobody listens: ports of 127.0.0.1 below 1024 that no program of a test has.
TCP = TcpPlace(socket.AF_INET, ("127.0.0.1", 1))


def bus(*, sloppy_names: bool = False) -> ProxyBus:
    return ProxyBus("bus", [UnixAddress(b"/none")], sloppy_names=sloppy_names)


class Lines(Printer):
    """Keeps what is printed."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def make(loop: Loop, *options: str) -> tuple[ProxySandbox, Lines]:
    command = parse_arguments(["unix:path=/none", "/run/sock", *options], lambda _fd: b"")
    assert isinstance(command, Command)
    lines = Lines()
    listener = Listener(bus="bus", fd=0)
    return ProxySandbox(loop, command.groups[0], listener, 0, bus=bus(), printer=lines), lines


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ([], PassthroughFilter),
        (["--filter"], Filter),
        (["--log"], LoggedPassthroughFilter),
        (["--log", "--filter"], LoggedFilter),
    ],
)
def test_what_judges_a_connection(loop: Loop, options: list[str], kind: type[object]) -> None:
    sandbox, _ = make(loop, *options)
    judging = sandbox.make_filter(bus(), app_takes_fds=True)
    assert type(judging) is kind
    assert judging.state.app_takes_fds


def test_each_connection_has_a_judge_of_its_own(loop: Loop) -> None:
    sandbox, _ = make(loop, "--filter")
    one, two = (sandbox.make_filter(bus(), app_takes_fds=True) for _ in range(2))
    one.state.unique_name = ":1.5"
    sandbox.said_hello(one.state)
    assert isinstance(one.state.judge, ProxyJudge)
    assert isinstance(two.state.judge, ProxyJudge)
    assert (one.state.judge.unique_name, two.state.judge.unique_name) == (":1.5", "")


@pytest.mark.parametrize("filtered", [True, False])
def test_every_message_is_printed_known_or_not(loop: Loop, filtered: bool) -> None:
    sandbox, lines = make(loop, "--log", *(["--filter"] if filtered else []))
    judging = sandbox.make_filter(bus(), app_takes_fds=True)
    judging.feed_app(driver_call(1, "Hello"))
    judging.state.to_bus.clear()
    judging.feed_bus(
        marshal.make_return(
            1,
            reply_serial=1,
            destination=ME,
            sender="org.freedesktop.DBus",
            signature="s",
            values=(ME,),
        )
    )
    lines.lines.clear()
    for serial in range(2, 6):
        judging.state.to_bus.clear()
        judging.feed_app(call(serial, "org.freedesktop.DBus", "Ping", interface=None))
    assert [line.rpartition("#")[2] for line in lines.lines] == ["2", "3", "4", "5"]
    assert all(line.startswith(f"allowed sock {ME} -> ") for line in lines.lines)


def test_a_message_of_any_legal_size_passes() -> None:
    assert LIMITS.bytes_held >= MAX_MESSAGE
    assert LIMITS.bytes_queued >= MAX_MESSAGE


# -- the bus of a group, and the way to it -------------------------------------------------------------------------------


def test_nobody_is_known_but_by_name() -> None:
    shared = bus()
    talk = Dialogue(shared=shared)
    assert talk.state.unique_name == ME
    assert not shared.identities
    assert not shared.sandboxes


def test_another_name_of_an_owner_is_judged_alone() -> None:
    owners = {"org.a": ":1.2", "org.b": ":1.2"}
    rules = access("send:org.a", "see:org.b.c")
    gate = Dialogue(rules, owners=owners)
    proxy = Dialogue(rules, owners=owners, shared=bus())
    for talk, known in ((gate, True), (proxy, False)):
        # Asked for before, the owner of the name is known to both.
        talk.app(call(2, "org.b"))
        talk.clear()
        (answer,) = talk.app(driver_call(3, "NameHasOwner", "s", "org.b"))
        assert answer.body == (known,)
        got = names(talk.app(call(4, "org.b")))
        assert got == ([] if known else ["error ServiceUnknown"])
        talk.app(call(5, ":1.2"))
        assert talk.arrived[-1].header.serial == 5


@pytest.mark.parametrize("sloppy", [True, False])
def test_sloppy_names(sloppy: bool) -> None:
    talk = Dialogue(shared=bus(sloppy_names=sloppy))
    talk.subscribe(CHANGE)
    assert names(talk.change(":1.77", ":1.77")) == (["signal NameOwnerChanged"] if sloppy else [])
    (answer,) = talk.app(driver_call(5, "NameHasOwner", "s", ":1.77"))
    assert answer.body == (False,)


def test_only_a_unix_socket_says_who_we_are() -> None:
    reached = ProxyConnector([UnixAddress(b"/none"), TCP])
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_INET) as tcp:
        assert isinstance(reached.make_client(unix, 0), SaslClient)
        assert isinstance(reached.make_client(tcp, 0), MultiMechanismSaslClient)


@pytest.mark.parametrize(
    ("places", "address", "takes_fds"),
    [
        ([UnixAddress(b"/a"), UnixAddress(b"\0b")], "unix:path=/a;unix:abstract=b", True),
        ([TCP, UnixAddress(b"/a")], "unix:path=/a", True),
        ([TCP], "", False),
    ],
)
def test_descriptors_need_a_unix_socket(places: list[Place], address: str, takes_fds: bool) -> None:
    made = ProxyBus("bus", places, sloppy_names=False)
    assert (made.address, made.takes_fds) == (address, takes_fds)


@pytest.mark.parametrize("places", [[UnixAddress(b"/nonexistent/a")], []])
def test_nobody_there(loop: Loop, places: list[Place]) -> None:
    got: list[object] = []
    made = ProxyBus("bus", [*places, TCP], sloppy_names=False)

    def done(sock: socket.socket | None) -> None:
        got.append(sock)
        loop.stop()

    ProxyConnector(made.places).connect(loop, made.address, os.getuid(), done)
    loop.run()
    assert got == [None]
