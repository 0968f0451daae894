"""The D-Bus part of AppArmor's policy language: text -> profiles with `dbus` rules.

The parser reads whole files with their includes. Rules about other things are skipped after some
checks: quotes and brackets must pair, the comma at the end must be there, the first word must be
known, and variables must exist. So a file that AppArmor's own parser refuses for its form is
refused here, too. Finer checks of rules about other things are left out. The amount of text is
limited, and the limit includes nested includes.
"""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from policy.importers.aare import AareError, check_aare
from policy.importers.apparmor_dbus import DbusRule, parse_dbus_rule
from policy.importers.apparmor_lexer import (
    BOOLEAN,
    CONDITION,
    IN_PARENTHESES,
    INCLUDE,
    KEYWORD,
    OTHER,
    PLAIN_RULE,
    QUOTED,
    REFERENCE,
    USED_VARIABLE,
    VALUE_END,
    VALUE_GAP,
    VARIABLE,
    WORD,
    Cursor,
    unquote,
)
from policy.importers.report import Source

# A resolver returns the files for `include <abstractions/base>` (with the angle brackets) or
# `include "/a/file"`: several files for a directory, and None if there is no such file.
Resolver = Callable[[str], Sequence[Source] | None]

MAX_READ: Final = 64 * 2**20  # characters, with all includes
MAX_DBUS_RULES: Final = 200_000  # of a profile
MAX_INCLUDES: Final = 10_000
MAX_DEPTH: Final = 40  # nesting of includes, and of blocks
MAX_ABI: Final = 4096  # characters of a file name

# A variable that every profile has.
PROFILE_NAME: Final = "profile_name"
# Variables that newer versions of AppArmor set, unless the file sets them.
_SET_BY_ITSELF: Final = frozenset({PROFILE_NAME, "attach_path", "exec_path"})
# Qualifiers before a rule. A rule has qualifiers of each rank at most once, in the order of ranks.
_QUALIFIERS: Final = {
    "priority": 0,
    "audit": 1,
    "quiet": 1,
    "access": 2,
    "allow": 2,
    "deny": 2,
    "prompt": 2,
    "other": 3,
    "owner": 3,
}
_OF_OWNERS: Final = frozenset({"other", "owner"})
# apart from rules that begin with a path or with modes
_WITH_OWNERS: Final = frozenset({"file", "link"})
_RULES: Final = frozenset(
    [
        "all",
        "capability",
        "change_profile",
        "file",
        "io_uring",
        "link",
        "mount",
        "mqueue",
        "network",
        "pivot_root",
        "ptrace",
        "remount",
        "set",
        "signal",
        "umount",
        "unix",
        "unmount",
        "userns",
    ]
)
_BLOCKS: Final = frozenset({"hat", "profile"})
_IN_PREAMBLE: Final = frozenset({"abi", "alias"})
_MODES_OF_PROFILES: Final = frozenset(
    {"complain", "default_allow", "enforce", "kill", "prompt", "unconfined"}
)
_FLAGS: Final = _MODES_OF_PROFILES | {
    "attach_disconnected",
    "audit",
    "chroot_attach",
    "chroot_no_attach",
    "chroot_relative",
    "delegate_deleted",
    "interruptible",
    "mediate_deleted",
    "namespace_relative",
    "no_attach_disconnected",
}
_FLAGS_WITH_VALUES: Final = frozenset({"attach_disconnected.path", "error", "kill.signal"})
_MODES: Final = frozenset("rwaklmixRWAKLMIXpPcCuU")
_EVERYTHING: Final = frozenset({"send", "receive", "bind", "eavesdrop"})


class Profile(msgspec.Struct, kw_only=True):
    """A profile at the top of a file, without child profiles."""

    name: str
    file: str
    line: int
    flags: tuple[str, ...] = ()
    rules: list[DbusRule] = msgspec.field(default_factory=list)


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """The D-Bus part of a file, with variables not yet replaced."""

    profiles: tuple[Profile, ...]
    variables: dict[str, list[str]]
    unread: tuple[
        tuple[str, int, str], ...
    ]  # file, line and name of includes that were not looked up


class _Scope(msgspec.Struct, frozen=True, kw_only=True):
    """The surroundings of a block."""

    profile: Profile | None = None  # None outside of profiles
    skipped: bool = False  # in a hat or a child profile
    qualifiers: frozenset[str] = frozenset()  # of the block
    depth: int = 0
    names: set[str] = msgspec.field(default_factory=set)  # names of the profile's children and hats


