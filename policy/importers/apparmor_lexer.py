"""The words of AppArmor's policy language: a cursor over one file, and the regular expressions it moves by.

Which characters make a word depends on where it stands: a `,` within a word ends nothing, braces at the
start of one are a block's. Each expression is tried at the cursor only and takes time linear in what it
takes, and the cursor never goes back.
"""

import re
from bisect import bisect_left
from typing import Final

from policy.importers.report import ImportFileError, Source

# Atomic groups keep a repeat linear where something stands behind it, and forget the way back. Possessive repeats
# would say the same, but Python 3.11.0 to 3.11.4 match those of a group wrongly.
# Words: a comma belongs to one if it is followed by more of it.
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
# A boolean or a set variable, as conditions of `if` name them.
REFERENCE: Final = re.compile(
    r"(?P<kind>[$@])(?:\{(?P<braced>[A-Za-z]\w*)\}|(?P<bare>[A-Za-z]\w*))", re.ASCII
)
CONDITION: Final = re.compile(r"([A-Za-z][A-Za-z0-9_]*)[ \t]*=[ \t]*")
# A placeholder of snapd's templates: to AppArmor it would be a comment.
PLACEHOLDER: Final = re.compile(r"###[A-Z0-9_]+###")
# In peer=(...) neither commas nor parentheses belong to a word.
PEER_WORD: Final = re.compile(r'(?>(?:[^ \t\r\n"!,()\\]+|\\.)+)', re.DOTALL)
# A whole rule about files, without anything that would have to be looked at: most of a profile.
PLAIN_RULE: Final = re.compile(
    r'(?>/[^ \t\r\n"!,\\#{}\[\]@()]*)(?>[ \t]+)(?>[rwaklmixPpCcUu]+)(?>[ \t]*),'
)
# What may stand in a rule that is not ours.
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
    """A place in a file."""

    def __init__(self, source: Source) -> None:
        self.source: Final = source
        self.text: Final = source.text
        self.at = 0
        self._newlines: list[int] | None = None

    def take(self, what: re.Pattern[str]) -> re.Match[str] | None:
        """Move past it if it stands here."""
        found = what.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
        return found

    def peek(self) -> str:
        """Return the next character, or nothing at the end."""
        return self.text[self.at : self.at + 1]

    def skip_blanks(self) -> None:
        """Move past blanks, ends of lines and comments."""
        self.take(BLANKS)

    def line(self, at: int | None = None) -> int:
        """Return the number of the line, from 1."""
        if self._newlines is None:
            self._newlines = [found.start() for found in re.finditer("\n", self.text)]
        return bisect_left(self._newlines, self.at if at is None else at) + 1

    def error(self, problem: str, at: int | None = None) -> ImportFileError:
        """Return an error that says where."""
        return ImportFileError(self.source.name, self.line(at), problem)

    def shown(self) -> str:
        """Return what stands here, for an error."""
        if not self.peek():
            return "the end of the file"
        found = WORD.match(self.text, self.at, self.at + 40)
        return repr(found[0]) if found is not None else repr(self.peek())


def unquote(text: str) -> str:
    """Return the text within quotes. What it escapes stays escaped: globs are read later."""
    return text[1:-1] if text.startswith('"') else text
