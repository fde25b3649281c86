"""YAML files as trees that know their positions. Safe by construction: no tags, no anchors, no aliases, bounded.

Every scalar stays text; what reads it decides what it means, so ``env: no`` is the label value ``no`` and a date stays
as written. Built from parser events without recursion, so nesting cannot exhaust the stack.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, cast

import yaml

from identity.errors import BadPolicy

# Our limits.
MAX_CHARS: Final = 4 * 1024 * 1024
MAX_DEPTH: Final = 24

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_INT: Final = re.compile(r"[0-9]{1,15}")
_HINTS: Final = {  # where the place of the fault has none of its own
    "label.key": "small letters, digits, . _ and -, such as app; the words of the language are taken",
    "label.value": "letters, digits, . _ / : and -, at most 63 of them, with a letter or digit at both ends",
    "policy.alias": "use a named group or service instead",
    "policy.cycle": "take one out of the other; what both need can be a group of its own",
    "policy.duplicate": "rename one of the two, or remove it",
    "policy.duplicate_id": "rename one of the two, or remove it",
    "policy.duplicate_key": "remove one of the two",
    "policy.empty": "an empty one never means all; remove it or fill it",
    "policy.empty_selector": 'an empty selector never means everybody; write "*" for that',
    "policy.grant_end": "a grant ends after it begins",
    "policy.missing_key": "what belongs here: retinue policy schema",
    "policy.name": "letters, digits, . _ and -",
    "policy.number": "digits only, within the limits named",
    "policy.outside_scope": "a flow between scopes needs offers: on one side and accepts: on the other",
    "policy.tag": "leave out what begins with !",
    "policy.too_complex": "split it: fewer groups within groups, or a label for what they list",
    "policy.too_deep": "name the inner ones as groups",
    "policy.type": "what belongs here: retinue policy schema",
    "policy.unknown_value": "declare it under labels: {keys: {KEY: [VALUES]}}",
    "policy.value": "what belongs here: retinue policy schema",
}


_NO_ENTRIES: Final[Mapping[str, tuple[Any, Any]]] = MappingProxyType({})  # shared by all scalars and lists


@dataclass(slots=True)
class Node:
    """A scalar (`text`), a list (`items`) or a map (`entries`: key -> (key node, value node)); position 1-based."""

    kind: str  # scalar | list | map
    file: str
    line: int
    column: int
    text: str = ""
    plain: bool = False
    items: Sequence[Node] = ()
    entries: Mapping[str, tuple[Node, Node]] = field(default_factory=lambda: _NO_ENTRIES)

    def bad(self, code: str, message: str, hint: str = "") -> BadPolicy:
        """The error at this node, to be raised."""
        return BadPolicy(code, message, file=self.file, line=self.line, column=self.column, hint=hint or _HINTS.get(code, ""))

    @property
    def null(self) -> bool:
        """Nothing written (``key:``) or an explicit null."""
        return self.kind == "scalar" and self.plain and self.text in _NULLS

    def scalar(self, what: str) -> str:
        """The text of a scalar that is not null. Raises BadPolicy."""
        if self.kind != "scalar":
            raise self.bad("policy.type", f"{what} must be one value, not a {self.kind}")
        if self.null:
            raise self.bad("policy.empty", f"{what} is empty")
        return self.text

    def sequence(self, what: str) -> Sequence[Node]:
        """The items of a list. Raises BadPolicy."""
        if self.kind != "list":
            raise self.bad(
                "policy.type",
                f"{what} must be a list",
                hint='write each entry on a line of its own, beginning with "- "',
            )
        return self.items

    def one_or_more(self, what: str) -> Sequence[Node]:
        """A list, or one scalar or map as a list of one; empty is refused. Raises BadPolicy."""
        nodes = self.items if self.kind == "list" else [self]
        if not nodes or self.null:
            raise self.bad("policy.empty", f"{what} is empty")
        return nodes

    def mapping(
        self, what: str, known: Collection[str] | None = None, required: Collection[str] = ()
    ) -> dict[str, Node]:
        """The values of a map by key; a key outside `known` is refused with its nearest neighbour. Raises BadPolicy."""
        if self.kind != "map":
            raise self.bad("policy.type", f"{what} must be a map of key: value")
        for key, (key_node, _) in self.entries.items():
            if known is not None and key not in known:
                raise key_node.bad(
                    "policy.unknown_key", f"unknown key {ascii(key)[:60]} in {what}", hint=nearest(key, known)
                )
        for key in required:
            if key not in self.entries:
                raise self.bad("policy.missing_key", f"{what} needs the key {key}")
        return {key: value for key, (_, value) in self.entries.items()}

    def pairs(self) -> Iterator[tuple[str, Node, Node]]:
        """(key, key node, value node) of a map."""
        for key, (key_node, value) in self.entries.items():
            yield key, key_node, value

    def integer(self, what: str, low: int, high: int) -> int:
        """A whole number in low..high. Raises BadPolicy."""
        text = self.scalar(what)
        if not _INT.fullmatch(text) or not low <= int(text) <= high:
            raise self.bad("policy.number", f"{what} must be a whole number from {low} to {high}")
        return int(text)


def nearest(word: str, known: Collection[str]) -> str:
    """``did you mean KEY?``, or the list of what is known."""
    close = difflib.get_close_matches(word[:60], sorted(known), n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(sorted(known)[:20])}" if known else ""


def quote(text: str) -> str:
    """A text as a double-quoted YAML scalar that reads back the same, whatever is in it (lone surrogates excepted)."""
    escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(escaped)}"'


def parse(file: str, text: str) -> Node:
    """The one document of a file. Raises BadPolicy with the position of what is wrong."""
    if len(text) > MAX_CHARS:
        raise BadPolicy("policy.too_large", f"the file has {len(text)} characters; at most {MAX_CHARS}", file=file,
                        hint="split it into several files")  # fmt: skip
    try:
        return _build(file, text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable as YAML"
        raise BadPolicy(
            "policy.syntax", f"not valid YAML: {problem}", file=file, line=mark.line + 1 if mark else _line(text, error),
            column=mark.column + 1 if mark else _column(text, error), hint="check indentation, quotes and brackets near this position",
        ) from None  # fmt: skip
    except UnicodeError:
        raise BadPolicy(
            "policy.encoding", "the file is not valid Unicode text", file=file, hint="save it as UTF-8"
        ) from None


def _line(text: str, error: yaml.YAMLError) -> int:
    position = getattr(error, "position", None)
    return text.count("\n", 0, position) + 1 if isinstance(position, int) and position >= 0 else 0


def _column(text: str, error: yaml.YAMLError) -> int:
    position = getattr(error, "position", None)
    return position - text.rfind("\n", 0, position) if isinstance(position, int) and position >= 0 else 0


def _build(file: str, text: str) -> Node:
    loader = _LOADER(text)
    try:
        return _tree(file, loader)
    finally:
        loader.dispose()


def _tree(file: str, loader: Any) -> Node:
    root: Node | None = None
    stack: list[Node] = []
    pending: list[Node | None] = []  # per open map: the key that waits for its value
    while loader.check_event():
        event = loader.get_event()
        if isinstance(event, yaml.events.SequenceEndEvent | yaml.events.MappingEndEvent):
            stack.pop()
            pending.pop()
            continue
        if isinstance(event, yaml.events.DocumentStartEvent) and root is not None:
            raise _at(file, event).bad(
                "policy.documents", "a file holds one document", hint="remove the line ---"
            )
        if not isinstance(event, yaml.events.NodeEvent):
            continue
        node = _node(file, event)
        if not stack:
            root = node
        else:
            _attach(stack[-1], pending, node)
        if node.kind != "scalar":
            if len(stack) >= MAX_DEPTH:
                raise node.bad("policy.too_deep", f"nested deeper than {MAX_DEPTH} levels")
            stack.append(node)
            pending.append(None)
    if root is None:
        raise BadPolicy(
            "policy.empty", "the file is empty", file=file, line=1, column=1, hint="begin with meshpolicy: 1"
        )
    return root


def _at(file: str, event: Any) -> Node:
    mark = event.start_mark
    return Node("scalar", file, mark.line + 1, mark.column + 1)


def _node(file: str, event: Any) -> Node:
    node = _at(file, event)
    if event.anchor is not None:
        raise node.bad(
            "policy.alias",
            "anchors and aliases are not accepted",
            hint="use a named group or service instead",
        )
    if event.tag is not None and event.tag != "!":
        raise node.bad("policy.tag", "YAML tags are not accepted")
    if isinstance(event, yaml.events.ScalarEvent):
        node.text, node.plain = event.value, not event.style
    else:
        node.kind = "list" if isinstance(event, yaml.events.SequenceStartEvent) else "map"
        if node.kind == "list":
            node.items = []
        else:
            node.entries = {}
    return node


def _attach(parent: Node, pending: list[Node | None], node: Node) -> None:
    if parent.kind == "list":
        cast("list[Node]", parent.items).append(node)
        return
    key = pending[-1]
    if key is None:
        if node.kind != "scalar":
            raise node.bad("policy.type", "a key must be a plain word")
        if node.text in parent.entries:
            first = parent.entries[node.text][0]
            raise node.bad(
                "policy.duplicate_key",
                f"the key {ascii(node.text)[:60]} is given twice (first in line {first.line})",
            )
        pending[-1] = node
        return
    cast("dict[str, tuple[Node, Node]]", parent.entries)[key.text] = (key, node)
    pending[-1] = None
