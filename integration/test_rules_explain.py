"""`explain` gives the verdicts of the gate, also about the bus itself, and sufficient suggestions."""

from typing import Any, Final

import pytest

from integration.harness.rawclient import BUS, BUS_PATH
from integration.harness.stage import DENIED, INTERFACE, PASSED, PATH, Stage, call
from integration.harness.supervised import MANAGE_PATH, NAME
from integration.harness.values import Variant

POLICY: Final = "org.buswarden.Broker1.Policy"


def explain(stage: Stage, sandbox: str, **message: str) -> dict[str, Any]:
    said = {key: Variant("s", text) for key, text in {"bus": "session", **message}.items()}
    host = stage.warden.host
    (why,) = host.ask(NAME, MANAGE_PATH, POLICY, "Explain", "sa{sv}", (sandbox, said))
    return dict(why)


# Calls to the bus about itself: what a sandbox without rules may call, and what no rule allows.
BUS_CALLS: Final = [
    (BUS, "GetId", "", ()),
    (BUS, "ListNames", "", ()),
    (BUS, "GetNameOwner", "s", (BUS,)),
    (BUS, "GetConnectionUnixUser", "s", (BUS,)),
    (BUS, "AddMatch", "s", ("type='signal'",)),
    (f"{BUS}.Peer", "Ping", "", ()),
    (f"{BUS}.Introspectable", "Introspect", "", ()),
    (BUS, "NoSuchMethod", "", ()),
    (f"{BUS}.Peer", "GetMachineId", "", ()),
    (BUS, "UpdateActivationEnvironment", "a{ss}", ({},)),
    (f"{BUS}.Monitoring", "BecomeMonitor", "asu", ([], 0)),
    (f"{BUS}.Debug.Stats", "GetStats", "", ()),
]


@pytest.mark.parametrize(("interface", "member", "signature", "values"), BUS_CALLS)
def test_program_p3_explain_and_the_gate_agree_about_the_bus(
    stage: Stage, interface: str, member: str, signature: str, values: tuple[Any, ...]
) -> None:
    app = stage.app()
    question = {
        "direction": "send",
        "name": BUS,
        "path": BUS_PATH,
        "interface": interface,
        "member": member,
    }

    def is_refused() -> bool:
        stage.denials(app)
        before = len(stage.denials(app))
        error = app.call(BUS, BUS_PATH, interface, member, signature, values).error
        refused = len(stage.denials(app)) > before
        assert error == DENIED or not refused
        return refused

    why = explain(stage, stage.sandbox(app).id, **question)
    assert why["allowed"] is not is_refused()
    if why["allowed"]:
        return
    for suggestion in why["suggestions"]:
        stage.set_rules(app, suggestion.removeprefix("allow "))
    assert explain(stage, stage.sandbox(app).id, **question)["allowed"] is not is_refused()
    assert is_refused() is not bool(why["suggestions"])


def test_program_p3_a_suggestion_is_about_the_service_that_was_meant(stage: Stage) -> None:
    name = stage.name()
    host, other, app = stage.host(name), stage.host(), stage.app("see:")
    question = {"direction": "send", "path": PATH, "interface": INTERFACE, "member": "Do"}
    for address in (name, host.unique_name):
        why = explain(stage, stage.sandbox(app).id, name=address, **question)
        (suggestion,) = why["suggestions"]
        stage.set_rules(app, "see:", suggestion.removeprefix("allow "))
        assert call(app, host, address) == PASSED
        assert call(app, other, other.unique_name) == DENIED
        stage.set_rules(app, "see:")


def test_program_p3_owning_and_seeing_are_explained(stage: Stage) -> None:
    name = stage.name()
    app = stage.app()
    stage.host(f"{name}.host")
    id_ = stage.sandbox(app).id
    for direction, wanted in (("own", name), ("see", f"{name}.host")):
        why = explain(stage, id_, direction=direction, name=wanted)
        assert not why["allowed"]
        (suggestion,) = why["suggestions"]
        stage.set_rules(app, suggestion.removeprefix("allow "))
        assert explain(stage, id_, direction=direction, name=wanted)["allowed"]
        if direction == "own":
            assert app.request_name(name) == 1
        else:
            assert app.driver("NameHasOwner", "s", wanted) == (True,)
