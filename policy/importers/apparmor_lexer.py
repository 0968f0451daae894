"""The words of AppArmor's policy language: a cursor over a file, and regular expressions.

The characters of a word depend on the place of the word. A `,` within a word ends nothing, and a
brace at the start of a word belongs to a block. Each expression is tried only at the cursor and
takes time linear in the match. The cursor never goes back.
"""

import re
from bisect import bisect_left
from typing import Final

from policy.importers.report import ImportFileError, Source

# Atomic groups keep a repeat linear when more of the expression follows, and forget the way back.
# Possessive repeats would do the same, but Python 3.11.0 to 3.11.4 match possessive repeats of
# groups wrongly. A comma belongs to a word if more characters of the word follow.
_WORD: Final = r'(?:[^ \t\r\n"!,\\]+|\\.|,(?=[^ \t\r\n"!,]))'
_QUOTED: Final = r'"(?>(?:[^"\\]+|\\.)*)"'
_COMMENT: Final = r"(?>#[^\n]*)"

BLANKS: Final = re.compile(rf"(?>(?:[ \t\r\n]+|(?!#include[ \t<\"]){_COMMENT})+)")
QUOTED: Final = re.compile(_QUOTED, re.DOTALL)
WORD: Final = re.compile(f"(?>{_WORD}+)", re.DOTALL)
KEYWORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
INCLUDE: Final = re.compile(
    r'#?include(?:[ \t]+(?P<exists>if[ \t]+exists)(?=[ \t<"])|(?=[ \t<"]))[ \t]*'
    r'(?:<[ \t]*(?P<system>[^>"\r\n]+?)[ \t]*>|"(?P<quoted>[^"\r\n]+)"|(?P<plain>[^ \t\r\n"!,<>]+))'
)
VARIABLE: Final = re.compile(
    r"@(?:\{(?P<braced>[A-Za-z]\w*)\}|(?P<bare>[A-Za-z]\w*))[ \t]*(?P<how>\+=|:=|\?=|=)", re.ASCII
)
BOOLEAN: Final = re.compile(r"\$\{?[A-Za-z]\w*\}?[ \t]*=[^\n]*", re.ASCII)
VALUE_END: Final = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\r?\n|\Z)")
VALUE_GAP: Final = re.compile(r"(?:[ \t]|\\\r?\n)+")
# A boolean or a variable in a condition of `if`.
REFERENCE: Final = re.compile(
    r"(?P<kind>[$@])(?:\{(?P<braced>[A-Za-z]\w*)\}|(?P<bare>[A-Za-z]\w*))", re.ASCII
)
CONDITION: Final = re.compile(r"([A-Za-z][A-Za-z0-9_]*)[ \t]*=[ \t]*")
# A placeholder of snapd's templates. AppArmor reads placeholders as comments.
PLACEHOLDER: Final = re.compile(r"###[A-Z0-9_]+###")
# In peer=(...) a word has neither commas nor parentheses.
PEER_WORD: Final = re.compile(r'(?>(?:[^ \t\r\n"!,()\\]+|\\.)+)', re.DOTALL)
# A whole file rule that needs no further look. Most rules of a profile are such rules.
PLAIN_RULE: Final = re.compile(
    r'(?>/[^ \t\r\n"!,\\#{}\[\]@()]*)(?>[ \t]+)(?>[rwaklmixPpCcUu]+)(?>[ \t]*),'
)
# Tokens of a rule that is no dbus rule.
OTHER: Final = re.compile(
    rf"(?P<blank>[ \t\r\n]+|{_COMMENT})|(?P<quoted>{_QUOTED})|(?P<end>,)|(?P<brace>[{{}}])"
    rf"|(?P<open>\()|(?P<word>[/@&:^](?>{_WORD}*)"
    rf"|(?>=[ \t]*)(?:[^( \t\r\n\"!,\\](?>{_WORD}*))?"
    r"|[^ \t\r\n\"!,\\(){}=](?>(?:[^ \t\r\n\"!,\\()=]+|,(?=[^ \t\r\n\"!,]))*))|(?P<wrong>.)",
    re.DOTALL,
)
IN_PARENTHESES: Final = re.compile(
    rf'(?P<skip>[^()"]+|{_QUOTED})|(?P<open>\()|(?P<close>\))', re.DOTALL
)
USED_VARIABLE: Final = re.compile(r"@\{([A-Za-z]\w*)\}", re.ASCII)


class Cursor:
    """A position in a file."""

    def __init__(self, source: Source) -> None:
        self.source: Final = source
        self.text: Final = source.text
        self.at = 0
        self._newlines: list[int] | None = None

    def take(self, what: re.Pattern[str]) -> re.Match[str] | None:
        """Return a match at the cursor and move past the match, or return None."""
        found = what.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
        return found

    def peek(self) -> str:
        """Return the next character, or an empty text at the end."""
        return self.text[self.at : self.at + 1]

    def skip_blanks(self) -> None:
        """Move past blanks, line ends and comments."""
        self.take(BLANKS)

    def line(self, at: int | None = None) -> int:
        """Return a line number, from 1."""
        if self._newlines is None:
            self._newlines = [found.start() for found in re.finditer("\n", self.text)]
        return bisect_left(self._newlines, self.at if at is None else at) + 1

    def error(self, problem: str, at: int | None = None) -> ImportFileError:
        """Return an error with the position."""
        return ImportFileError(self.source.name, self.line(at), problem)

    def shown(self) -> str:
        """Return the text at the cursor, for an error."""
        if not self.peek():
            return "the end of the file"
        found = WORD.match(self.text, self.at, self.at + 40)
        return repr(found[0]) if found is not None else repr(self.peek())


def unquote(text: str) -> str:
    """Return the text within quotes. Escapes stay, because globs are read later."""
    return text[1:-1] if text.startswith('"') else text
