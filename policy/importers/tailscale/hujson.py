"""HuJSON: JSON with comments and trailing commas, parsed with positions.

The grammar is RFC 8259 plus ``//`` and ``/* */`` comments and one trailing comma per list or map.
"""

from __future__ import annotations

import bisect
import json
import re
from typing import Any, Final

from policy.importers.model import Source, SourceRefused
from policy.program import Where

_SPACE: Final = re.compile(r"(?:[ \t\r\n\ufeff]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING: Final = re.compile(r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"')
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS: Final = {"true": True, "false": False, "null": None}
MAX_NUMBER: Final = 64  # characters; a longer number has no use in a policy


def parse_hujson(file: str, text: str, source: Source) -> Any:
    """The value of a HuJSON text; places of maps and lists go into `source`. Raises SourceRefused with a position."""
    return _Parser(file, text, source).document()


class _Parser:
    def __init__(self, file: str, text: str, source: Source) -> None:
        self.file, self.text, self.source = file, text, source
        self.at = 0
        self.lines = [0, *(m.end() for m in re.finditer("\n", text))]

    def document(self) -> Any:
        value = self.value(0)
        self.space()
        if self.at < len(self.text):
            raise self.bad("something follows the end of the document")
        return value

    def where(self, at: int) -> Where:
        line = bisect.bisect_right(self.lines, at)
        return Where(self.file, line, at - self.lines[line - 1] + 1)

    def bad(self, message: str, at: int | None = None) -> SourceRefused:
        where = self.where(self.at if at is None else at)
        return SourceRefused("syntax", f"not valid HuJSON: {message}", where=f"{where}:{where.column}")

    def space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None  # it matches the empty string
        self.at = match.end()
        if self.text.startswith("/*", self.at):
            raise self.bad("a comment is not closed")

    def value(self, depth: int) -> Any:
        self.space()
        if depth > Source.MAX_DEPTH:
            raise self.bad(f"nested deeper than {Source.MAX_DEPTH} levels")
        first = self.text[self.at : self.at + 1]
        if first == "{":
            return self.map(depth)
        if first == "[":
            return self.list(depth)
        if first == '"':
            return self.string()
        for word, meaning in _LITERALS.items():
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return meaning
        number = _NUMBER.match(self.text, self.at)
        if number is None or len(number[0]) > MAX_NUMBER:
            raise self.bad(f"unexpected {first!a}" if first else "the text ends too early")
        self.at = number.end()
        return json.loads(number[0])

    def string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if match is None:
            raise self.bad("a string is not closed or has a bad escape")
        self.at = match.end()
        return str(json.loads(match[0]))

    def map(self, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        self.source.mark(out, self.where(self.at))
        self.at += 1
        while not self.closed("}"):
            start = self.at
            if not self.text.startswith('"', self.at):
                raise self.bad("a key must be a string")
            key = self.string()
            if key in out:
                raise self.bad(f"the key {ascii(key)[:60]} is given twice", start)
            self.space()
            if not self.text.startswith(":", self.at):
                raise self.bad("a colon is missing after a key")
            self.at += 1
            out[key] = self.value(depth + 1)
            self.comma("}")
        return out

    def list(self, depth: int) -> list[Any]:
        out: list[Any] = []
        self.source.mark(out, self.where(self.at))
        self.at += 1
        while not self.closed("]"):
            out.append(self.value(depth + 1))
            self.comma("]")
        return out

    def closed(self, end: str) -> bool:
        self.space()
        if self.text.startswith(end, self.at):
            self.at += 1
            return True
        return False

    def comma(self, end: str) -> None:
        self.space()
        if self.text.startswith(",", self.at):
            self.at += 1
        elif not self.text.startswith(end, self.at):
            short = self.at >= len(self.text)
            raise self.bad("the text ends too early" if short else "a comma or closing bracket is missing")
