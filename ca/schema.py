"""The tables of the registry, once for SQLite and PostgreSQL: only types and constraints that both have.

A database says its version in ``meta`` (``schema_version``); ca/migrations.py leads from one version to the next and one
step back. A new table or column belongs here and in the migration; new columns are nullable or have a server default,
so that the version before can go on with the rows.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

SCHEMA_VERSION: Final = 1

Big = BigInteger().with_variant(Integer, "sqlite")  # SQLite autoincrements only INTEGER

metadata = MetaData()
meta = Table(
    "meta", metadata,
    Column("key", String(32), primary_key=True),
    Column("value", Text, nullable=False),
)  # fmt: skip
changes = Table(
    "changes", metadata,
    Column("revision", Big, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),  # endpoint, instance, policy, bundle
    Column("key", String(320), nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip
endpoints = Table(
    "endpoints", metadata,
    Column("name", String(63), primary_key=True),
    Column("kind", String(8), nullable=False),
    Column("spiffe_id", String(2048), nullable=False, unique=True),
    Column("workload", String(255)),  # a sidecar's service
    Column("parent", ForeignKey("endpoints.name")),  # the host that asked for a sidecar's token
    Column("tunnel_key", String(64), nullable=False),
    Column("enroll_key", String(64), nullable=False),
    Column("underlay", Text, nullable=False),
    Column("ciphers", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("state", String(8), nullable=False),
    Column("enrolled", BigInteger, nullable=False),
    Column("svid_expires", BigInteger, nullable=False),
    Column("record", Text),
    Column("entries", Text),  # version 2: the signed registration entries of this endpoint; none before the first
    Column("entries_generation", BigInteger, nullable=False, server_default="0"),  # version 2
    CheckConstraint("state in ('pending', 'enrolled', 'revoked')", name="endpoint_state"),
    CheckConstraint("kind in ('host', 'sidecar')", name="endpoint_kind"),
    # one tunnel key speaks for one living endpoint
    Index("endpoint_tunnel_key", "tunnel_key", unique=True, sqlite_where=Column("state") != "revoked",
          postgresql_where=Column("state") != "revoked"),
)  # fmt: skip
tokens = Table(
    "tokens", metadata,
    Column("id", String(64), primary_key=True),
    Column("public_key", String(64), nullable=False),  # Ed25519; the secret is its seed and is not here
    Column("endpoint", String(63), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("workload", String(255)),
    Column("asked_by", ForeignKey("endpoints.name")),  # the host agent that asked for a sidecar's token
    Column("replace", Boolean, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("used_at", BigInteger),
    Column("enroll_key", String(64)),  # who used it: a lost reply is repeated to this key only
)  # fmt: skip
serials = Table(
    "serials", metadata,
    Column("serial", String(40), primary_key=True),  # lower hex
    Column("issuer", String(64), nullable=False),  # its key identifier: (issuer, serial) names a certificate for ever
    Column("profile", String(16), nullable=False),
    Column("spiffe_id", String(2048), nullable=False),
    Column("spki", String(64), nullable=False),
    Column("endpoint", ForeignKey("endpoints.name")),
    Column("issued", BigInteger, nullable=False),
    Column("not_after", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    Index("serial_endpoint", "endpoint"),
)  # fmt: skip
instances = Table(
    "instances", metadata,
    Column("name", String(255), nullable=False),
    Column("instance", BigInteger, nullable=False),
    Column("spiffe_id", String(2048), nullable=False),
    Column("labels", Text, nullable=False),
    Column("fence", String(16), nullable=False),
    Column("overlay", BigInteger, nullable=False, unique=True),  # address number, kept for life, never given again
    Column("state", String(16), nullable=False),
    Column("endpoint", ForeignKey("endpoints.name")),
    Column("epoch", BigInteger, nullable=False),  # of the record in force; 0 before the first
    Column("epoch_top", BigInteger, nullable=False),  # highest ever signed, so that no epoch is signed twice
    Column("target", ForeignKey("endpoints.name")),  # of a move being prepared
    Column("target_epoch", BigInteger),
    Column("placement", Text),
    Column("prepare", Text),
    Column("created", BigInteger, nullable=False),
    Column("ends_at", BigInteger),  # version 2: when it is over by itself; null is never
    Column("ends_with", String(255)),  # version 2: the workload whose end is its own
    PrimaryKeyConstraint("name", "instance"),
    CheckConstraint("state in ('unplaced', 'active', 'moving', 'revoked')", name="instance_state"),
    CheckConstraint("(target is null) = (prepare is null)", name="instance_prepare"),
    Index("instance_endpoint", "endpoint"),
)  # fmt: skip
holdings = Table(
    "holdings", metadata,
    Column("endpoint", ForeignKey("endpoints.name"), nullable=False),
    Column("name", String(255), nullable=False),
    Column("instance", BigInteger, nullable=False),
    PrimaryKeyConstraint("endpoint", "name", "instance"),
    Index("holding_instance", "name", "instance"),
)  # fmt: skip
policies = Table(
    "policies", metadata,
    Column("revision", BigInteger, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("files", Text, nullable=False),
    Column("author", String(255), nullable=False),
    Column("issued", BigInteger, nullable=False),
    Column("record", Text, nullable=False),
)  # fmt: skip
audit = Table(
    "audit", metadata,
    Column("seq", Big, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(320), nullable=False),
    Column("outcome", String(64), nullable=False),
    Column("detail", Text, nullable=False),
    Column("prev", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
)  # fmt: skip

entries = Table(  # version 2
    "entries", metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(255), nullable=False),  # the workload
    Column("parent", String(63), nullable=False),  # endpoint name or pattern
    Column("selectors", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("hint", String(128), nullable=False),
    Column("ttl", BigInteger),  # of certificates, seconds
    Column("ends_at", BigInteger),
    Column("ends_with", String(255)),
    Column("created", BigInteger, nullable=False),
    Column("created_by", String(255), nullable=False),
    Index("entry_name", "name"),
)  # fmt: skip
admins = Table(  # version 2
    "admins", metadata,
    Column("name", String(63), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("scopes", Text, nullable=False),  # subtrees, JSON; empty is everything
    Column("created", BigInteger, nullable=False),
    Column("created_by", String(255), nullable=False),
    Column("revoked_at", BigInteger),
)  # fmt: skip
approvals = Table(  # version 2
    "approvals", metadata,
    Column("id", String(32), primary_key=True),
    Column("asked_by", String(255), nullable=False),
    Column("asked_at", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("role", String(16), nullable=False),  # what the second person has to have as well
    Column("act", String(320), nullable=False),  # method and path
    Column("digest", String(64), nullable=False),  # SHA-256 of act and body: one request and no other
    Column("summary", Text, nullable=False),
    Column("approved_by", String(255)),
    Column("approved_at", BigInteger),
    Column("used_at", BigInteger),
    Index("approval_digest", "digest"),
)  # fmt: skip

APPEND_ONLY: Final = ("audit", "changes")  # enforced by the engine too: a slip in this program cannot rewrite the past

REFUSE_CHANGE: Final = """
    CREATE FUNCTION retinue_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$
"""


def append_only(engine: str) -> list[str]:
    """The statements that make the tables of APPEND_ONLY refuse every update and delete. engine: sqlite, postgresql."""
    if engine == "sqlite":
        return [
            f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            for table in APPEND_ONLY
            for verb in ("update", "delete")
        ]
    return [
        REFUSE_CHANGE,
        *(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION retinue_append_only()"
            for table in APPEND_ONLY
        ),
    ]
