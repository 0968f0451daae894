"""Attack C1 (docs/threats.md): what the bus brings because of a sandbox is paid by that sandbox, and by nobody else.

What is charged is counted; how long others have to wait meanwhile is measured by `make bench` (rows `fair-*`).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from integration.harness.buses import Bus
from integration.harness.rawclient import RawClient
from integration.harness.supervised import Sandbox, Warden, wait_for
from integration.harness.threats import open_limited

RATE: Final = 2000  # messages a second
HEARERS: Final = 6
TURNS: Final = 40
LITTLE: Final = 20  # messages
NAME: Final = "org.example.Villain.Name"
NEWS: Final = "org.example.News"
GLOB: Final = "see:org.example.V?llain.*"


class Stage:
    """A sandbox that floods, others that only hear of it, and the bill of each."""

    def __init__(self, warden: Warden, *, villain: list[str], hearer: list[str]) -> None:
        self.warden: Final = warden
        self.villain: Final = warden.add_server("org.example.Villain", rules=villain)
        boxes = [warden.add_server(f"org.example.Hearer{n}", rules=hearer) for n in range(HEARERS)]
        self.hearers: Final = boxes
        self.ears: Final = [warden.connect(box) for box in boxes]

    def attack(self) -> RawClient:
        return self.warden.connect(self.villain)

    def use(self, box: Sandbox, what: str) -> int:
        used: dict[str, int] = self.warden.show(box)["use"]
        return used.get(what, 0)

    def settle(self) -> None:
        """Return when all that was sent has been heard."""
        for ear in self.ears:
            ear.driver("GetId")

    def bills(self) -> list[int]:
        self.settle()
        return [self.use(box, "caused") for box in self.hearers]

    def paid_since(self, before: list[int]) -> int:
        """Return what most of the hearers have been charged at the most.

        Asking whether all was heard costs them something; and where the machine had something else to do in the
        middle of that, its time does.
        """
        paid = [now - then for now, then in zip(self.bills(), before, strict=True)]
        return sorted(paid)[HEARERS // 2]

    @contextlib.contextmanager
    def only_villain_pays(self, least: int) -> Iterator[None]:
        """See that the villain is charged that much, and the hearers no more than without a flood."""
        before, bills = self.use(self.villain, "caused"), self.bills()
        yield
        self.settle()
        wait_for(lambda: self.use(self.villain, "caused") - before >= least, 20)
        assert self.use(self.villain, "throttled") > 0
        assert self.paid_since(bills) <= LITTLE
        assert all(self.use(box, "throttled") == 0 for box in self.hearers)


OpenStage = Callable[..., contextlib.AbstractContextManager[Stage]]


@pytest.fixture
def open_stage(bus: Bus, folder: Path) -> OpenStage:
    @contextlib.contextmanager
    def opened(*, villain: list[str], hearer: list[str]) -> Iterator[Stage]:
        with open_limited(
            bus,
            folder,
            messages_per_second=RATE,
            match_rules=1024,
            names=256,
            pending_calls=4096,
        ) as warden:
            yield Stage(warden, villain=villain, hearer=hearer)
            assert "Traceback" not in warden.log

    return opened


def flip(client: RawClient, turns: int) -> None:
    """Take a name and give it back so often, without waiting in between."""
    serials = []
    for _ in range(turns):
        serials.append(start_driver(client, "RequestName", "su", NAME, 4))
        serials.append(start_driver(client, "ReleaseName", "s", NAME))
    for serial in serials:
        client.wait_reply(serial, 30)


def start_driver(client: RawClient, member: str, signature: str, *values: object) -> int:
    driver = "org.freedesktop.DBus"
    return client.start_call(driver, "/org/freedesktop/DBus", driver, member, signature, values)


def test_attack_c1_owner_changes_that_others_hear(open_stage: OpenStage) -> None:
    with open_stage(villain=[f"own:{NAME}"], hearer=[GLOB]) as stage:
        client = stage.attack()
        with stage.only_villain_pays(2 * TURNS * HEARERS * 4):
            flip(client, TURNS)


def test_attack_c1_owner_changes_that_own_connections_hear(open_stage: OpenStage) -> None:
    with open_stage(villain=[f"own:{NAME}"], hearer=[]) as stage:
        client, *listeners = [stage.attack() for _ in range(6)]
        for listener in listeners:
            for number in range(100):
                rule = f"type='signal',arg0='org.example.x{number}'"
                start_driver(listener, "AddMatch", "s", rule)
            listener.driver("GetId")
        with stage.only_villain_pays(2 * TURNS * len(listeners) * 4):
            flip(client, TURNS)


def test_attack_c1_owner_changes_of_who_owns_many_names(open_stage: OpenStage) -> None:
    with open_stage(villain=["own:org.example.Villain.*"], hearer=[GLOB]) as stage:
        client = stage.attack()
        for number in range(200):
            client.request_name(f"org.example.Villain.n{number}")
        with stage.only_villain_pays(2 * TURNS * HEARERS * 4):
            flip(client, TURNS)


def test_attack_c1_broadcasts_that_nobody_may_hear(open_stage: OpenStage) -> None:
    with open_stage(villain=["send:"], hearer=[]) as stage:
        client, *listeners = [stage.attack() for _ in range(6)]
        ears = [*listeners, *stage.ears]
        for ear in ears:
            ear.add_match(f"type='signal',interface='{NEWS}'")
        with stage.only_villain_pays(500 * len(ears)):
            for _ in range(500):
                client.emit("/", NEWS, "Changed")
            client.driver("GetId")
        heard = [message.header.member for ear in ears for message in ear.drain(0.1)]
        assert "Changed" not in heard


def test_attack_c1_connections_that_ask_for_many_names(open_stage: OpenStage) -> None:
    with open_stage(villain=["see:org.example.h?*"], hearer=[GLOB]) as stage:
        owner = stage.warden.connect_host()
        for number in range(100):
            owner.request_name(f"org.example.h{number}")
        with stage.only_villain_pays(5 * 100 * 5):
            for _ in range(5):
                with stage.attack() as client:
                    assert client.name_owner("org.example.h0") == owner.unique_name


def test_attack_c1_what_a_host_causes_is_nobodys(open_stage: OpenStage) -> None:
    with open_stage(
        villain=[f"own:{NAME}"], hearer=[GLOB, "receive:@/:org.example.News.*"]
    ) as stage:
        owner = stage.warden.connect_host()
        stage.attack()
        before, mark = stage.bills(), stage.use(stage.villain, "caused")
        flip(owner, 20)
        for ear in stage.ears:
            ear.add_match(f"type='signal',interface='{NEWS}'")
        assert stage.paid_since(before) <= LITTLE
        middle = stage.bills()
        for _ in range(20):
            owner.emit("/", NEWS, "Changed")
        owner.driver("GetId")
        for ear in stage.ears:
            ear.wait_signal("Changed")
        assert stage.paid_since(middle) <= LITTLE
        assert stage.use(stage.villain, "caused") == mark
