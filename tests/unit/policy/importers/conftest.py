"""Asking an import for its truth table, through its written files: what is asked is what a reader of them gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from policy.evaluate import permitted, split
from policy.imported import dump_imported, load_imported
from policy.importers.model import Imported
from policy.inventory import dump_inventory, load_inventory
from policy.nets import ranges_of, show
from policy.program import Program, Subject


def reread(imported: Imported) -> tuple[Program, tuple[Subject, ...]]:
    text = dump_imported(imported.policy)
    policy = load_imported("policy.yaml", text)
    assert policy.program.tiers == imported.policy.program.tiers
    assert dump_imported(policy) == text
    subjects = load_inventory("inventory.yaml", dump_inventory(imported.inventory))
    assert subjects == imported.inventory
    return policy.program, subjects


@pytest.fixture
def table() -> Callable[[Imported], dict[tuple[str, str], str]]:
    """(src, dst) -> ports as text, for inside subjects; pairs that are allowed nothing are left out."""

    def ask(imported: Imported) -> dict[tuple[str, str], str]:
        program, subjects = reread(imported)
        inside = [s for s in subjects if not s.nets]
        return {
            (a.name, b.name): str(found)
            for a in inside
            for b in inside
            if a is not b and (found := permitted(program, a, b))
        }

    return ask


@pytest.fixture
def parts() -> Callable[[Imported, str, str], dict[str, str]]:
    """Address range -> ports as text, between a subject and an outside one; ranges allowed nothing are left out."""

    def ask(imported: Imported, src: str, dst: str) -> dict[str, str]:
        program, subjects = reread(imported)
        by_name = {s.name: s for s in subjects}
        out = {}
        for one in split(program, by_name[src]):
            for other in split(program, by_name[dst]):
                found = permitted(program, one, other)
                if found:
                    outside = other if other.nets else one
                    out[", ".join(show(r) for r in ranges_of(outside.nets))] = str(found)
        return out

    return ask
