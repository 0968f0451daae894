"""What a sandbox's connections take together."""

from dataclasses import dataclass

import pytest

from broker.gate.use import find_too_far_behind


@dataclass(frozen=True)
class App:
    name: str
    behind: int


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
    found = find_too_far_behind(apps, 100)
    assert (found and found.name) == worst
