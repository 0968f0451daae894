"""Rules made to be slow, on real buses: they work, or are refused with the reason."""

import pytest

from integration.harness.rawclient import CallError
from integration.harness.stage import DENIED, PASSED, PATH, Stage, call

LONG = "/" + "a" * 2040
# The two of the case: many alternations, and many wildcards in many alternatives.
ALTERNATIONS = "@/**{?,??,???,????,?????,??????}*bN"
ALTERNATIVES = "@/{" + ",".join(["**a*a0x"] * 60) + "}"


def test_attack_c4_slow_patterns_and_long_paths_are_judged_as_ever(stage: Stage) -> None:
    name = stage.name()
    host = stage.host(name)
    rules = [f"send:{name}{ALTERNATIONS}", f"send:{name}{ALTERNATIVES}"]
    app = stage.app(*rules, *(f"send:org.x{n}{ALTERNATIONS}" for n in range(100)))
    neighbour = stage.app(f"send:{name}")
    for path, expected in (
        (LONG, DENIED),
        (f"{LONG[:2030]}bN", PASSED),
        (f"{LONG[:2030]}a0x", PASSED),
        (f"/{'b' * 2040}", DENIED),
    ):
        assert call(app, host, name, path=path) == expected
        assert call(neighbour, host, name) == PASSED


def test_attack_c4_thousands_of_globs_work(stage: Stage) -> None:
    name = stage.name()
    host, app, neighbour = stage.host(name), stage.app(), stage.app(f"send:{name}")
    stage.set_rules(app, *(f"send:{name}@/org/x{n}/**/y*z" for n in range(9990)))
    assert call(neighbour, host, name) == PASSED
    assert call(app, host, name, path="/org/x77/a/b/y1z") == PASSED
    assert call(app, host, name, path="/org/x77/a/b/y1") == DENIED
    assert call(app, host, name, path=LONG) == DENIED
    facts = stage.warden.show(stage.sandbox(app))
    assert 9990 < facts["use"]["rule_steps"] <= 32_768


def test_attack_c4_a_list_that_costs_too_much_is_refused_whole(stage: Stage) -> None:
    name = stage.name()
    host, app = stage.host(name), stage.app(f"send:{name}@{PATH}")
    slow = [f"send:{name}@/**a*{n}b*" for n in range(6000)]
    with pytest.raises(CallError, match=r"rule_steps=32768 would be exceeded: .*@/\*\*a") as caught:
        stage.warden.change_access(stage.sandbox(app), rules=slow)
    assert caught.value.name.endswith(".LimitsExceeded")
    with pytest.raises(CallError, match="rule_steps=32768 would be exceeded"):
        stage.warden.add_server(rules=slow)
    # Nothing has changed.
    assert call(app, host, name) == PASSED
    assert len(stage.warden.show(stage.sandbox(app))["access"]) == 1
