"""What a sandbox's connections take together."""

from dataclasses import dataclass, field

import pytest

from broker.gate.sandbox.budgets import end_slowest_reader, find_slowest_reader
from broker.wire.errors import PeerQuotaError


@dataclass(eq=False)
class App:
    name: str
    queued: int
    is_alone: bool = False  # what waits is one message
    ended: list[Exception] = field(default_factory=list)

    @property
    def behind(self) -> int:
        return 0 if self.is_alone else self.queued

    def failed(self, exc: Exception) -> None:
        self.ended.append(exc)


@pytest.mark.parametrize(
    ("waiting", "worst"),
    [
        pytest.param([], None, id="none"),
        pytest.param([40, 60], None, id="just-as-much-as-may-wait"),
        pytest.param([0, 101, 0], "1", id="one-alone"),
        pytest.param([30, 41, 30], "1", id="all-together"),
    ],
)
def test_who_is_most_behind_has_to_go(waiting: list[int], worst: str | None) -> None:
    apps = [App(str(number), count) for number, count in enumerate(waiting)]
    found = find_slowest_reader(apps, 100)
    assert (found and found.name) == worst


@pytest.mark.parametrize(
    ("waiting", "worst"),
    [
        pytest.param([5000], None, id="a-message-of-any-size"),
        pytest.param([5000, 0, 0], None, id="nothing-beside-it"),
        pytest.param([5000, 60, 40], None, id="as-much-beside-it-as-may-wait"),
        pytest.param([5000, 60, 41], "1", id="too-much-beside-it"),
        pytest.param([50, 4000, 5000], "1", id="two-large-ones"),
    ],
)
def test_one_message_may_wait_for_one_connection_whatever_its_size(
    waiting: list[int], worst: str | None
) -> None:
    apps = [App(str(number), count, is_alone=True) for number, count in enumerate(waiting)]
    found = find_slowest_reader(apps, 100)
    assert (found and found.name) == worst


def test_connections_that_are_behind_count_beside_the_one_with_a_large_message() -> None:
    large, deaf, other = App("large", 5000, is_alone=True), App("deaf", 70), App("other", 40)
    assert find_slowest_reader([large, deaf, other], 110) is None
    assert find_slowest_reader([large, deaf, other], 109) is deaf


def test_who_is_ended_is_whoever_is_worst() -> None:
    deaf, other = App("deaf", 101), App("other", 0)
    end_slowest_reader(other, [deaf, other], 101)
    assert not deaf.ended
    end_slowest_reader(other, [deaf, other], 100)
    assert [str(exc) for exc in deaf.ended] == ["does not read what it is sent"]
    with pytest.raises(PeerQuotaError, match="does not read"):
        end_slowest_reader(deaf, [deaf, other], 100)
    assert not other.ended
