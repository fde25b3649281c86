"""What every exporter produces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Exported:
    """An export.

    files: file name -> text
    names: workload of the inventory -> what the target's importer calls it
    rules: how many rules (policies, permissions) were written
    pairs: how many ordered pairs were compared after reading it back
    notes: what the person who applies it has to know
    untranslated: parts of rules for which the target has no words, as {"where", "why"}; the rest of the rule is written
    """

    files: dict[str, str]
    names: Mapping[str, str]
    rules: int
    pairs: int = 0
    notes: list[str] = field(default_factory=list)
    untranslated: list[dict[str, str]] = field(default_factory=list)
