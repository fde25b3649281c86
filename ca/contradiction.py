"""Does a row say what was signed for it? Asked before anything is signed from it again.

Whoever can write to the database (and cannot sign) could else have a label, a tunnel key or a holder of his choice signed
by the CA itself, the next time it signs that row for another reason.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

import structlog

from ca.desk import Desk
from ca.rows import EndpointRow, InstanceRow
from identity.entries import EntriesRecord
from identity.errors import BadState, NotVerified
from identity.records import EndpointRecord, Payload, PlacementRecord, PolicyRecord

if TYPE_CHECKING:
    from ca.policies import PolicyRow

CONTRADICTION: Final = "store.contradiction"

log = structlog.get_logger("retinue.ca")


def check_instance(desk: Desk, row: InstanceRow, *, life: bool = True) -> None:
    """Compare an instance with its newest signed placement; one that was never placed has none.

    life: also its end; False where the caller has just changed that. Raises BadState ``store.contradiction``.
    """
    if row.placement is None:
        _compare(row.key, {"epoch": (row.epoch, 0), "state": (row.endpoint, None)})
        return
    said = _open(desk, PlacementRecord, row.placement, row.key)
    held = row.state in {"active", "moving"} and row.endpoint is not None
    pairs: dict[str, tuple[Any, Any]] = {
        "name": ((row.name, row.instance, row.spiffe_id), (said.name, said.instance, said.spiffe_id)),
        "labels": (dict(row.labels), said.labels),
        "fence": (row.fence, said.fence),
        "addresses": (row.addresses(desk.trust_domain), said.addresses),
        "epoch": (row.epoch, said.epoch),
        "epoch_top": (row.epoch_top >= row.epoch, True),
        "state": ("active" if held else "revoked", said.state),
    }
    if held:
        pairs["endpoint"] = (row.endpoint, said.endpoint)
    if life and held:
        pairs["ends_at"] = (row.ends_at, said.ends)
    _compare(row.key, pairs)


def check_endpoint(desk: Desk, row: EndpointRow) -> None:
    """Compare an enrolled endpoint with its record. Raises BadState ``store.contradiction``."""
    if row.record is None or row.state != "enrolled":
        return
    said = _open(desk, EndpointRecord, row.record, row.name)
    _compare(row.name, {
        "name": (row.name, said.endpoint), "kind": (row.kind, said.kind), "tunnel_key": (row.tunnel_key, said.tunnel_key),
        "generation": (row.generation >= said.generation, True),
    })  # fmt: skip


def check_row(desk: Desk, what: str, envelope: str, wanted: Payload) -> None:
    """Was exactly this signed for a row? Raises BadState ``store.contradiction``."""
    if _open(desk, type(wanted), envelope, what) != wanted:
        raise contradiction(what, "not as signed")


def check_set(desk: Desk, endpoint: str, before: str | None, now: Collection[str], added: str | None, removed: Collection[str]) -> None:
    """Do the ids of an endpoint's entries follow from the set signed last? Raises BadState ``store.contradiction``."""
    said = set() if before is None else {e.id for e in _open(desk, EntriesRecord, before, f"the entries of {endpoint}").entries}
    expected = (said | ({added} if added is not None else set())) - set(removed)
    if expected != set(now):
        wrong = ", ".join(sorted(expected ^ set(now))[:5])
        raise contradiction(f"the entries of {endpoint}", f"{wrong} came or went without a signature")


def check_policy(desk: Desk, row: PolicyRow) -> None:
    """Compare a policy revision with its record. Raises BadState ``store.contradiction``."""
    what = f"policy revision {row.revision}"
    said = _open(desk, PolicyRecord, row.record, what)
    _compare(what, {
        "revision": (row.revision, said.revision), "digest": (row.digest, said.digest), "author": (row.author, said.author),
        "files": ([tuple(f) for f in row.files], [(f.name, f.text) for f in said.files]),
        "trial": (row.trial, None if said.trial is None else said.trial.model_dump_json()),
    })  # fmt: skip


def _open(desk: Desk, kind: Any, envelope: str, what: str) -> Any:
    try:
        return desk.open(kind, envelope)
    except NotVerified as e:
        raise contradiction(what, f"its record does not hold: {e.message}") from None


def _compare(what: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    wrong = sorted(name for name, (row, said) in pairs.items() if row != said)
    if wrong:
        raise contradiction(what, f"{', '.join(wrong)} not as signed")


def contradiction(what: str, why: str) -> BadState:
    """The error and the alarm for a row that does not say what was signed for it."""
    log.critical("the database contradicts what was signed; nothing is signed from it", subject=what, why=why)
    return BadState(
        CONTRADICTION, f"the database contradicts what was signed for {what}: {why}",
        hint="somebody changed the database: compare with retinue-ca audit list and a backup; a host that was stopped in "
        "the middle of enrolling anew has to enrol again",
    )  # fmt: skip
