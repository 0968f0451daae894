from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from broker.bus.message_intake import (
    MAX_HEAD,
    ArrivedMessage,
    Dropped,
    Item,
    MessageIntake,
    Oversize,
)
from broker.wire.errors import PeerProtocolError
from broker.wire.header import Header, MessageType, serialise_header

CALL = Header(
    little=True,
    type=MessageType.METHOD_CALL,
    flags=0,
    body_length=0,
    serial=7,
    path="/a",
    interface="org.example.I",
    member="M",
    destination=":1.1",
    sender=":1.66",
)


def message(
    body: bytes = b"", extra: dict[int, tuple[str, str]] | None = None, **fields: Any
) -> bytes:
    header = replace(CALL, body_length=len(body), signature="ay" if body else "", **fields)
    return serialise_header(header, sender=True, extra=extra or {}) + body


def long_path(size: int, **fields: Any) -> bytes:
    return message(path="/" + "a" * size, **fields)


class Reader:
    """An intake that wants what is said, and what came out of it."""

    def __init__(self, *unwanted: str) -> None:
        self.unwanted = unwanted
        self.seen: list[Header] = []
        self.intake = MessageIntake(self._look)
        self.most = 0

    def _look(self, header: Header) -> bool:
        self.seen.append(header)
        return header.member not in self.unwanted

    def feed(self, data: bytes, fds: tuple[int, ...] = (), *, cut: bool = False) -> list[Item]:
        items = list(self.intake.feed(data, fds, cut=cut))
        self.most = max(self.most, self.intake.held)
        return items

    def in_chunks(self, data: bytes, size: int = 65536) -> list[Item]:
        return [
            item for at in range(0, len(data), size) for item in self.feed(data[at : at + size])
        ]


@pytest.mark.parametrize("size", [1, 3, 7, 16, 1000])
def test_messages_do_not_depend_on_how_they_are_cut(size: int) -> None:
    data = message() + message(b"x" * 50, member="B") + message(member="No") + long_path(MAX_HEAD)
    data += message(b"y", member="D", little=False)
    reader = Reader("No")
    items = reader.in_chunks(data, size)
    assert [item.header.member for item in items if isinstance(item, ArrivedMessage)] == [
        "M",
        "B",
        "D",
    ]
    assert [item.body for item in items if isinstance(item, ArrivedMessage)] == [
        b"",
        b"x" * 50,
        b"y",
    ]
    assert [item for item in items if isinstance(item, Oversize)] == [Oversize(1, 0, 7, ":1.66")]


def test_attack_c7_a_path_of_two_mebibytes_is_skipped_and_its_sender_known() -> None:
    reader = Reader()
    items = reader.in_chunks(long_path(2 * 1024 * 1024, serial=9) + message(member="Next"))
    assert items[0] == Oversize(1, 0, 9, ":1.66")
    assert isinstance(items[1], ArrivedMessage)
    assert [header.member for header in reader.seen] == ["Next"]
    assert reader.most <= 65536 + MAX_HEAD


def test_attack_c7_a_body_that_is_not_wanted_is_not_stored() -> None:
    reader = Reader("Big")
    items = reader.in_chunks(
        message(bytes(20 * 1024 * 1024), member="Big") + message(member="Next")
    )
    assert [item.header.member for item in items if isinstance(item, ArrivedMessage)] == ["Next"]
    assert reader.most <= 65536
    assert reader.intake.skipped > 19 * 1024 * 1024


def test_attack_c7_many_fields_are_not_gone_through() -> None:
    fields = dict.fromkeys(range(11, 250), ("o", "/" + "b" * 600))
    reader = Reader()
    items = reader.in_chunks(message(extra=fields, path=None) + message(member="Next"))
    assert isinstance(items[0], Oversize)
    assert isinstance(items[1], ArrivedMessage)


def test_attack_c7_a_header_that_the_parser_does_not_take_is_skipped() -> None:
    text = "\ufdd0"  # a bus may let it pass
    reader = Reader()
    items = reader.feed(message(extra={200: ("s", text)}) + message(member="Next"))
    assert [item.header.member for item in items if isinstance(item, ArrivedMessage)] == ["Next"]