def parse_profiles(source: Source, resolve: Resolver | None) -> Parsed:
    """Read a file. Without a resolver, includes are only listed. Raises ImportFileError."""
    parser = _Parser(resolve)
    parser.read(source, _Scope())
    parser.check_variables()
    return Parsed(
        profiles=tuple(parser.profiles),
        variables=parser.variables,
        unread=tuple(parser.unread),
    )


class _Parser:
    def __init__(self, resolve: Resolver | None) -> None:
        self.profiles: Final[list[Profile]] = []
        self.variables: Final[dict[str, list[str]]] = {}
        self.unread: Final[list[tuple[str, int, str]]] = []
        self._resolve: Final = resolve
        self._open: Final[list[str]] = []  # files that are being read
        # variables, with the place of first use
        self._used: Final[dict[str, tuple[Cursor, int]]] = {}
        # variables in the values of other variables
        self._in_values: Final[dict[str, set[str]]] = {}
        self._booleans: Final[dict[str, bool]] = {}
        self._dropping = 0  # number of unmet conditions around the cursor
        self._left = MAX_READ
        self._includes = 0

    def read(self, source: Source, scope: _Scope) -> None:
        self._left -= len(source.text)
        cursor = Cursor(source)
        if self._left < 0:
            raise cursor.error(f"more than {MAX_READ} characters to read, with its includes", 0)
        if (nul := source.text.find("\0")) >= 0:
            raise cursor.error("a NUL character", nul)
        self._open.append(source.name)
        self._block(cursor, scope, opened=None)
        self._open.pop()

    def check_variables(self) -> None:
        """Refuse a variable that is never set.

        Without a resolver nothing is refused, because a file that was not read may set the
        variable.
        """
        if self._resolve is None:
            return
        wanted = list(self._used.items())
        seen = {name for name, _ in wanted}
        while wanted:
            name, (cursor, at) = wanted.pop()
            if name not in self.variables and name not in _SET_BY_ITSELF:
                raise cursor.error(f"variable @{{{name}}} is not set", at)
            more = self._in_values.get(name, set()) - seen
            seen |= more
            wanted += [(each, (cursor, at)) for each in more]

    def _block(self, cursor: Cursor, scope: _Scope, *, opened: int | None) -> None:
        """Read up to the closing brace, or to the end of the file."""
        while True:
            cursor.skip_blanks()
            if scope.profile is not None and cursor.take(PLAIN_RULE):
                continue
            match cursor.peek():
                case "":
                    if opened is not None:
                        raise cursor.error("'{' without '}'", opened)
                    return
                case "}":
                    if opened is None:
                        raise cursor.error("'}' without '{'")
                    cursor.at += 1
                    return
                case "#" | "i" if (found := cursor.take(INCLUDE)) is not None:
                    self._include(
                        cursor,
                        f"<{found['system']}>"
                        if found["system"]
                        else found["quoted"] or found["plain"],
                        scope,
                        at=found.start(),
                        may_miss=found["exists"] is not None,
                    )
                case "@" | "$" if scope.profile is None:
                    self._assign(cursor)
                case _ if scope.profile is None:
                    self._in_preamble(cursor, scope)
                case _:
                    self._rule(cursor, scope)

    def _include(
        self, cursor: Cursor, name: str, scope: _Scope, *, at: int, may_miss: bool
    ) -> None:
        if self._resolve is None:
            self.unread.append((cursor.source.name, cursor.line(at), name))
            return
        self._includes += 1
        if self._includes > MAX_INCLUDES or len(self._open) > MAX_DEPTH:
            raise cursor.error(
                f"more than {MAX_INCLUDES} includes, or {MAX_DEPTH} in each other", at
            )
        sources = self._resolve(name)
        if sources is None:
            if may_miss:
                return
            raise cursor.error(f"cannot include {name}: no such file", at)
        for source in sources:
            if source.name in self._open:
                cycle = " -> ".join([*self._open[self._open.index(source.name) :], source.name])
                raise cursor.error(f"a cycle of includes: {cycle}", at)
            self.read(source, scope)

    def _check_preamble(self, cursor: Cursor, at: int) -> None:
        if self.profiles:
            raise cursor.error("variables, alias and abi belong before the first profile", at)

    def _assign_boolean(self, cursor: Cursor, text: str, at: int) -> None:
        name, _, value = text.partition("=")
        name, value = name.strip("${} \t"), value.strip().strip('"').lower()
        if value not in {"true", "false"}:
            raise cursor.error(f"${name} is neither true nor false", at)
        if name in self._booleans:
            raise cursor.error(f"boolean ${name} is set already", at)
        self._booleans[name] = value == "true"

    def _assign(self, cursor: Cursor) -> None:
        at = cursor.at
        self._check_preamble(cursor, at)
        if (boolean := cursor.take(BOOLEAN)) is not None:
            self._assign_boolean(cursor, boolean[0], at)
            return
        found = cursor.take(VARIABLE)
        if found is None:
            raise cursor.error("'=' missing after a variable: a profile begins with 'profile'", at)
        name, how = found["braced"] or found["bare"], found["how"]
        values = self._values(cursor, name)
        if not values:
            raise cursor.error(f"no value for @{{{name}}}", at)
        known = self.variables.get(name)
        if name == PROFILE_NAME or (how == "=" and known is not None):
            raise cursor.error(f"variable @{{{name}}} is set already", at)
        if how == "+=":
            if known is None:
                raise cursor.error(f"variable @{{{name}}} is not set: '+=' adds to one", at)
            known += values
        elif how != "?=" or known is None:
            self.variables[name] = values

    def _values(self, cursor: Cursor, name: str) -> list[str]:
        values: list[str] = []
        while not cursor.take(VALUE_END):
            gap = cursor.take(VALUE_GAP)
            if values and gap is None:
                raise cursor.error(f"a blank is missing before {cursor.shown()}")
            if cursor.take(VALUE_END):
                break
            at = cursor.at
            found = cursor.take(QUOTED) or cursor.take(WORD)
            if found is None:
                raise cursor.error(f"unexpected {cursor.shown()} in the values of a variable")
            values.append(unquote(found[0]))
            self._in_values.setdefault(name, set()).update(USED_VARIABLE.findall(values[-1]))
            self._check_glob(cursor, USED_VARIABLE.sub("", values[-1]), at)
        return values

    def _in_preamble(self, cursor: Cursor, scope: _Scope) -> None:
        at = cursor.at
        found = KEYWORD.match(cursor.text, at)
        if found is not None and found[0] in _IN_PREAMBLE:
            self._check_preamble(cursor, at)
            cursor.at = found.end()
            if found[0] == "abi":
                self._abi(cursor, at)
            else:
                self._other(cursor, at)
        elif found is not None and found[0] in {"if", "else", "set"}:
            raise cursor.error(f"{found[0]!r} outside of a profile")
        elif found is not None and found[0] in _BLOCKS:
            cursor.at = found.end()
            self._header(cursor, scope, at=at)
        elif cursor.peek() in {"/", ":"} or cursor.text.startswith('"/', cursor.at):
            self._header(cursor, scope, at=at)
        else:
            raise cursor.error(f"{cursor.shown()} outside of a profile")

    def _header(self, cursor: Cursor, scope: _Scope, *, at: int) -> None:
        """Read a profile, starting at the name."""
        cursor.skip_blanks()
        found = cursor.take(QUOTED) or cursor.take(WORD)
        if found is None or found[0] == "{":
            raise cursor.error("a profile without a name", at)
        name = unquote(found[0])
        if scope.profile is not None:
            if name in scope.names:
                raise cursor.error(f"a second profile {name!r} in the same one", at)
            scope.names.add(name)
        flags = self._read_flags(cursor, at)
        profile = Profile(name=name, file=cursor.source.name, line=cursor.line(at), flags=flags)
        top = scope.profile is None
        if top:
            self.profiles.append(profile)
        skipped = not top or scope.skipped
        self._braces(cursor, _Scope(profile=profile, skipped=skipped, depth=scope.depth))

    def _read_flags(self, cursor: Cursor, at: int) -> tuple[str, ...]:
        """Read up to the brace behind a profile's name, and return the flags."""
        flags: tuple[str, ...] = ()
        while True:
            cursor.skip_blanks()
            if cursor.peek() == "{":
                return flags
            condition = cursor.take(CONDITION)
            if cursor.peek() == "(":
                inside = self._parentheses(cursor)
                if condition is None or condition[1] == "flags":
                    if flags:
                        raise cursor.error("flags of a profile a second time", at)
                    flags = _flags(cursor, inside, at)
            elif condition is not None or not (cursor.take(QUOTED) or cursor.take(WORD)):
                raise cursor.error(f"'{{' expected after the name of a profile: {cursor.shown()}")

    def _braces(self, cursor: Cursor, scope: _Scope) -> None:
        opened = cursor.at
        if scope.depth == MAX_DEPTH:
            raise cursor.error(f"more than {MAX_DEPTH} blocks in each other")
        cursor.at += 1
        inner = msgspec.structs.replace(scope, depth=scope.depth + 1)
        self._block(cursor, inner, opened=opened)

    def _rule(self, cursor: Cursor, scope: _Scope) -> None:
        at = cursor.at
        qualifiers, keyword = self._qualifiers(cursor)
        inner = msgspec.structs.replace(scope, qualifiers=scope.qualifiers | qualifiers)
        self._check_qualifiers(cursor, qualifiers, keyword, at)
        if keyword is None and qualifiers and cursor.peek() == "{":
            self._braces(cursor, inner)
        elif keyword == "abi" and not inner.qualifiers:
            self._abi(cursor, at)
        elif keyword == "if" and not qualifiers:
            self._condition(cursor, scope, at)
        elif keyword in _BLOCKS:
            self._header(cursor, scope, at=at)
        elif keyword is None and cursor.peek() == "^":
            cursor.at += 1
            self._header(cursor, scope, at=at)
        elif keyword == "dbus":
            self._keep(inner, parse_dbus_rule(cursor, inner.qualifiers, at=at))
        else:
            _check_begin(cursor, keyword, at)
            self._other(cursor, at)
            if keyword == "all":
                self._keep(inner, DbusRule.make(cursor, inner.qualifiers, _EVERYTHING, at=at))

    def _keep(self, scope: _Scope, rule: DbusRule) -> None:
        for value in rule.conditions.values():
            self._look_at(rule.cursor, value, rule.at)
        if not scope.skipped and not self._dropping and scope.profile is not None:
            scope.profile.rules.append(rule)
            if len(scope.profile.rules) > MAX_DBUS_RULES:
                raise rule.cursor.error(f"more than {MAX_DBUS_RULES} dbus rules", rule.at)

    def _check_qualifiers(
        self, cursor: Cursor, found: frozenset[str], keyword: str | None, at: int
    ) -> None:
        """Refuse qualifiers in front of rules that cannot have such qualifiers."""
        is_block = keyword is None and cursor.peek() == "{"
        if is_block and "deny" in found:
            raise cursor.error("'deny' before a block: it stands before each rule", at)
        if keyword is None or keyword in _WITH_OWNERS or set(keyword) <= _MODES:
            return
        if owners := _OF_OWNERS & found:
            raise cursor.error(f"{min(owners)!r} before a rule that is not about files", at)

    def _abi(self, cursor: Cursor, at: int) -> None:
        """Read a feature file's name after `abi`.

        The file, about abilities of the kernel, is not read.
        """
        cursor.skip_blanks()
        if cursor.peek() == "<":
            end = cursor.text.find(">", cursor.at, cursor.at + MAX_ABI)
            if end < 0:
                raise cursor.error("'<' without '>'")
            cursor.at = end + 1
        elif cursor.take(QUOTED) is None and cursor.take(WORD) is None:
            raise cursor.error("abi without the name of a file", at)
        cursor.skip_blanks()
        if cursor.peek() != ",":
            raise cursor.error("',' missing after abi", at)
        cursor.at += 1

    def _condition(self, cursor: Cursor, scope: _Scope, at: int) -> None:
        """Read `if` with all branches, of which at most one counts."""
        done = False
        while True:
            met = not done and self._is_met(cursor, at)
            self._branch(cursor, scope, counts=met, at=at)
            done = done or met
            cursor.skip_blanks()
            word = KEYWORD.match(cursor.text, cursor.at)
            if word is None or word[0] != "else":
                return
            cursor.at = word.end()
            cursor.skip_blanks()
            word = KEYWORD.match(cursor.text, cursor.at)
            if word is None or word[0] != "if":
                self._branch(cursor, scope, counts=not done, at=at)
                return
            cursor.at = word.end()
            if done:
                self._is_met(cursor, at)

    def _branch(self, cursor: Cursor, scope: _Scope, *, counts: bool, at: int) -> None:
        cursor.skip_blanks()
        if cursor.peek() != "{":
            raise cursor.error("'{' missing after a condition", at)
        self._dropping += not counts
        names = scope.names if counts else set[str]()
        self._braces(cursor, msgspec.structs.replace(scope, names=names))
        self._dropping -= not counts

    def _is_met(self, cursor: Cursor, at: int) -> bool:
        """Read `[not] $boolean` or `[not] defined VARIABLE`."""
        negated, defined = False, False
        while True:
            cursor.skip_blanks()
            word = cursor.take(KEYWORD)
            if word is None:
                break
            if word[0] not in {"not", "defined"} or defined:
                raise cursor.error(f"unexpected {word[0]!r} in a condition", word.start())
            defined = word[0] == "defined"
            negated ^= word[0] == "not"
        found = cursor.take(REFERENCE)
        if found is None:
            raise cursor.error("a condition without a variable", at)
        name = found["braced"] or found["bare"]
        if defined:
            known = self._booleans if found["kind"] == "$" else self.variables
            return (name in known) ^ negated
        if found["kind"] == "@" or name not in self._booleans:
            raise cursor.error(f"boolean ${name} is not set", found.start())
        return self._booleans[name] ^ negated

    def _qualifiers(self, cursor: Cursor) -> tuple[frozenset[str], str | None]:
        """Return the qualifiers before a rule, and the rule's first word."""
        found: set[str] = set()
        place = -1
        while True:
            cursor.skip_blanks()
            word = KEYWORD.match(cursor.text, cursor.at)
            if word is None:
                return frozenset(found), None
            cursor.at = word.end()
            if word[0] not in _QUALIFIERS:
                return frozenset(found), word[0]
            if _QUALIFIERS[word[0]] <= place:
                raise cursor.error(f"{word[0]!r} stands too late before a rule", word.start())
            place = _QUALIFIERS[word[0]]
            found.add(word[0])
            if word[0] == "priority":
                cursor.skip_blanks()
                if cursor.peek() != "=":
                    raise cursor.error("'=' missing after priority")
                cursor.at += 1
                cursor.skip_blanks()
                cursor.take(WORD)

    def _other(self, cursor: Cursor, at: int) -> None:
        """Skip the rest of a rule that is no dbus rule, with the comma."""
        while (found := cursor.take(OTHER)) is not None:
            match found.lastgroup:
                case "end":
                    return
                case "word" | "quoted":
                    self._look_at(cursor, unquote(found[0]), found.start())
                case "open":
                    cursor.at = found.start()
                    self._parentheses(cursor)
                case "brace" | "wrong":
                    break
                case _:
                    pass
        if found is None:
            raise cursor.error("',' missing at the end of a rule", at)
        problem = "'\"' without another" if found[0] == '"' else f"unexpected {found[0]!r}"
        raise cursor.error(f"{problem} in a rule: does the one before lack its ','?", found.start())

    def _parentheses(self, cursor: Cursor) -> str:
        """Skip from `(` to the matching `)`, and return the text in between."""
        start, depth = cursor.at, 0
        while (found := cursor.take(IN_PARENTHESES)) is not None:
            match found.lastgroup:
                case "open":
                    depth += 1
                case "close":
                    depth -= 1
                    if not depth:
                        return cursor.text[start + 1 : cursor.at - 1]
                case _:
                    pass
        raise cursor.error("'(' without ')'", start)

    def _look_at(self, cursor: Cursor, word: str, at: int) -> None:
        if "@" in word:
            for name in USED_VARIABLE.findall(word) if not self._dropping else ():
                self._used.setdefault(name, (cursor, at))
            word = USED_VARIABLE.sub("", word)
        self._check_glob(cursor, word, at)

    def _check_glob(self, cursor: Cursor, word: str, at: int) -> None:
        if "{" in word or "[" in word or "}" in word:
            try:
                check_aare(word)
            except AareError as exc:
                raise cursor.error(str(exc), at) from None


