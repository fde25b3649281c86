"""`retinue policy fmt`: even spacing, nothing else. Comments, order, quoting and line breaks stay as they were written.

It only changes spaces between tokens on one line, spaces at line ends, blank lines in a row and the end of the file, and
it proves the result: the formatted text reads as the same document with the same comments, or it is not returned.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

import yaml

from identity.errors import BadPolicy, Bug
from policy.document import Node, parse

_OPEN: Final = (yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)
_CLOSE: Final = (yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
_BLANKS: Final = re.compile(r" *")
_REST: Final = re.compile(r"\s*\Z")
_FAST: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_ALIKE: Final = re.compile(r"[\n -~]*")
# Where the two scanners differ: a key sign within a flow, and a comment at once after the sign of a block text.
_UNLIKE: Final = re.compile(r"\?(?=[\s,\[\]{}]|\Z)|[|>][-+0-9]*#")


def fmt(file: str, text: str) -> str:
    """The text in even spacing. Raises BadPolicy for what is not one plain YAML document."""
    before = parse(file, text)
    text = text.replace("\r\n", "\n").removeprefix("\ufeff")
    out = _tidy_lines(_space_tokens(text))
    if out != text and (not same(parse(file, out), before) or _comments(out) != _comments(text)):
        raise Bug(
            "policy.fmt",
            "formatting would have changed the meaning of the file",
            hint="leave the file as it is and report it",
        )
    return out


def same(one: Node, other: Node) -> bool:
    """Do two trees say the same, positions aside?"""
    if (one.kind, one.text, one.null) != (other.kind, other.text, other.null):
        return False
    if len(one.items) != len(other.items) or list(one.entries) != list(other.entries):
        return False
    pairs = list(zip(one.items, other.items, strict=True))
    pairs += [(one.entries[key][1], other.entries[key][1]) for key in one.entries]
    return all(same(a, b) for a, b in pairs)


@lru_cache(maxsize=2)  # a tidy text is looked at three times
def _tokens(text: str) -> tuple[Any, ...]:
    """What stands in the text, with exact character offsets: found by the fast scanner where both read it alike."""
    if _ALIKE.fullmatch(text) and not _UNLIKE.search(text):
        try:
            return _scanned(_FAST(text))
        except yaml.YAMLError:
            pass  # what is wrong, and where, is said by the other one
    try:
        return _scanned(yaml.SafeLoader(text))
    except yaml.MarkedYAMLError as error:  # a little stricter than the reader of policies
        mark = error.problem_mark
        raise BadPolicy("policy.syntax", f"not valid YAML: {error.problem}", line=mark.line + 1 if mark else 0,
                        column=mark.column + 1 if mark else 0) from None  # fmt: skip


def _scanned(loader: Any) -> tuple[Any, ...]:
    out = []
    try:
        while loader.check_token():
            out.append(loader.get_token())
    finally:
        loader.dispose()
    return tuple(t for t in out if t.end_mark.index > t.start_mark.index)


def _space_tokens(text: str) -> str:
    """In brackets one space after ``:`` and ``,``, none at the brackets, where only spaces stand between two tokens."""
    tokens = _tokens(text)
    out, at, depth = [], 0, 0
    for one, two in zip(tokens, tokens[1:], strict=False):
        depth += isinstance(one, _OPEN) - isinstance(one, _CLOSE)
        start, end = one.end_mark.index, two.start_mark.index
        if start < at or not _BLANKS.fullmatch(text, start, end):
            continue
        space = _space(one, two, flow=depth > 0)
        if space is not None:
            out += [text[at:start], space]
            at = end
    return "".join(out) + text[at:]


def _space(one: Any, two: Any, *, flow: bool) -> str | None:
    """What belongs between two tokens of a line; None: leave it. Outside brackets spaces align columns, so they stay."""
    if not flow:
        return None
    if isinstance(one, _OPEN) or isinstance(two, (*_CLOSE, yaml.FlowEntryToken)):
        return ""
    if isinstance(one, yaml.FlowEntryToken | yaml.ValueToken):
        return " "
    return "" if isinstance(two, yaml.ValueToken) and isinstance(one, yaml.ScalarToken) else None


def _tidy_lines(text: str) -> str:
    """No spaces at line ends, at most one blank line in a row, one line end at the end; texts over several lines excepted."""
    inside: set[int] = set()
    open_end = False
    for token in _tokens(text):
        if isinstance(token, yaml.ScalarToken):
            inside.update(range(token.start_mark.line, token.end_mark.line))
            # A block text that the file ends in has as many line ends as stand there.
            open_end = token.style in {"|", ">"} and _REST.match(text, token.end_mark.index) is not None
            if open_end:
                inside.update(range(token.end_mark.line, text.count("\n") + 1))
    out: list[str] = []
    blank = True
    for number, line in enumerate(text.split("\n")):
        kept = line if number in inside else line.rstrip(" \t")
        if not kept and blank and number not in inside:
            continue
        blank = not kept
        out.append(kept)
    if open_end:
        return "\n".join(out)
    while out and not out[-1]:
        out.pop()
    return "\n".join(out) + "\n"


def _comments(text: str) -> list[str]:
    """The comments of a file, in order."""
    tokens = _tokens(text)
    out, at = [], 0
    for start, end in [*((t.start_mark.index, t.end_mark.index) for t in tokens), (len(text), len(text))]:
        for line in text[at:start].split("\n"):
            _, hash_mark, words = line.partition("#")
            if hash_mark:
                out.append(words.rstrip())
        at = max(at, end)
    return out
