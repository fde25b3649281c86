"""What every importer produces, and how it says no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from identity.errors import Refused
from policy.imported import ImportedPolicy
from policy.program import Subject, Where

Files = Mapping[str, str]  # relative name -> text, in the order they are read


class SourceRefused(Refused):
    """The configuration is one that the source system itself would reject; the message names the culprit."""

    def __init__(self, code: str, message: str, *, where: Where | str | None = None, hint: str = "") -> None:
        said = f"{where}: {message}" if where else message
        super().__init__(f"import.{code}", said, hint=hint or "its own system would refuse it, too: correct it there")


@dataclass(frozen=True, slots=True)
class Untranslated:
    """Something that was not carried over. What is dropped never widens access; `why` says what is missing."""

    where: str
    why: str


@dataclass(slots=True)
class Imported:
    """The result of an import.

    ids:   names in the inventory that the source calls otherwise (product name -> source name)
    tests: in-file tests of the source, in file order: index and outcome
    rules: how many rules the source has
    """

    policy: ImportedPolicy
    inventory: tuple[Subject, ...]
    untranslated: list[Untranslated] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    rules: int = 0
    notes: list[str] = field(default_factory=list)


class Source:
    """Parsed values with the places they stood at. Positions are kept for maps and lists, by identity."""

    MAX_DEPTH: Final = 64

    def __init__(self) -> None:
        self._marks: dict[int, tuple[Any, Where]] = {}

    def mark(self, value: Any, where: Where) -> None:
        """Remember where a map or list began; keeps the value alive so that its identity stays its own."""
        self._marks[id(value)] = (value, where)

    def where(self, value: Any) -> Where | None:
        """The place of a map or list, None when it has none."""
        found = self._marks.get(id(value))
        return found[1] if found else None