def _check_begin(cursor: Cursor, keyword: str | None, at: int) -> None:
    """Refuse text that begins like no kind of rule."""
    if keyword is None and VARIABLE.match(cursor.text, cursor.at):
        raise cursor.error("a variable is set in a profile")
    if keyword is None and cursor.peek() not in {"/", "@", '"'}:
        raise cursor.error(f"unexpected {cursor.shown()}: no rule begins like this")
    if keyword is not None and keyword not in _RULES and not set(keyword) <= _MODES:
        raise cursor.error(f"unknown rule {keyword!r}", at)


def _flags(cursor: Cursor, text: str, at: int) -> tuple[str, ...]:
    """Return the flags of a profile.

    Raises ImportFileError for unknown or conflicting flags.
    """
    flags = tuple(text.replace(",", " ").split())
    if not flags:
        raise cursor.error("no flags between '(' and ')'", at)
    for flag in flags:
        if flag not in _FLAGS and flag.partition("=")[0] not in _FLAGS_WITH_VALUES:
            raise cursor.error(f"unknown flag of a profile: {flag[:40]!r}", at)
    modes = sorted(_MODES_OF_PROFILES & set(flags))
    if len(modes) > 1:
        raise cursor.error(f"flags of a profile that exclude each other: {' '.join(modes)}", at)
    return flags
