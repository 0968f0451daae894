import contextlib
from typing import Any

import pytest
from hypothesis import given, strategies as st

from broker.bus.codec import (
    MAX_BODY,
    MAX_STEPS,
    STEPS_A_SLICE,
    Packer,
    TooLongError,
    Unpacker,
    Variant,
)
from broker.bus.values import pack, unpack

# What one step may be over, because something is not cut: an array of numbers, or a signature.
UNCUT = 256


def slices(unpacker: Unpacker | Packer) -> int:
    """Run to the end; return how many slices it took."""
    count = 1
    while not unpacker.run():
        count += 1
    return count


@pytest.mark.parametrize(
    ("signature", "value"),
    [
        pytest.param("av", [Variant("y", 0)] * (MAX_STEPS // 3), id="variants"),
        pytest.param("as", ["x"] * (MAX_STEPS - 10), id="texts"),
        pytest.param("a(bs)", [(True, "x")] * (MAX_STEPS // 3 - 10), id="structs"),
        pytest.param("a{sv}", {str(n): Variant("u", n) for n in range(20_000)}, id="dicts"),
        pytest.param("aas", [[] for _ in range(MAX_STEPS // 2)], id="empty-arrays"),
        pytest.param("as", ["x" * 100_000] * 50, id="long-texts"),
        pytest.param(
            "av",
            [Variant("(" + "u" * 200 + ")", (1,) * 200)] * (MAX_STEPS // 500),
            id="long-signatures",
        ),
    ],
)
def test_attack_c6_a_body_is_read_and_written_a_bounded_slice_at_a_time(
    signature: str, value: Any
) -> None:
    packer = Packer(signature, [value])
    assert slices(packer) >= packer.spent // (STEPS_A_SLICE + UNCUT)
    assert packer.longest_slice <= STEPS_A_SLICE + UNCUT
    unpacker = Unpacker(signature, packer.body)
    assert slices(unpacker) >= unpacker.spent // (STEPS_A_SLICE + UNCUT)
    assert unpacker.longest_slice <= STEPS_A_SLICE + UNCUT
    assert unpacker.values == [value]


def test_attack_c6_the_longest_list_of_rules_is_within_the_limits() -> None:
    rules = [
        (6, f"org.example.Name{n}", "/org/example/a/b/c", "org.example.I") for n in range(10_000)
    ]
    metadata = {str(n): Variant("y", 1) for n in range(8_000)}
    body = pack("a{sv}a{sv}", [metadata, {"Allow": Variant("a(usos)", rules)}])
    assert len(body) < MAX_BODY // 4
    unpacker = Unpacker("a{sv}a{sv}", body)
    slices(unpacker)
    assert unpacker.spent < MAX_STEPS


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        pytest.param("av", pack("av", [[Variant("y", 0)] * MAX_STEPS]), id="variants"),
        pytest.param("au", pack("au", [[0] * (MAX_STEPS + 1)]), id="numbers"),
        pytest.param("aay", pack("aay", [[b""] * MAX_STEPS]), id="empty-arrays"),
        pytest.param("a(y)", pack("a(y)", [[(1,)] * MAX_STEPS]), id="structs"),
    ],
)
def test_attack_c6_more_values_than_anybody_needs_are_refused(signature: str, body: bytes) -> None:
    unpacker = Unpacker(signature, body)
    with pytest.raises(TooLongError, match=f"more than {MAX_STEPS} values"):
        slices(unpacker)
    assert (
        unpacker.spent <= MAX_STEPS + len(body) // 4
    )  # an array of numbers is counted before it is read
    assert sum(map(len, unpacker.values)) == 0


def test_numbers_are_counted_before_they_are_read() -> None:
    body = pack("au", [[0] * 500_000])
    unpacker = Unpacker("au", body)
    with pytest.raises(TooLongError):
        unpacker.run()
    assert unpacker.values == []


@pytest.mark.parametrize("opener", ["(", "a", "v"])
def test_attack_c6_nesting_is_bounded(opener: str) -> None:
    if opener == "v":
        body = b"\1v\0" * 70 + b"\1y\0\0"
        with pytest.raises(ValueError, match="nested too deep"):
            Unpacker("v", body).run()
        return
    with pytest.raises(ValueError, match="not of type"):
        unpack(opener * 40 + "y" + (")" * 40 if opener == "(" else ""), bytes(200))


def test_an_answer_over_the_limit_stops_being_written() -> None:
    asked = []

    def texts() -> Any:
        for n in range(1_000_000):
            asked.append(n)
            yield "x" * 1000

    packer = Packer("as", [texts()], max_bytes=50_000)
    with pytest.raises(TooLongError, match="more than 50000 bytes"):
        slices(packer)
    assert len(asked) < 60


def test_an_iterators_elements_are_asked_for_as_the_steps_allow() -> None:
    asked = []

    def texts() -> Any:
        for n in range(10_000):
            asked.append(n)
            yield str(n)

    packer = Packer("as", [texts()])
    assert not packer.run(100)
    assert 90 < len(asked) <= 110
    slices(packer)
    assert unpack("as", packer.body) == [[str(n) for n in range(10_000)]]


@given(
    st.sampled_from(["a{sv}", "av", "a(bs)", "aas", "(sv)", "ssa{sv}a{sv}", "sa(bs)b", "au"]),
    st.binary(max_size=300),
    st.integers(1, 20),
)
def test_slices_make_no_difference(signature: str, body: bytes, steps: int) -> None:
    results = []
    for size in (steps, 10**6):
        unpacker = Unpacker(signature, body)
        with contextlib.suppress(ValueError):
            while not unpacker.run(size):
                pass
            results.append(unpacker.values)
    assert len(results) in (0, 2)
    assert results[:1] == results[1:]


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("s", b"\1\0\0\0a"),
        ("s", b"\1\0\0\0ab"),
        ("s", b"\3\0\0\0a\0b\0"),
        ("b", b"\2\0\0\0"),
        ("yu", b"\1\1\0\0\1\0\0\0"),
        ("u", b"\1\0\0\0\0"),
        ("au", b"\3\0\0\0\0\0\0\0"),
        ("as", b"\1\0\0\0\0\0\0\0\0"),
        ("v", b"\2yy\0\0"),
        ("o", b"\1\0\0\0a\0"),
        ("g", b"\1(\0"),
    ],
)
def test_what_no_bus_would_pass_is_refused(signature: str, body: bytes) -> None:
    with pytest.raises(ValueError, match="not of type"):
        unpack(signature, body)
