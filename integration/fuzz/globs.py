"""A pattern is refused with PatternError in one line, or takes no more steps of any text than it is said to cost."""

from typing import Final

from integration.fuzz.pieces import Choices
from policy.globs import (
    PatternError,
    compile_interface,
    compile_member_glob,
    compile_name,
    compile_path,
)
from policy.match import Judge, excess, most_steps
from policy.matcher import Subject
from policy.rules import Access, AccessList, Identity, Rule
from policy.tables import MAX_PATH

_ME: Final = Identity(type="io.snap", app="me")
_COMPILE: Final = (compile_path, compile_interface, compile_member_glob, compile_name)
_LETTERS: Final = "ab01_-./*?{},[!]^"
_ACCESS: Final = (Access.SEND, Access.RECEIVE, Access.SEE)
_LIMIT: Final = 32_768


def check(data: bytes) -> None:
    """Hold the invariant: of patterns alone, then of lists of them."""
    choices = Choices(data)
    compile_one = _COMPILE[choices.byte() % len(_COMPILE)]
    text = "/" + _text(choices.take(choices.byte())).replace("*", "a")
    pattern = _text(choices.take(choices.byte() * 4))
    for one in (pattern, "/" + pattern, f"a.b{pattern}"):
        try:
            compiled = compile_one(one)
        except PatternError as exc:
            assert len(exc.problem.splitlines()) == 1
            assert 0 <= exc.position <= len(one)
            continue
        for subject in (Subject(text), Subject((text * MAX_PATH)[:MAX_PATH])):
            fits = compiled.fits(subject)
            assert subject.steps <= compiled.cost(len(subject.text))
            assert compiled.fits(Subject(subject.text)) == fits
            assert subject.text.startswith(compiled.stem) or not fits
    _check_list(choices, text)


def _check_list(choices: Choices, text: str) -> None:
    rules: list[Rule] = []
    while not choices.ended and len(rules) < 64:
        access = frozenset({_ACCESS[choices.byte() % len(_ACCESS)]})
        size = choices.byte()
        texts = [_text(choices.take(size % 32)) or None for _ in range(4)]
        path = f"/{texts[1]}" if texts[1] else None
        rules.append(
            Rule(access=access, name=texts[0], path=path, interface=texts[2], member=texts[3])
        )
    list_ = AccessList(rules=tuple(rules))
    try:
        judge = Judge(list_, bus="session", me=_ME)
    except PatternError:
        return
    assert max(judge.cost.steps, judge.cost.pieces) <= most_steps(list_)
    told = excess(judge.cost, _LIMIT)
    assert told is None or len(told.splitlines()) == 1
    names = [f"org.{text[:n].replace('/', 'a')}" for n in range(min(len(text), 16))]
    for path in (text, (text * MAX_PATH)[:MAX_PATH]):
        before = judge.steps
        judge.send(names, path, "org.a", "ab", None)
        assert judge.steps - before <= judge.cost.steps


def _text(data: bytes) -> str:
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in data)


def seeds() -> list[bytes]:
    """Return the patterns of the attack, and lists."""
    return [
        _seed(0, "aaaa", "**{?,??,???}*b"),
        _seed(0, "aba0", "{" + "**a*a0_," * 12 + "a}"),
        _seed(0, "a/a", "{a*,*b}{*,}*[ab]?**"),
        _seed(3, "a", "a.b-*[0-1]") + bytes([0, 20]) * 30,
        _seed(1, "b", ".*{a,b.a}?*") + bytes(range(200)),
    ]


def _seed(kind: int, text: str, pattern: str) -> bytes:
    texts = [bytes(_LETTERS.index(char) for char in one) for one in (text, pattern)]
    padded = texts[1] + bytes(-len(texts[1]) % 4)
    return bytes([kind, len(texts[0])]) + texts[0] + bytes([len(padded) // 4]) + padded
