"""Rows of the store as values, and the few column encodings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import Connection, RowMapping, bindparam, select

from ca import schema
from ca.store import any_of
from identity.errors import NotFound, Refused
from identity.names import TrustDomain

_ENDPOINT: Final = select(schema.endpoints).where(schema.endpoints.c.name == bindparam("name"))


@dataclass(frozen=True, slots=True)
class EndpointRow:
    """An endpoint. `parent` is the host whose agent asked for a sidecar's token."""

    name: str
    kind: Literal["host", "sidecar"]
    spiffe_id: str
    workload: str | None
    parent: str | None
    tunnel_key: str
    enroll_key: str
    underlay: list[str]
    ciphers: list[str]
    generation: int
    state: Literal["pending", "enrolled", "revoked"]
    enrolled: int
    svid_expires: int
    record: str | None
    entries: str | None = None
    entries_generation: int = 0
    draining: int | None = None  # since when nothing new may come there

    @classmethod
    def of(cls, row: RowMapping) -> EndpointRow:
        return cls(**{**row, "underlay": json.loads(row["underlay"]), "ciphers": json.loads(row["ciphers"])})


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """One instance of a workload identity and where it is."""

    name: str
    instance: int
    spiffe_id: str
    labels: Mapping[str, str]
    fence: Literal["available", "strict"]
    overlay: int
    state: Literal["unplaced", "active", "moving", "revoked"]
    endpoint: str | None
    epoch: int
    epoch_top: int
    target: str | None
    target_epoch: int | None
    placement: str | None
    prepare: str | None
    created: int
    mover: str | None = None
    ends_at: int | None = None
    ends_with: str | None = None

    @classmethod
    def of(cls, row: RowMapping | Mapping[str, Any]) -> InstanceRow:
        return cls(**{**row, "labels": json.loads(row["labels"])})

    @property
    def key(self) -> str:
        """``shop/api/0``"""
        return f"{self.name}/{self.instance}"

    def addresses(self, trust_domain: TrustDomain) -> list[str]:
        """Its overlay addresses, IPv4 then IPv6."""
        return [str(a) for a in trust_domain.overlay(self.overlay)]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A join token as stored: no secret."""

    id: str
    public_key: str
    endpoint: str
    kind: Literal["host", "sidecar"]
    workload: str | None
    asked_by: str | None
    replace: bool
    created: int
    expires: int
    used_at: int | None
    enroll_key: str | None

    @classmethod
    def of(cls, row: RowMapping) -> TokenRow:
        return cls(**row)


def endpoint_or_none(tx: Connection, name: str) -> EndpointRow | None:
    row = tx.execute(_ENDPOINT, {"name": name}).mappings().first()
    return None if row is None else EndpointRow.of(row)


def endpoint(tx: Connection, name: str) -> EndpointRow:
    """An endpoint that has enrolled (perhaps revoked since). Raises NotFound naming close ones."""
    row = endpoint_or_none(tx, name)
    if row is None or row.state == "pending":
        known = (
            tx.execute(select(schema.endpoints.c.name).where(schema.endpoints.c.state == "enrolled"))
            .scalars()
            .all()
        )
        raise NotFound(
            "host.unknown",
            f"no host named {ascii(name)[:80]} has enrolled",
            hint=any_of(known, name) or "enrol it first: retinue-ca token create --host NAME",
        )
    return row


def living_endpoint(tx: Connection, name: str) -> EndpointRow:
    """An endpoint that is enrolled now. Raises NotFound, or Refused when it was revoked."""
    row = endpoint(tx, name)
    if row.state == "revoked":
        raise Refused(
            "host.revoked",
            f"{name} was revoked",
            hint=f"enrol it anew: retinue-ca token create --host {name}",
        )
    return row


def instance(tx: Connection, name: str, number: int) -> InstanceRow:
    """One instance. Raises NotFound naming what is known."""
    columns = schema.instances.c
    row = (
        tx.execute(select(schema.instances).where(columns.name == name, columns.instance == number))
        .mappings()
        .first()
    )
    if row is not None:
        return InstanceRow.of(row)
    known = tx.execute(select(columns.name, columns.instance)).all()
    numbers = sorted(i for n, i in known if n == name)
    if numbers:
        raise NotFound(
            "workload.instance",
            f"{name} has no instance {number}",
            hint=f"it has: {', '.join(map(str, numbers[:20]))}",
        )
    raise NotFound("workload.unknown", f"no workload named {ascii(name)[:80]}",
                   hint=any_of(sorted({n for n, _ in known}), name) or "see: retinue-ca workload list")  # fmt: skip


def instances(tx: Connection, **where: Any) -> list[InstanceRow]:
    """Instances whose columns equal the given values, by name and number."""
    query = select(schema.instances).order_by(schema.instances.c.name, schema.instances.c.instance)
    for column, value in where.items():
        query = query.where(schema.instances.c[column] == value)
    return [InstanceRow.of(row) for row in tx.execute(query).mappings()]
