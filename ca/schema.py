"""The tables of the registry, once for SQLite and PostgreSQL: only types and constraints that both have.

A database says its version in ``meta`` (``schema_version``); ca/migrations.py leads from one version to the next and one
step back. A new table or column belongs here and in the migration; new columns are nullable or have a server default,
so that the version before can go on with the rows.
"""

from __future__ import annotations

from collections.abc import Collection
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

SCHEMA_VERSION: Final = 2

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
    Column("draining", BigInteger),  # version 2: since when nothing new may come there
    CheckConstraint("state in ('pending', 'enrolled', 'revoked')", name="endpoint_state"),
    CheckConstraint("kind in ('host', 'sidecar')", name="endpoint_kind"),
    # one tunnel key speaks for one living endpoint
    Index("endpoint_tunnel_key", "tunnel_key", unique=True, sqlite_where=Column("state") != "revoked",
          postgresql_where=Column("state") != "revoked"),
)  # fmt: skip
credentials = Table(  # version 2: the newest certificate of an endpoint, and whether two are using one identity
    "credentials", metadata,
    Column("endpoint", ForeignKey("endpoints.name"), primary_key=True),
    Column("serial", String(40), nullable=False),  # lower hex, of the certificate that may be renewed
    Column("spki", String(64), nullable=False),
    Column("before", String(40)),  # the one that was renewed into it: a reply may have been lost
    Column("quarantined_at", BigInteger),
    Column("reason", String(255)),
    Column("budget", BigInteger),  # automatic recoveries in a window; none: the default
    Column("recoveries", Text, nullable=False, server_default="[]"),  # when they were
)  # fmt: skip
blocks = Table(  # version 2: entries of the block list beside those of revoked hosts and authorities
    "blocks", metadata,
    Column("entry", String(2200), primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("until", BigInteger, nullable=False),
)  # fmt: skip
federations = Table(  # version 2: other trust domains and what is known of them
    "federations", metadata,
    Column("trust_domain", String(255), primary_key=True),
    Column("url", String(1024), nullable=False),
    Column("profile", String(16), nullable=False),
    Column("endpoint_id", String(2048)),  # the SVID that serves the bundle, profile https_spiffe
    Column("bundle", Text, nullable=False),  # as received, JSON
    Column("fetched_at", BigInteger, nullable=False),
    Column("error", String(512)),
    Column("record", Text),  # as told to the endpoints
    CheckConstraint("profile in ('https_web', 'https_spiffe')", name="federation_profile"),
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
    Column("mover", String(36)),  # version 2: the process that prepares the move
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
orchestrated = Table(  # version 2: instances as a scheduler calls them
    "orchestrated", metadata,
    Column("workload", String(255), nullable=False),
    Column("instance", String(255), nullable=False),
    Column("number", BigInteger),  # none: it was never here
    Column("seq", BigInteger, nullable=False),  # of the last event that counted
    PrimaryKeyConstraint("workload", "instance"),
)  # fmt: skip
orchestrator_events = Table(  # version 2: events that were answered, and how
    "orchestrator_events", metadata,
    Column("id", String(255), primary_key=True),
    Column("digest", String(64), nullable=False),  # SHA-256 of what it said
    Column("answer", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("place", BigInteger, nullable=False),  # in the order of arrival: the oldest are forgotten
    Index("orchestrator_place", "place"),
)  # fmt: skip
policies = Table(
    "policies", metadata,
    Column("revision", BigInteger, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("files", Text, nullable=False),
    Column("author", String(255), nullable=False),
    Column("issued", BigInteger, nullable=False),
    Column("record", Text, nullable=False),
    Column("kind", String(64)),  # version 2: apply, rollback N, rollout ... ; null was apply
    Column("trial", Text),  # version 2: the PolicyTrial of the record, JSON
)  # fmt: skip
policy_authority = Table(  # version 2: the chain of documents that operators signed
    "policy_authority", metadata,
    Column("version", BigInteger, primary_key=True),
    Column("document", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
)  # fmt: skip
rollouts = Table(  # version 2
    "rollouts", metadata,
    Column("id", String(32), primary_key=True),
    Column("state", String(16), nullable=False),  # canary, watch, kept, rolled_back, aborted
    Column("started", BigInteger, nullable=False),
    Column("ended", BigInteger),
    Column("data", Text, nullable=False),  # ca.rollouts.Rollout, JSON
)  # fmt: skip
flow_edges = Table(  # version 2: what endpoints reported as forwarded, one row a flow without its source port
    "flow_edges", metadata,
    Column("src", String(255), nullable=False),
    Column("dst", String(255), nullable=False),
    Column("proto", Integer, nullable=False),
    Column("port", Integer, nullable=False),  # 0 where the protocol has none
    Column("first", BigInteger, nullable=False),
    Column("last", BigInteger, nullable=False),
    Column("times", BigInteger, nullable=False),
    Column("ends", Integer, nullable=False),  # 1: reported by the source's holder, 2: by the destination's
    PrimaryKeyConstraint("src", "dst", "proto", "port"),
    Index("flow_edge_last", "last"),
)  # fmt: skip
flow_denials = Table(  # version 2: what endpoints reported as refused while a rollout ran
    "flow_denials", metadata,
    Column("rollout", ForeignKey("rollouts.id"), nullable=False),
    Column("src", String(255), nullable=False),
    Column("dst", String(255), nullable=False),
    Column("proto", Integer, nullable=False),
    Column("port", Integer, nullable=False),
    Column("endpoint", String(63), nullable=False),  # who reported it
    Column("first", BigInteger, nullable=False),
    Column("last", BigInteger, nullable=False),
    Column("times", BigInteger, nullable=False),
    PrimaryKeyConstraint("rollout", "src", "dst", "proto", "port", "endpoint"),
)  # fmt: skip
# Every act, certificate and published record, once and for ever; the leaves of the transparency log (ca/transparency.py).
ledger = Table(  # version 2
    "ledger", metadata,
    Column("seq", Big, primary_key=True, autoincrement=True),
    Column("leaf", BigInteger, unique=True),  # its place in the tree; null until the next head
    Column("kind", String(16), nullable=False),  # act, certificate, or the type of a record
    Column("at", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(320), nullable=False),
    Column("outcome", String(64), nullable=False),
    Column("detail", Text, nullable=False),
    Column("hash", String(64), nullable=False),  # of the leaf
    Index("ledger_kind", "kind", "seq"),
    Index("ledger_subject", "subject", "seq"),
    Index("ledger_hash", "hash"),
    Index("ledger_waiting", "seq", sqlite_where=Column("leaf").is_(None), postgresql_where=Column("leaf").is_(None)),
    sqlite_autoincrement=True,
)  # fmt: skip
ledger_nodes = Table(  # version 2: complete subtrees
    "ledger_nodes", metadata,
    Column("level", Integer, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
    PrimaryKeyConstraint("level", "position"),
)  # fmt: skip
ledger_heads = Table(  # version 2
    "ledger_heads", metadata,
    Column("size", BigInteger, primary_key=True),
    Column("root", String(64), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("timeline", String(36), nullable=False),
)  # fmt: skip
processes = Table(  # version 2: CA processes on this database
    "processes", metadata,
    Column("id", String(36), primary_key=True),
    Column("listen", String(255), nullable=False),
    Column("started", BigInteger, nullable=False),
    Column("seen", BigInteger, nullable=False),  # seconds since the epoch by the database's clock
    Column("revision", BigInteger, nullable=False),
)  # fmt: skip
readiness = Table(  # version 2: what the target of a move reported, to whichever process it is connected
    "readiness", metadata,
    Column("endpoint", String(63), primary_key=True),
    Column("process", String(36), nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("attached", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
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
    Column("record", Text, nullable=False),  # what of it is signed: nothing is given out from a row that says otherwise
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
    Column("record", Text, nullable=False),  # name, role and scopes, signed
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

# Enforced by the engine too: a slip in this program cannot rewrite the past. A row of the ledger gets its place, once.
APPEND_ONLY: Final = ("changes", "ledger", "ledger_nodes", "ledger_heads")
_PLACED: Final = "OLD.leaf IS NULL AND NEW.leaf IS NOT NULL" + "".join(
    f" AND NEW.{c} = OLD.{c}" for c in ("seq", "kind", "at", "actor", "action", "subject", "outcome", "detail", "hash")
)

WRITER_LOCK: Final = 0x52657469  # key of PostgreSQL's advisory lock: who holds it writes

# On PostgreSQL a revision is given out under the writer's lock, which ends after the commit is visible, and by the
# database itself: whoever inserts a change, revision order is commit order and has no gaps.
_POSTGRESQL: Final = """
    CREATE FUNCTION retinue_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$;
    CREATE FUNCTION retinue_next_revision() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock(WRITER_LOCK);
        SELECT coalesce(max(revision), 0) + 1 INTO NEW.revision FROM changes;
        RETURN NEW;
    END $$;
    CREATE TRIGGER changes_revision BEFORE INSERT ON changes FOR EACH ROW EXECUTE FUNCTION retinue_next_revision();
    CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger FOR EACH ROW WHEN (NOT (IS_PLACED))
        EXECUTE FUNCTION retinue_append_only();
    CREATE TRIGGER ledger_no_delete BEFORE DELETE OR TRUNCATE ON ledger
        FOR EACH STATEMENT EXECUTE FUNCTION retinue_append_only();
"""


def triggers(engine: str, tables: Collection[str] = APPEND_ONLY) -> list[str]:
    """The statements that keep the past of `tables` as it is. engine: ``sqlite`` or ``postgresql`` (all tables)."""
    if engine == "sqlite":
        return [
            f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table} "
            + (f"WHEN NOT ({_PLACED}) " if (table, verb) == ("ledger", "update") else "")
            + f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            for table in tables
            for verb in ("update", "delete")
        ]
    return [
        _POSTGRESQL.replace("WRITER_LOCK", str(WRITER_LOCK)).replace("IS_PLACED", _PLACED),
        *(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION retinue_append_only()"
            for table in tables
            if table != "ledger"
        ),
    ]
