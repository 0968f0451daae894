"""What a Filter gives out does not depend on how its input is cut."""

import random
from collections.abc import Callable

import pytest

from broker.wire.interfaces import DRIVER
from broker.wire.marshal import make_error, make_return
from tests.helpers.messages import NO_REPLY, access, big, call, changed, driver_call, signal, split
from tests.helpers.modelbus import ME, Dialogue

OWNERS = {"org.a": ":1.2", "org.b": ":1.3"}


def app_stream(order: Callable[[bytes], bytes]) -> bytes:
    return b"".join(
        map(
            order,
            [
                driver_call(1, "Hello"),
                call(2, "org.a"),
                call(3, "org.a"),
                call(0xFFFFFFF0, "org.a"),
                call(4, "org.b"),
                signal(5, values=("x" * 100,)),
                signal(6, values=("y",)),
                driver_call(7, "AddMatch", "s", ""),
                driver_call(8, "GetNameOwner", "s", "org.a"),
                driver_call(9, "GetNameOwner", "s", "org.b"),
                call(10, "org.a", flags=NO_REPLY),
                changed(call(11, ":1.2"), sender=":1.99", reply_serial=4),
                call(2, "org.a"),
            ],
        )
    )


def bus_stream(order: Callable[[bytes], bytes]) -> bytes:
    return b"".join(
        map(
            order,
            [
                changed(call(20, ME), sender=":1.2"),
                changed(call(21, ME), sender=":1.2"),
                signal(22, sender=":1.2", values=("text",)),
                signal(23, sender=":1.2", values=("texts",)),
                signal(24, sender=":1.3"),
                make_return(25, reply_serial=3, sender=":1.2", destination=ME),
                make_return(26, reply_serial=2, sender=":1.2", destination=ME),
                make_return(26, reply_serial=2, sender=":1.2", destination=ME),
                make_return(27, reply_serial=11, sender=":1.3", destination=ME),
                make_error(28, reply_serial=11, name="a.b", text="c", sender=DRIVER),
            ],
        )
    )


def judged(cuts: Callable[[bytes], list[bytes]], order: Callable[[bytes], bytes]) -> list[bytes]:
    talk = Dialogue(
        access("send:org.a", "send:", "receive:org.a", deny=["send:org.b"]),
        owners=OWNERS,
        hello=False,
    )
    for part in cuts(app_stream(order)):
        talk.app(part)
    for part in cuts(bus_stream(order)):
        talk.deliver(part)
    assert talk.host.bytes_held == 0
    # The gate's answers may overtake the bus's, whose serials differ then; nothing else may differ.
    got = sorted(m.raw[:8] + m.raw[12:] for m in talk.got)
    return got + [m.raw for m in talk.model.seen]


def at_random(seed: int) -> Callable[[bytes], list[bytes]]:
    def cuts(data: bytes) -> list[bytes]:
        choose = random.Random(seed)
        places = sorted(choose.sample(range(1, len(data)), choose.randrange(1, 30)))
        return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]

    return cuts


@pytest.mark.parametrize("order", [bytes, big], ids=["little", "big"])
@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param(lambda data: [data[n : n + 1] for n in range(len(data))], id="bytes"),
        pytest.param(split, id="messages"),
        *(pytest.param(at_random(seed), id=f"random-{seed}") for seed in range(12)),
    ],
)
def test_cutting_the_input_changes_nothing(
    cuts: Callable[[bytes], list[bytes]], order: Callable[[bytes], bytes]
) -> None:
    whole = judged(lambda data: [data], order)
    assert len(whole) > 25
    assert judged(cuts, order) == whole