def test_attack_c7_what_says_who_sent_it_may_come_before_what_is_long() -> None:
    # SENDER is the last field as buses write it, and a header is skimmed to its end.
    data = bytearray(long_path(MAX_HEAD + 100, sender=":1.5"))
    items = Reader().in_chunks(bytes(data), 10)
    assert items == [Oversize(1, 0, 7, ":1.5")]


def test_what_is_no_message_is_no_bus() -> None:
    for data in (b"x" * 16, b"l\1\0\2" + bytes(12)):
        with pytest.raises(PeerProtocolError):
            Reader().feed(data)


def test_calls_of_the_same_bytes_are_parsed_once() -> None:
    reader = Reader()
    reader.feed(message(serial=3) + message(serial=4) + message(serial=5, flags=1))
    assert [(header.serial, header.flags) for header in reader.seen] == [(3, 0), (4, 0), (5, 1)]
    assert len(reader.intake._parsed) == 2


# -- descriptors ------------------------------------------------------------------------------------


def test_descriptors_go_with_the_message_they_came_with() -> None:
    reader = Reader("No")
    first, second = message(unix_fds=2), message(member="B", unix_fds=1)
    items = reader.feed(message() + first, (3, 4)) + reader.feed(second, (5,))
    assert [item.fds for item in items if isinstance(item, ArrivedMessage)] == [[], [3, 4], [5]]
    assert reader.intake.close() == []


@pytest.mark.parametrize(
    "skipped",
    [
        pytest.param(message(member="No", unix_fds=2), id="unwanted"),
        pytest.param(long_path(MAX_HEAD, unix_fds=2), id="oversize"),
        pytest.param(message(extra={200: ("s", "\ufdd0")}, unix_fds=2), id="unreadable"),
        pytest.param(message(bytes(100), member="No", unix_fds=2), id="unwanted-with-body"),
    ],
)
def test_attack_c7_descriptors_of_what_is_skipped_are_given_up(skipped: bytes) -> None:
    reader = Reader("No")
    items = reader.feed(skipped[:100], (3, 4))
    items += reader.feed(skipped[100:] + message(member="B", unix_fds=1), (5,))
    assert [item.fds for item in items if isinstance(item, Dropped)] == [[3, 4]]
    assert [item.fds for item in items if isinstance(item, ArrivedMessage)] == [[5]]


def test_attack_c9_descriptors_that_were_cut_off_are_nobodys() -> None:
    reader = Reader()
    items = reader.feed(message(unix_fds=3), (3, 4), cut=True)
    items += reader.feed(message(member="B", unix_fds=1), (5,))
    items += reader.feed(message(member="C", unix_fds=1), (), cut=True)
    items += reader.feed(message(member="D"))
    arrived = [
        (one.header.member, one.fds, one.cut) for one in items if isinstance(one, ArrivedMessage)
    ]
    assert arrived == [("M", [], True), ("B", [5], False), ("C", [], True), ("D", [], False)]
    assert [one.fds for one in items if isinstance(one, Dropped)] == [[3, 4]]


def test_a_descriptor_too_many_is_given_up() -> None:
    reader = Reader()
    items = reader.feed(message(unix_fds=1), (3, 4))
    assert [one.fds for one in items if isinstance(one, ArrivedMessage)] == [[3]]
    assert [one.fds for one in items if isinstance(one, Dropped)] == [[4]]


@given(st.lists(st.sampled_from(["M", "No", "long"]), max_size=8), st.integers(1, 300))
def test_every_descriptor_comes_out_once(kinds: list[str], size: int) -> None:
    reader = Reader("No")
    fds = 0
    out: list[int] = []
    for kind in kinds:
        data = (
            long_path(MAX_HEAD, unix_fds=1) if kind == "long" else message(member=kind, unix_fds=1)
        )
        for at in range(0, len(data), size):
            items = reader.feed(data[at : at + size], (fds,) if at == 0 else ())
            for item in items:
                if isinstance(item, ArrivedMessage):
                    assert item.fds == [fds]
                if isinstance(item, ArrivedMessage | Dropped):
                    out += item.fds
        fds += 1
    assert out + reader.intake.close() == list(range(fds))
