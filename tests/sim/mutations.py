"""Bugs planted in the product's own code while a simulation runs: the simulator has to find every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy import update

from ca import rows, schema
from ca.feed import Feed
from ca.placements import Placements
from identity.errors import Conflict
from mesh.sync import SyncMachine


def _forward_anywhere() -> Any:
    """A receiver that goes back to earlier positions."""
    return patch.object(SyncMachine, "_forward", lambda *_: None)


def _act_before_persist() -> Any:
    """An agent that acts on a record before it is on disk."""
    from tests.sim.agent import SimAgent

    save = SimAgent._save

    def later(self: SimAgent) -> None:
        self.apply()
        self.sim.ledger.persisted(self)  # what it has in force is what it must never go back behind
        save(self)

    return patch.object(SimAgent, "_save", later)


def _no_tombstones() -> Any:
    """A feed that forgets to say what is gone (and computes its hash over what it says)."""
    note = Feed._note

    def without(self: Feed, seat: Any, changed: frozenset[str]) -> None:
        note(self, seat, frozenset(k for k in changed if seat.view.get(k) is not None))

    return patch.object(Feed, "_note", without), patch.object(SyncMachine, "_need", lambda self, reason: [])


def _no_compare_and_swap() -> Any:
    """Two movers commit what they read."""
    real, movable = Placements._still, Placements._movable

    def several(self: Placements, tx: Any, name: str, instance: int, to: str) -> Any:
        try:
            return movable(self, tx, name, instance, to)
        except Conflict as e:
            if e.code != "move.running":
                raise
            return rows.instance(tx, name, instance), rows.living_endpoint(tx, to)

    def blind(self: Placements, tx: Any, move: Any) -> Any:
        try:
            return real(self, tx, move)
        except Conflict:
            return move.instance

    def overwrite(tx: Any, row: Any, *_: Any, **values: Any) -> None:
        c = schema.instances.c
        tx.execute(update(schema.instances).where(c.name == row.name, c.instance == row.instance).values(**values))

    return (patch.object(Placements, "_still", blind), patch.object(Placements, "_swap", staticmethod(overwrite)),
            patch.object(Placements, "_movable", several))  # fmt: skip


def _empty_on_error() -> Any:
    """A control plane that takes an error for an empty answer (the database was busy: nobody is anywhere)."""
    from ca.scope import World

    real = World.view

    def view(self: World, endpoint: str) -> Any:
        made = real(self, endpoint)
        if len(made.own) > 2:
            made.own = {k: v for k, v in made.own.items() if not k.startswith("placement/")}
        return made

    return patch.object(World, "view", view)


MUTATIONS: dict[str, Callable[[], Any]] = {
    "no position check": _forward_anywhere,
    "act before persist": _act_before_persist,
    "no tombstones": _no_tombstones,
    "no compare-and-swap": _no_compare_and_swap,
    "empty on error": _empty_on_error,
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug is in force."""
    made = MUTATIONS[name]()
    patches = made if isinstance(made, tuple) else (made,)
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
