"""A rule's text is refused with RuleSyntaxError in one line, or written anew it judges everything alike."""

from itertools import product
from typing import Final

from integration.fuzz.pieces import text_of
from policy.match import Judge
from policy.rules import AccessList, Identity, Rule
from policy.text import RuleSyntaxError, format_rule, parse_rule

_ME: Final = Identity(type="io.snap", app="me")
_NAMES: Final = ("org.a", "org.a.b", ":1.7")
_PATHS: Final = (None, "/", "/a/b")
_INTERFACES: Final = (None, "org.i")
_PEERS: Final = (None, _ME, Identity(type="io.snap", app="x", component="y"))


def check(data: bytes) -> None:
    """Hold the invariant."""
    text = text_of(data)
    try:
        rule = parse_rule(text)
    except RuleSyntaxError as exc:
        assert len(str(exc).splitlines()) == 1
        assert 1 <= exc.position <= len(text) + 1
        return
    written = format_rule(rule)
    again = parse_rule(written)
    assert format_rule(again) == written
    assert verdicts(again) == verdicts(rule)


def verdicts(rule: Rule) -> list[bool]:
    """Ask a list of this rule alone a few questions."""
    judge = Judge(AccessList(rules=(rule,), receive_from_host=False), bus="session", me=_ME)
    found = [judge.own(name).allowed for name in _NAMES]
    found += [judge.see((name,), peer).allowed for name, peer in product(_NAMES, _PEERS)]
    for name, path, interface, peer in product(_NAMES, _PATHS, _INTERFACES, _PEERS):
        found.append(judge.send((name,), path, interface, "Get", peer).allowed)
        hears = judge.receive((name,), path, interface, "Get", peer, broadcast=True)
        found.append(hears.allowed)
    return found


def seeds() -> list[bytes]:
    """Return rules with everything that the grammar has."""
    return [
        b"send+receive:org.a.*@/a/**:org.*.{Get,Set}?*,peer=app:io.snap/x%2C#y,bus=session",
        b"own:org.a-?*",
        b"see+send:,peer=same-app",
        b"send::1.7@/[a-c]/{a,b{c,d}}:*.G[!x]t,peer=host",
        b"receive:*:**.*",
        b"send:org.a@/a{,/**}:Get",
    ]
