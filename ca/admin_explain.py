"""`retinue-ca explain identity`: what the CA knows of an instance's identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web
from sqlalchemy import select

from ca import audit, rows, schema
from ca.http import number, reply, text
from ca.service import Service
from identity.entries import describe
from identity.records import PlacementRecord, unverified
from identity.wire.explain import CertificateShown, EntryExplained, IdentityExplained

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ca.plane import Plane


def routes(service: Service) -> list[web.RouteDef]:
    """The routes of this part."""

    async def identity(request: web.Request) -> web.Response:
        name, instance = text(request, "name"), number(request, "instance") or 0

        def run() -> IdentityExplained:
            with service.plane.store.read() as tx:
                return explain_identity(service.plane, tx, name, instance)

        found = await service.read(run)
        holder = service.streams.get(found.holder or "")
        report = service.reports.get(found.holder or "")
        if found.holds and found.holder is not None:
            key = f"{name}/{instance}"
            held = None if report is None else report.held.get(key)
            seen = "says that it holds it" if held == found.epoch else "has not said that it holds it"
            found = found.model_copy(update={"proof": [*found.proof, f"{found.holder} {seen}, {'connected' if holder else 'not connected'}"]})
        return reply(found)

    return [web.get("/v1/explain/identity", identity)]


def explain_identity(plane: Plane, tx: Connection, name: str, instance: int) -> IdentityExplained:
    """Raises NotFound."""
    row = rows.instance(tx, name, instance)
    said = None
    if row.placement is not None:
        said = unverified(PlacementRecord, row.placement, trust_domain=str(plane.trust_domain))
    match row.state:
        case "revoked":
            reason = _over(tx, row.key)
        case "unplaced":
            reason = "it has no place: retinue-ca workload move, or a sidecar's token"
        case "moving":
            reason = f"{row.endpoint or 'nobody'} holds it while a move to {row.target} is made ready"
        case _:
            reason = f"placed on {row.endpoint} at epoch {row.epoch}"
    proof = []
    if row.endpoint is not None:
        holder = rows.endpoint(tx, row.endpoint)
        proof = [
            f"{holder.name} enrolled with a token at {holder.enrolled}, generation {holder.generation}, certificate until {holder.svid_expires}",
            f"placement signed at epoch {row.epoch}",
        ]  # fmt: skip
    found = [e for e in plane.entries.all(tx) if e.name == name]
    return IdentityExplained(
        name=name, instance=instance, spiffe_id=row.spiffe_id, asked="ca", holds=row.endpoint is not None and row.state != "revoked",
        reason=reason, proof=proof, holder=row.endpoint, state=row.state, epoch=row.epoch or None,
        since=said.issued if said is not None else None, ends=row.ends_at, ends_with=row.ends_with, fence=row.fence,
        labels=dict(row.labels), certificate=_certificate(tx, row),
        entries=[
            EntryExplained(id=e.id, parent=e.parent, selectors=describe(e.selectors), ends=e.ends_at, labels_ok=e.labels.items() <= row.labels.items())
            for e in found
        ],
        fences=[f"no epoch up to {row.epoch_top} is signed again"],
    )  # fmt: skip


def _over(tx: Connection, key: str) -> str:
    """How it ended, from the audit."""
    for entry in reversed(audit.entries(tx, subject=key)):
        detail: dict[str, Any] = entry.detail if isinstance(entry.detail, dict) else {}
        if entry.action == "workload.expire":
            cause = f"with {detail.get('ends_with')}" if detail.get("ends_at") is None else "by its time"
            return f"it expired {cause}, at {entry.at}"
        if entry.action == "workload.revoke":
            return f"{entry.actor} revoked it, at {entry.at}"
    return "it was revoked"


def _certificate(tx: Connection, row: rows.InstanceRow) -> CertificateShown | None:
    if row.endpoint is None:
        return None
    s = schema.serials.c
    query = select(schema.serials).where(s.spiffe_id == row.spiffe_id, s.profile == "workload", s.endpoint == row.endpoint)
    found = tx.execute(query.order_by(s.issued.desc(), s.not_after.desc()).limit(1)).mappings().first()
    if found is None:
        return None
    return CertificateShown(serial=found["serial"], issuer=found["issuer"], not_before=found["issued"], not_after=found["not_after"])
