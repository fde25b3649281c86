"""Does a row say what was signed for it? Asked before anything is signed from it again.

Whoever can write to the database (and cannot sign) could else have a label, a tunnel key or a holder of his choice signed
by the CA itself, the next time it signs that row for another reason.
"""

from __future__ import annotations

from typing import Any

import structlog

from ca.desk import Desk
from ca.rows import EndpointRow, InstanceRow
from identity.errors import BadState, NotVerified
from identity.records import EndpointRecord, Payload, PlacementRecord

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
        raise _contradiction(what, "not as signed")


def _open(desk: Desk, kind: Any, envelope: str, what: str) -> Any:
    try:
        return desk.open(kind, envelope)
    except NotVerified as e:
        raise _contradiction(what, f"its record does not hold: {e.message}") from None


def _compare(what: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    wrong = sorted(name for name, (row, said) in pairs.items() if row != said)
    if wrong:
        raise _contradiction(what, f"{', '.join(wrong)} not as signed")


def _contradiction(what: str, why: str) -> BadState:
    log.critical("the database contradicts what was signed; nothing is signed from it", subject=what, why=why)
    return BadState(
        "store.contradiction", f"the database contradicts what was signed for {what}: {why}",
        hint="somebody changed the database: compare with retinue-ca audit list and a backup; a host that was stopped in "
        "the middle of enrolling anew has to enrol again",
    )  # fmt: skip
