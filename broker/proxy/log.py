"""Output of `--log`: a line for each message that passes or is refused, in order.

    allowed SOCKET CLIENT -> DESTINATION call INTERFACE.MEMBER at PATH #SERIAL
    denied SOCKET CLIENT -> DESTINATION call INTERFACE.MEMBER at PATH: REASON

`->` stands for a message out of the sandbox, and `<-` for a message into the sandbox. Calls of the
gate itself to the bus are left out.
"""

import os
import select
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from broker.gate.filter.connection_state import REPLY_SERIAL, ConnectionState
from broker.gate.filter.denials import Denial
from broker.gate.filter.pending_calls import FIRST_GATE_SERIAL, InterceptedCall
from broker.gate.output import Output
from broker.wire.header import BUS_LIMITS, Header, MessageType, measure
from broker.wire.skim import parse_or_skim

# PIPE_BUF: a pipe that has room accepts this many bytes in one write. So no line is cut in two.
MAX_LINE: Final = 4096
# Milliseconds for a slow reader to catch up before lines are left out.
PATIENCE: Final = 1000

_KINDS: Final = {
    MessageType.METHOD_CALL: "call",
    MessageType.METHOD_RETURN: "return",
    MessageType.ERROR: "error",
    MessageType.SIGNAL: "signal",
}


class Printer:
    """A writer of lines to a descriptor, until the reader closes.

    None as descriptor drops all.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._missed = 0
        self._poll: Final = select.poll()
        if fd is not None:
            self._poll.register(fd, select.POLLOUT)

    def line(self, text: str) -> None:
        """Write a line without queueing.

        A reader that is too slow loses lines, which are counted, so that no app waits for long.
        """
        if self._fd is None:
            return
        # After the first lost line the apps do not wait for this reader again.
        if not self._poll.poll(0 if self._missed else PATIENCE):
            self._missed += 1
            return
        if self._missed:
            missed, self._missed = self._missed, 0
            self._write(f"{missed} lines left out")
        self._write(text)

    def _write(self, text: str) -> None:
        line = (text if text.isprintable() else ascii(text)).encode()
        try:
            if self._fd is not None:
                os.write(self._fd, line[: MAX_LINE - 1] + b"\n")
        except OSError:
            self._fd = None  # The reader is gone. The proxy goes on.


class Tap:
    """An observer of the messages of one connection, before the messages are sent."""

    def __init__(self, state: ConnectionState, label: str, printer: Printer) -> None:
        self._state: Final = state
        self._label: Final = label
        self._printer: Final = printer
        self._to_bus: Final = _Place()
        self._to_app: Final = _Place()

    def look(self) -> None:
        """Print the messages that were added to the output since the last call."""
        for data in self._to_bus.new(self._state.to_bus):
            self._passed(data, "->")
        for data in self._to_app.new(self._state.to_app):
            self._passed(data, "<-")

    def denied(self, denial: Denial) -> None:
        """Print a refusal, after all earlier messages."""
        self.look()
        arrow = "<-" if denial.direction == "receive" else "->"
        what = f"{denial.direction} " if denial.direction in ("own", "see") else f"{denial.kind} "
        if denial.direction in ("send", "receive") and denial.member:
            what += f"{_method(denial.interface, denial.member)} at {denial.path}"
        peer = denial.peer or "*"
        self._print("denied", arrow, f"{peer} {what.strip()}: {denial.reason}")

    def _passed(self, data: bytes, arrow: str) -> None:
        header = parse_or_skim(data)
        own = FIRST_GATE_SERIAL <= header.serial < REPLY_SERIAL
        if arrow == "->" and own and header.serial in self._state.pending.calls_to_bus:
            entry = self._state.pending.calls_to_bus[header.serial]
            if isinstance(entry, InterceptedCall) and entry.is_own:
                return
            if isinstance(entry, InterceptedCall) and entry.action.kind == "translate":
                header = replace(header, serial=int(entry.action.values[0]))
        peer = (header.destination if arrow == "->" else header.sender) or "*"
        self._print("allowed", arrow, f"{peer} {describe(header)}")

    def _print(self, verdict: str, arrow: str, text: str) -> None:
        client = self._state.unique_name or "?"
        self._printer.line(f"{verdict} {self._label} {client} {arrow} {text}")


class _Place:
    """The position up to which an output was printed. Sending empties the output."""

    def __init__(self) -> None:
        self._first: object = None
        self._count = 0

    def new(self, output: Output) -> Sequence[bytes]:
        """Return the messages added since the last call. Each message is whole."""
        if not output or output[0] is not self._first:
            self._count = 0
        self._first = output[0] if output else None
        items = output[self._count :]
        self._count = len(output)
        found: list[bytes] = []
        for item in items:
            found += split_messages(item if isinstance(item, bytes) else bytes(item.data))
        return found


def split_messages(data: bytes) -> list[bytes]:
    """Split a run of whole messages into the messages."""
    found = []
    at = 0
    while at < len(data):
        end = at + measure(data, at, BUS_LIMITS)
        found.append(data[at:end])
        at = end
    return found


def describe(header: Header) -> str:
    """Return a message's kind, method and serials as text."""
    try:
        kind = _KINDS[MessageType(header.type)]
    except ValueError:
        kind = f"type {header.type}"
    text = kind
    if header.member:
        text += f" {_method(header.interface or '', header.member)} at {header.path}"
    if header.error_name:
        text += f" {header.error_name}"
    if header.reply_serial is not None:
        return f"{text} to #{header.reply_serial}"
    return f"{text} #{header.serial}"


def _method(interface: str, member: str) -> str:
    return f"{interface}.{member}" if interface else member
