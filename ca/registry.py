"""Join tokens and endpoints: who may enrol, who has, and who is out.

A token is spent by one conditional UPDATE in the transaction that inserts its endpoint, so of any number of concurrent
enrolments one wins and the others leave no trace. An endpoint is `pending` between that transaction and the one that
stores its signed record: a crash between them burns nothing, because the same enrolment key may ask again.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import Connection, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from ca import audit, rows, schema, transparency
from ca.contradiction import check_endpoint
from ca.desk import Desk
from ca.enroll import RECOVERY_SECONDS
from ca.entries import sign_for
from ca.placements import Placements
from ca.rows import EndpointRow, InstanceRow, TokenRow
from ca.store import Store, any_of
from identity.enrollment import refused
from identity.errors import BadInput, Bug, Conflict, NotFound, Refused
from identity.names import SpiffeId, host_name, workload_path
from identity.records import EndpointRecord

MAX_UNDERLAY: Final = 16
_INSERT_SERIAL: Final = insert(schema.serials)
_SERIAL: Final = select(schema.serials).where(schema.serials.c.serial == bindparam("serial"))
KEEP_TOKENS_S: Final = 30 * 86400  # spent and expired tokens stay readable this long


@dataclass(frozen=True, slots=True)
class Applicant:
    """What an enrolment brought, all proofs verified. Keys are base64 (b64), the tunnel key canonical."""

    tunnel_key: str
    enroll_key: str
    underlay: Sequence[str]
    ciphers: Sequence[str]


@dataclass(frozen=True, slots=True)
class Grant:
    """A new token, before its text is made: what it may enrol."""

    endpoint: str
    kind: Literal["host", "sidecar"]
    workload: str | None
    asked_by: str | None
    replace: bool
    expires: int


@dataclass(frozen=True, slots=True)
class Revoked:
    """What went with a host: itself and its sidecars, and the instances that lost their place."""

    endpoints: list[str]
    instances: list[str]


class Registry:
    """Transactions over tokens and endpoints. `now` is seconds since the epoch, `actor` goes to the audit."""

    def __init__(self, desk: Desk, placements: Placements) -> None:
        self._desk = desk
        self._placements = placements

    # ---- tokens

    def grant_host(self, tx: Connection, name: str, *, replace: bool, now: int, ttl: int) -> Grant:
        """A token for a host. Raises Conflict ``host.exists`` for a living host unless `replace`."""
        host_name(name)
        present = rows.endpoint_or_none(tx, name)
        if present is not None and present.state == "enrolled" and not replace:
            raise Conflict(
                "host.exists",
                f"a host named {name} is enrolled",
                hint="give --replace to let it enrol again with new keys",
            )
        if present is not None and present.kind != "host":
            raise Conflict("host.kind", f"{name} is the name of a sidecar", hint="choose another name")
        return Grant(name, "host", None, None, replace, now + ttl)

    def grant_sidecar(
        self, tx: Connection, workload: str, *, asked_by: str | None, now: int, ttl: int
    ) -> Grant:
        """A token for a sidecar of `workload`. A host may ask only for what is placed on it (or on its own sidecars).

        Raises NotFound, Refused ``sidecar.not_here``, Conflict ``sidecar.no_instance``.
        """
        workload_path(workload)
        self._sidecar_instance(tx, workload, asked_by)
        # Names that were ever used stay used: a record of an earlier sidecar must not seem to speak of this one.
        number = self._desk.store.take_number(tx, "sidecar_next")
        name = f"{workload.replace('/', '-')}-sidecar-{number}"
        host_name(name)
        return Grant(name, "sidecar", workload, asked_by, False, now + ttl)

    def add_token(
        self, token_id: str, public_key: str, grant: Grant, tx: Connection, now: int, actor: str
    ) -> None:
        """Store a token: its public key only."""
        tx.execute(delete(schema.tokens).where(schema.tokens.c.expires < now - KEEP_TOKENS_S))
        tx.execute(
            insert(schema.tokens).values(
                id=token_id, public_key=public_key, endpoint=grant.endpoint, kind=grant.kind, workload=grant.workload,
                asked_by=grant.asked_by, replace=grant.replace, created=now, expires=grant.expires,
            )
        )  # fmt: skip
        audit.append(
            tx,
            now,
            actor,
            "token.create",
            grant.endpoint,
            kind=grant.kind,
            token=token_id,
            expires=grant.expires,
        )

    def token(self, token_id: str) -> TokenRow | None:
        """A token by its public part; None when there is none."""
        with self._desk.store.read() as tx:
            row = tx.execute(select(schema.tokens).where(schema.tokens.c.id == token_id)).mappings().first()
            return None if row is None else TokenRow.of(row)

    def claimant(self, token: TokenRow) -> EndpointRow | None:
        """The endpoint that a spent token enrolled, while its keys are still those; else None."""
        with self._desk.store.read() as tx:
            row = rows.endpoint_or_none(tx, token.endpoint)
        same = row is not None and token.enroll_key is not None and row.enroll_key == token.enroll_key
        return row if same else None

    # ---- enrolment

    def claim(self, token_id: str, applicant: Applicant, now: int) -> EndpointRow:
        """Spend the token and insert its endpoint as pending, or find the same claim made before (a lost reply).

        Raises NotVerified, Refused, Conflict ``token.*`` for a token that cannot be spent; Conflict ``enroll.*`` for a taken name or key:
        then the token is not spent.
        """
        underlay = check_underlay(applicant.underlay)
        c = schema.tokens.c
        with self._desk.store.write() as tx:
            won = tx.execute(
                update(schema.tokens)
                .where(c.id == token_id, c.used_at.is_(None), c.expires > now)
                .values(used_at=now, enroll_key=applicant.enroll_key)
            ).rowcount
            found = tx.execute(select(schema.tokens).where(c.id == token_id)).mappings().first()
            if found is None:
                raise refused()
            token = TokenRow.of(found)
            if won != 1:
                return self._again(tx, token, applicant, now)
            self._admit(tx, token, applicant, underlay, now)
            audit.append(
                tx,
                now,
                f"token:{token_id}",
                "enroll.claim",
                token.endpoint,
                kind=token.kind,
                replace=token.replace,
            )
            row = rows.endpoint_or_none(tx, token.endpoint)
            if row is None:
                raise Bug("endpoint.lost", f"{token.endpoint} was not written")
            return row

    def _again(self, tx: Connection, token: TokenRow, applicant: Applicant, now: int) -> EndpointRow:
        if token.used_at is None:
            raise Refused(
                "token.expired",
                f"the join token for {token.endpoint} has expired",
                hint="make a new token with: retinue-ca token create",
            )
        row = rows.endpoint_or_none(tx, token.endpoint)
        same = row is not None and row.state != "revoked" and (row.enroll_key, row.tunnel_key) == (
            applicant.enroll_key, applicant.tunnel_key,
        )  # fmt: skip
        if (
            row is None
            or not same
            or token.enroll_key != applicant.enroll_key
            or now > token.used_at + RECOVERY_SECONDS
        ):
            raise Conflict(
                "token.used",
                f"the join token for {token.endpoint} was already used",
                hint="if that was not you, revoke the host; make a new token with: retinue-ca token create",
            )
        return row

    def _admit(
        self, tx: Connection, token: TokenRow, applicant: Applicant, underlay: list[str], now: int
    ) -> None:
        present = rows.endpoint_or_none(tx, token.endpoint)
        if present is not None and present.state == "enrolled" and not token.replace:
            raise Conflict(
                "enroll.exists",
                f"a host named {token.endpoint} is enrolled",
                hint="use a token made with --replace",
            )
        if token.kind == "sidecar":
            if token.workload is None:
                raise Bug("endpoint.workload", f"the token of {token.endpoint} is for the sidecar of nothing")
            self._sidecar_instance(tx, token.workload, token.asked_by)
        values: dict[str, Any] = {
            "kind": token.kind, "workload": token.workload, "parent": token.asked_by,
            "tunnel_key": applicant.tunnel_key, "enroll_key": applicant.enroll_key, "underlay": json.dumps(underlay),
            "ciphers": json.dumps(sorted(set(applicant.ciphers))), "svid_expires": 0, "enrolled": now,
            "spiffe_id": str(SpiffeId.endpoint(self._desk.trust_domain, token.endpoint, token.kind)),
        }  # fmt: skip
        try:
            if present is None:
                tx.execute(
                    insert(schema.endpoints).values(
                        name=token.endpoint, generation=self._desk.store.floor(tx), state="pending", **values
                    )
                )
                return
            self._revoke_serials(tx, token.endpoint, now)
            # An enrolled host stays so while its keys are replaced: its placements keep their record until the new one.
            state = "enrolled" if present.state == "enrolled" else "pending"
            tx.execute(
                update(schema.endpoints)
                .where(schema.endpoints.c.name == token.endpoint)
                .values(state=state, **values)
            )
        except IntegrityError:
            raise Conflict(
                "enroll.tunnel_key",
                "that tunnel key belongs to another endpoint",
                hint="let the host make a new key: retinue enroll --replace",
            ) from None

    def finish(self, name: str, svid_expires: int, now: int, actor: str) -> EndpointRow:
        """Store and publish the signed record of an endpoint whose certificate was issued; place a new sidecar.

        Raises NotFound, Refused ``host.revoked``, Conflict when no instance is left for a sidecar.
        """
        with self._desk.store.write() as tx:
            row = rows.endpoint_or_none(tx, name)
            if row is None or row.state == "revoked":
                raise Refused("host.revoked", f"{name} is revoked")
            row = self._sign(tx, row, now, state="enrolled", svid_expires=svid_expires)
            for held in rows.instances(tx, endpoint=name):
                self._placements.resign(tx, held, now)
            if row.kind == "sidecar" and not rows.instances(tx, endpoint=name):
                if row.workload is None:
                    raise Bug("endpoint.workload", f"{name} is the sidecar of nothing")
                self._placements.place(tx, self._sidecar_instance(tx, row.workload, row.parent), row, now)
            sign_for(self._desk, tx, name, now)
            audit.append(tx, now, actor, "enroll.finish", name, generation=row.generation)
            return row

    def _sidecar_instance(self, tx: Connection, workload: str, asked_by: str | None) -> InstanceRow:
        """The instance that a new sidecar takes over: placed on the asking host (or a sidecar of it), else unplaced."""
        found = rows.instances(tx, name=workload)
        if not found:
            known = tx.execute(select(schema.instances.c.name).distinct()).scalars().all()
            raise NotFound(
                "workload.unknown",
                f"no workload named {ascii(workload)[:80]}",
                hint=any_of(known, workload) or "see: retinue-ca workload list",
            )
        if asked_by is not None:
            for row in found:
                holder = (
                    rows.endpoint_or_none(tx, row.endpoint)
                    if row.endpoint and row.state == "active"
                    else None
                )
                if holder is not None and asked_by in {holder.name, holder.parent}:
                    return row
            raise Refused(
                "sidecar.not_here",
                f"{workload} is not placed on {asked_by}",
                hint=f"place it there: retinue-ca workload add {workload} --host {asked_by}",
            )
        for row in found:
            if row.state == "unplaced":
                return row
        raise Conflict(
            "sidecar.no_instance",
            f"every instance of {workload} has a place",
            hint=f"add one for the sidecar: retinue-ca workload add {workload} --replica",
        )

    # ---- living endpoints

    def caller(self, spiffe_id: SpiffeId, serial: int, issued: int = 0) -> EndpointRow:
        """The endpoint that a verified certificate belongs to. Raises Refused when it, or the certificate, is out.

        issued: its notBefore. After a restore, a certificate of the lost time has no row: it counts as long as its
        endpoint has not enrolled anew.
        """
        with self._desk.store.read() as tx:
            row = rows.endpoint_or_none(tx, spiffe_id.name)
            if row is None or row.spiffe_id != str(spiffe_id) or row.state == "pending":
                raise Refused("caller.unknown", f"{spiffe_id} is not an endpoint of this trust domain")
            if row.state == "revoked":
                raise Refused(
                    "caller.revoked", f"{row.name} was revoked", hint="enrol it anew with a new token"
                )
            kept = (
                tx.execute(_SERIAL, {"serial": f"{serial:x}"})
                .mappings()
                .first()
            )
            if kept is None and self._lost(tx, row, issued):
                return row
            if (
                kept is None
                or kept["endpoint"] != row.name
                or kept["profile"] != "endpoint"
                or kept["revoked_at"] is not None
            ):
                raise Refused(
                    "caller.certificate",
                    f"this certificate of {row.name} is not in force",
                    hint="enrol it anew with a new token",
                )
            return row

    def in_force(self, name: str, serial: int) -> bool:
        """Is that certificate of that endpoint not revoked? One of a lost time (see `caller`) has no row."""
        c = schema.serials.c
        with self._desk.store.read() as tx:
            row = tx.execute(select(c.endpoint, c.revoked_at).where(c.serial == f"{serial:x}")).first()
        return row is None or (row.endpoint == name and row.revoked_at is None)

    def _lost(self, tx: Connection, row: EndpointRow, issued: int) -> bool:
        since, until = (self._desk.store.get(tx, key) for key in ("lost_from", "lost_until"))
        return since is not None and until is not None and int(since) <= issued <= int(until) >= row.enrolled

    def renew(
        self, name: str, svid_expires: int, underlay: Sequence[str], ciphers: Sequence[str], now: int
    ) -> EndpointRow:
        """Publish the endpoint's record anew after its certificate was renewed. Raises NotFound, Refused, BadInput."""
        with self._desk.store.write() as tx:
            row = self._sign(
                tx, rows.living_endpoint(tx, name), now, svid_expires=svid_expires, underlay=check_underlay(underlay),
                ciphers=sorted(set(ciphers)),
            )  # fmt: skip
            audit.append(tx, now, name, "renew", name, generation=row.generation)
            return row

    def set_underlay(self, name: str, underlay: Sequence[str], now: int) -> EndpointRow:
        """Publish new underlay addresses; unchanged ones publish nothing. Raises NotFound, Refused, BadInput."""
        wanted = check_underlay(underlay)
        with self._desk.store.write() as tx:
            row = rows.living_endpoint(tx, name)
            return row if row.underlay == wanted else self._sign(tx, row, now, underlay=wanted)

    def sign_anew(self, tx: Connection, now: int) -> None:
        """Publish every living endpoint's record at its next generation."""
        living = select(schema.endpoints.c.name).where(schema.endpoints.c.state == "enrolled")
        for name in tx.execute(living).scalars().all():
            self._sign(tx, rows.living_endpoint(tx, name), now)
            sign_for(self._desk, tx, name, now)

    def revoke(self, name: str, now: int, actor: str) -> Revoked:
        """Revoke a host with its sidecars: certificates, tunnel keys and placements. Idempotent. Raises NotFound."""
        with self._desk.store.write() as tx:
            if rows.endpoint(tx, name).state == "revoked":
                return Revoked([], [])
            columns = schema.endpoints.c
            children = tx.execute(
                select(columns.name)
                .where(columns.parent == name, columns.state != "revoked")
                .order_by(columns.name)
            )
            gone = [name, *children.scalars()]
            instances: list[str] = []
            for one in gone:
                instances += self._placements.leave(tx, one, now)
                self._revoke_serials(tx, one, now)
                tx.execute(update(schema.endpoints).where(columns.name == one).values(state="revoked"))
                self._desk.store.log(tx, now, "endpoint", one)
                audit.append(tx, now, actor, "host.revoke", one, instances=instances if one == name else [])
            return Revoked(gone, instances)

    def all(self) -> list[EndpointRow]:
        """Endpoints that are or were enrolled, by name."""
        with self._desk.store.read() as tx:
            query = (
                select(schema.endpoints)
                .where(schema.endpoints.c.state != "pending")
                .order_by(schema.endpoints.c.name)
            )
            return [EndpointRow.of(row) for row in tx.execute(query).mappings()]

    def get(self, name: str) -> EndpointRow:
        """Raises NotFound."""
        with self._desk.store.read() as tx:
            return rows.endpoint(tx, name)

    # ---- certificates

    def record_serial(self, *, serial: int, issuer: str, profile: str, spiffe_id: str, spki: str, endpoint: str | None,
                      issued: int, not_after: int, also: Callable[[Connection], None] | None = None) -> None:  # fmt: skip
        """Commit a serial before anything is signed under it. Raises Conflict for one that exists, and what `also` raises.

        also: written with it, alone among writers.
        """
        store = self._desk.store
        try:
            with store.record() if also is None else store.write() as tx:
                tx.execute(
                    _INSERT_SERIAL,
                    {
                        "serial": f"{serial:x}", "issuer": issuer, "profile": profile, "spiffe_id": spiffe_id, "spki": spki,
                        "endpoint": endpoint, "issued": issued, "not_after": not_after,
                    },
                )  # fmt: skip
                transparency.record_certificate(tx, issued, endpoint, {
                    "issuer": issuer, "serial": f"{serial:x}", "profile": profile, "spiffe_id": spiffe_id, "spki": spki,
                    "not_after": not_after,
                })  # fmt: skip
                if also is not None:
                    also(tx)
        except IntegrityError:
            raise Conflict("serial.twice", "a certificate serial was drawn twice", hint="try again") from None

    @staticmethod
    def _revoke_serials(tx: Connection, endpoint: str, now: int) -> None:
        c = schema.serials.c
        tx.execute(
            update(schema.serials).where(c.endpoint == endpoint, c.revoked_at.is_(None)).values(revoked_at=now)
        )
        Store.put(tx, "blocks", str(int(Store.get(tx, "blocks") or 0) + 1))  # the bundle's block list is another now

    def _sign(self, tx: Connection, row: EndpointRow, now: int, **changed: Any) -> EndpointRow:
        """Write the changed columns with a newly signed record of the next generation."""
        if "state" not in changed:  # else it was just enrolled: its record is of the keys before
            check_endpoint(self._desk, row)
        stored = {k: json.dumps(v) if isinstance(v, list) else v for k, v in changed.items()}
        mine = schema.endpoints.c.name == row.name
        tx.execute(update(schema.endpoints).where(mine).values(generation=row.generation + 1, **stored))
        new = rows.endpoint_or_none(tx, row.name)
        if new is None:
            raise Bug("endpoint.lost", f"{row.name} is not there to be signed for")
        record = self._desk.sign(
            EndpointRecord(
                trust_domain=str(self._desk.trust_domain), endpoint=new.name, kind=new.kind, tunnel_key=new.tunnel_key,
                underlay=new.underlay, ciphers=[c for c in ("aes-256-gcm", "chacha20poly1305") if c in new.ciphers],
                generation=new.generation, issued=now, expires=max(new.svid_expires, now),
            )
        )  # fmt: skip
        tx.execute(update(schema.endpoints).where(mine).values(record=record))
        transparency.record(tx, now, "endpoint", row.name, record)
        self._desk.store.log(tx, now, "endpoint", row.name)
        return rows.living_endpoint(tx, row.name)


def check_underlay(hints: Sequence[str]) -> list[str]:
    """Underlay hints ``address:port`` in canonical form, without repeats, in the order given. Raises BadInput."""
    if len(hints) > MAX_UNDERLAY:
        raise BadInput("underlay.many", f"{len(hints)} underlay addresses; at most {MAX_UNDERLAY}")
    return list(dict.fromkeys(_hint(text) for text in hints))


def _hint(text: str) -> str:
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
        number = int(port) if port.isascii() and port.isdigit() else 0
    except ValueError:
        number = 0
    if (
        not 1 <= number <= 65535
        or (address.version == 6) != bracketed
        or address.is_multicast
        or address.is_unspecified
    ):
        raise BadInput(
            "underlay.form",
            f"not an underlay address: {ascii(text)[:80]}",
            hint="write 192.0.2.7:51820 or [2001:db8::7]:51820",
        )
    return f"[{address}]:{number}" if bracketed else f"{address}:{number}"
