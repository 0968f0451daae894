import contextlib

import pytest
from hypothesis import given, strategies as st

from policy.importers.flatpak import DEFAULTS, import_flatpak
from policy.importers.report import Imported, ImportFileError, Source
from policy.match import Judge
from policy.rules import Identity
from policy.text import format_rule

ME = Identity(type="org.flatpak", app="org.example.App")
METADATA = """
# comment
[Application]
name=org.example.App
runtime=org.example.Platform/x86_64/1

[Context]
shared=network;ipc;
sockets=x11;wayland;

[Session Bus Policy]
org.example.Talk = talk
org.example.See=see
org.example.Own.*=own

[System Bus Policy]
org.example.System=talk

[Accessibility Bus Policy]
org.example.Reader=talk

[Environment]
X=org.example.Nothing=talk
"""
# Of every filtered bus: what xdg-dbus-proxy always does.
ALWAYS = ["send+receive:org.freedesktop.DBus", "send:org.freedesktop.DBus,peer=host"]


def imported(*texts: str, app_id: str | None = None) -> Imported:
    sources = [Source(f"f{number}", text) for number, text in enumerate(texts)]
    return import_flatpak(sources, app_id=app_id)


def said(bus: str, *texts: str) -> list[str]:
    rules = [rule for rule in imported(*texts).access.rules if rule.bus == bus]
    found = [format_rule(rule).removesuffix(f",bus={bus}") for rule in rules]
    return [text for text in found if text not in ALWAYS]


def test_metadata_of_an_app() -> None:
    assert said("session", METADATA) == [
        "send+receive+own:org.example.App.*",
        "send+receive+own:org.mpris.MediaPlayer2.org.example.App.*",
        "send:org.freedesktop.portal.*",
        "receive:org.freedesktop.portal.*@/org/freedesktop/portal{,/**}",
        "send+receive:org.example.Talk",
        "see:org.example.See",
        "send+receive+own:org.example.Own.*",
    ]
    assert said("system", METADATA) == ["send+receive:org.example.System"]
    a11y = said("accessibility", METADATA)
    assert a11y[-1] == "send+receive:org.example.Reader"
    root = "@/org/a11y/atspi/accessible/root:org.a11y.atspi.Socket.Embed"
    assert a11y[0] == f"send:org.a11y.atspi.Registry{root}"
    assert len(a11y) == 10
    assert imported(METADATA).access.receive_from_host


def test_rules_know_where_they_come_from() -> None:
    origins = {rule.name: rule.origin for rule in imported(METADATA).access.rules}
    assert origins["org.example.Talk"] == "f0:12: --talk=org.example.Talk"
    assert origins["org.example.App.*"].startswith("flatpak, flatpak_context_add_bus_filters()")


def test_defaults_say_where_they_are_known_from() -> None:
    assert all(default.source.startswith("flatpak, ") for default in DEFAULTS)


def test_later_files_override() -> None:
    override = "[Session Bus Policy]\norg.example.Talk=none\norg.example.See=talk\n"
    rules = said("session", METADATA, override)
    assert "send+receive:org.example.Talk" not in rules
    assert "send+receive:org.example.See" in rules
    assert "see:org.example.See" not in rules
    again = said("session", METADATA, override, "[Session Bus Policy]\norg.example.Talk=see\n")
    assert "see:org.example.Talk" in again


def test_an_app_without_system_policy_has_no_system_bus() -> None:
    text = "[Application]\nname=org.example.App\n"
    assert [rule for rule in imported(text).access.rules if rule.bus == "system"] == []


def test_a_socket_is_the_whole_bus() -> None:
    text = "[Application]\nname=org.example.App\n[Context]\nsockets=session-bus;system-bus;\n"
    assert said("session", text) == ["send+receive+own+see:"]
    assert said("system", text) == ["send+receive+own+see:"]
    override = "[Context]\nsockets=!session-bus;!x11;"
    assert "send+receive+own+see:" not in said("session", text, override)


def test_what_cannot_be_said_is_listed() -> None:
    text = "[Session Bus Policy]\norg.a=speak\n[Context]\nsockets=if:session-bus:has-x;if:x11:y\n"
    reasons = [each.reason for each in imported(text).unsaid]
    assert sum("ignores the entry" in reason for reason in reasons) == 1
    assert sum("conditional" in reason for reason in reasons) == 1
    assert sum("app's identifier" in reason for reason in reasons) == 2
    assert sum("unique names" in reason for reason in reasons) == 1
    named = [each.reason for each in imported("", app_id="org.example.App").unsaid]
    assert not any("identifier" in reason for reason in named)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[Session Bus Policy]\norg..a=talk", "f0:2: 'org..a' is no bus name"),
        ("[Session Bus Policy]\norg.*=talk", "f0:2: 'org' is no bus name"),
        ("[Session Bus Policy]\n:1.2=talk", "f0:2: ':1.2' is a unique name"),
        ("[Application]\nname=x", "f0:2: 'x' is no bus name"),
        ("[broken\n", "f0:1: bad group"),
        ("[]\n", "f0:1: bad group"),
        ("\n[a]\nnothing\n", "f0:3: neither key=value nor group"),
        ("[a]\n=x\n", "f0:2: neither"),
        ("a=b\n", "f0:1: a key before the first group"),
    ],
)
def test_bad_file_is_an_error(text: str, problem: str) -> None:
    with pytest.raises(ImportFileError) as caught:
        imported(text)
    assert str(caught.value).startswith(problem)


LINES = st.one_of(
    st.sampled_from(
        [*METADATA.splitlines(), "[Context]", "sockets=session-bus;!system-bus;if:session-bus"]
    ),
    st.text(),
)


@given(st.lists(LINES).map("\n".join))
def test_any_text_gives_rules_or_the_error(text: str) -> None:
    with contextlib.suppress(ImportFileError):
        access = imported(text).access
        for bus in ("session", "system", "accessibility"):
            Judge(access, bus=bus, me=ME)
