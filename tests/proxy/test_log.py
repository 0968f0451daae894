import contextlib
import os
from collections.abc import Iterator

import pytest

from broker.gate.filter.denials import Denial
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL
from broker.gate.output import Chunk
from broker.proxy import log
from broker.proxy.log import MAX_LINE, Printer, Tap, describe, split_messages
from broker.wire import marshal
from broker.wire.header import parse_header
from broker.wire.interfaces import DRIVER
from tests.helpers.messages import access, call, changed, driver_call, signal
from tests.helpers.modelbus import ME, Dialogue


class Lines(Printer):
    """Keeps what is printed."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def make_tap() -> tuple[Dialogue, Tap, Lines]:
    talk = Dialogue(access("send:org.a"), owners={"org.a": ":1.2"})
    lines = Lines()
    return talk, Tap(talk.state, "sock", lines), lines


def test_what_passes_is_told_with_its_direction() -> None:
    talk, tap, lines = make_tap()
    talk.filter.feed_app(call(7, "org.a", path="/p"))
    tap.look()
    assert lines.lines == [f"allowed sock {ME} -> org.a call org.example.I.Do at /p #7"]
    reply = marshal.make_return(9, reply_serial=7, destination=ME, sender=":1.2")
    talk.filter.feed_bus(reply)
    tap.look()
    assert lines.lines[1:] == [f"allowed sock {ME} <- :1.2 return to #7"]


def test_everything_is_told_once() -> None:
    talk, tap, lines = make_tap()
    for serial in (7, 8, 9):
        talk.filter.feed_app(call(serial, "org.a"))
        tap.look()
        tap.look()
        if serial == 8:
            talk.state.to_bus.clear()  # it was sent
            tap.look()
    talk.filter.feed_app(call(10, "org.a") + call(11, "org.a"))
    tap.look()
    assert [line.rpartition("#")[2] for line in lines.lines] == ["7", "8", "9", "10", "11"]


def test_a_refusal_comes_behind_what_passed_before_it() -> None:
    talk, tap, lines = make_tap()
    talk.state.to_bus.append(call(7, "org.a"))
    tap.denied(Denial("send", "call", "org.b", "/p", "x.Y", "M", "no rule", ""))
    assert [line.split()[0] for line in lines.lines] == ["allowed", "denied"]
    assert lines.lines[1] == f"denied sock {ME} -> org.b call x.Y.M at /p: no rule"


@pytest.mark.parametrize(
    ("denial", "line"),
    [
        (
            Denial("receive", "signal", ":1.2", "/p", "x.Y", "M", "why", ""),
            "<- :1.2 signal x.Y.M at /p: why",
        ),
        (
            Denial("own", "call", "org.x", "/p", "x.Y", "RequestName", "why", ""),
            "-> org.x own: why",
        ),
        (
            Denial("see", "call", "org.x", "/p", "x.Y", "GetNameOwner", "why", ""),
            "-> org.x see: why",
        ),
        (Denial("send", "reply", ":1.2", "", "", "", "why", ""), "-> :1.2 reply: why"),
        (Denial("send", "signal", "", "/p", "x.Y", "M", "why", ""), "-> * signal x.Y.M at /p: why"),
    ],
)
def test_refusals_of_all_kinds(denial: Denial, line: str) -> None:
    _, tap, lines = make_tap()
    tap.denied(denial)
    assert lines.lines == [f"denied sock {ME} {line}"]


def test_calls_of_the_gates_own_are_not_told() -> None:
    talk = Dialogue(access("send:org.a"), owners={"org.a": ":1.2"}, hello=False)
    talk.filter.feed_app(driver_call(1, "Hello"))
    talk.state.to_bus.clear()
    lines = Lines()
    tap = Tap(talk.state, "sock", lines)
    answer = marshal.make_return(
        1, reply_serial=1, destination=ME, sender=DRIVER, signature="s", values=(ME,)
    )
    talk.filter.feed_bus(answer)
    asked = [parse_header(data) for item in talk.state.to_bus for data in [bytes_of(item)]]
    assert {"AddMatch", "GetNameOwner"} <= {header.member for header in asked}
    assert all(header.serial >= FIRST_GATE_SERIAL for header in asked)
    tap.look()
    assert lines.lines == [f"allowed sock {ME} <- {DRIVER} return to #1"]


def bytes_of(item: bytes | Chunk) -> bytes:
    return item if isinstance(item, bytes) else bytes(item.data)


def test_before_hello_nobody_has_a_name() -> None:
    talk = Dialogue(hello=False)
    lines = Lines()
    talk.filter.feed_app(driver_call(1, "Hello"))
    Tap(talk.state, "sock", lines).look()
    assert lines.lines[0].startswith(f"allowed sock ? -> {DRIVER} call {DRIVER}.Hello at ")


def test_a_run_is_told_message_by_message() -> None:
    one, two = call(7, "org.a", signature="s", values=("x",)), signal(8)
    assert split_messages(one + two) == [one, two]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (call(7, "org.a", interface=None), "call Do at / #7"),
        (signal(7, "Done"), "signal org.example.I.Done at / #7"),
        (
            marshal.make_error(7, reply_serial=5, name="a.B", text="", destination=ME),
            "error a.B to #5",
        ),
    ],
)
def test_messages_in_words(message: bytes, text: str) -> None:
    assert describe(parse_header(message)) == text


def test_an_unknown_type_in_words() -> None:
    message = changed(call(7, "org.a", interface=None), type=9)
    assert describe(parse_header(message)) == "type 9 #7"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def test_no_line_is_made_by_what_is_in_it(pipe: tuple[int, int]) -> None:
    Printer(pipe[1]).line("a\nb\x1b\udcff")
    assert os.read(pipe[0], 99) == b"'a\\nb\\x1b\\udcff'\n"


def test_a_long_line_is_cut(pipe: tuple[int, int]) -> None:
    Printer(pipe[1]).line("x" * 10_000)
    assert os.read(pipe[0], 99_999) == b"x" * (MAX_LINE - 1) + b"\n"


def test_a_reader_that_is_behind_misses_lines_and_is_told(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PATIENCE", 0)
    printer = Printer(pipe[1])
    for number in range(100_000):
        printer.line(f"line {number}")
    text = b""
    while len(text) < 60_000:
        text += os.read(pipe[0], 65536)
    lines = text.splitlines()
    assert lines == [b"line %d" % number for number in range(len(lines))]
    printer.line("more")
    said, more = os.read(pipe[0], 99_999).splitlines()[-2:]
    assert said.endswith(b" lines left out")
    assert more == b"more"


def test_a_closed_output_is_no_reason_to_end(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    printer = Printer(pipe[1])
    printer.line("one")
    printer.line("two")
    Printer(None).line("three")
