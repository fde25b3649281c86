"""`retinue-ca audit`: who did what; and what the transparency log says, checked here and not only asked for."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ca.cli import (
    DEFAULT_DIR,
    Dir,
    Format,
    Json,
    administrator,
    audit_app,
    client,
    output_of,
    when,
)
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput, BadState, NotVerified

if TYPE_CHECKING:
    from ca.watch import Pins, Seen

STALE_S: Final = 300  # a head is signed when it is asked for

RootFp = Annotated[str | None, typer.Option("--root-fp", metavar="HASH", help="Believe the CA with this root (SHA-256) instead of the one that the files here name.")]


@audit_app.command("list", epilog="Example: retinue-ca audit list --subject shop/api/0 -o jsonl")
def audit_list(
    subject: Annotated[str | None, typer.Option(metavar="NAME", help="Only entries about this.")] = None,
    after: Annotated[int, typer.Option(metavar="N", min=0, help="Only entries after this number.")] = 0,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="At most so many.")] = 1000,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Who did what, when, and with which outcome, oldest first."""
    query = {"subject": subject, "after": after, "limit": limit}
    found = client(directory).raw("GET", "/v1/audit", query=query)["entries"]
    cliout.emit(found, output_of(output, as_json), columns=("seq", "at", "actor", "action", "subject", "outcome"),
                rows=[(e["seq"], when(e["at"]), e["actor"], e["action"], e["subject"], e["outcome"]) for e in found])  # fmt: skip


@audit_app.command("verify", epilog="Example: retinue-ca audit verify --head 4711:HASH")
def audit_verify(
    head: Annotated[str | None, typer.Option(metavar="SIZE:HASH", help="A head noted earlier: the log must still continue it.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Make the whole log again from its entries and compare. Note the head it prints, and give it next time."""
    size, _, root = (head or ":").partition(":")
    if head is not None and not (size.isdigit() and root):
        raise BadInput("log.head", f"not a head of the log: {ascii(head)[:100]}", hint="write SIZE:HASH, as audit verify prints it")
    query = {"size": size, "root": root} if head is not None else {}
    found = client(directory, 300.0).raw("GET", "/v1/audit/verify", query=query)
    cliout.emit(
        found,
        output_of(output, as_json),
        human=lambda: print(f"{found['size']} entries hold, head {found['size']}:{found['root']}"),
    )


@audit_app.command("watch", epilog="Example: retinue-ca audit watch shop/api --state watch-shop-api.json")
def watch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A workload, an instance, a host or a SPIFFE ID.")],
    state: Annotated[Path | None, typer.Option("--state", metavar="FILE", help="Remember the tree between runs; later entries only.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Stop at the newest head.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How often to look.")] = 5.0,
    root_fp: RootFp = None, directory: Dir = DEFAULT_DIR,
) -> None:  # fmt: skip
    """Stream every certificate, JWT-SVID, placement, entry and act about a name, one JSON object a line.

    The whole log is read and its tree made anew; each head has to be signed by this trust domain's record key. What was
    left out, changed or put in later, and a head that is not signed, end it with an error.
    """
    from ca import watch as watching

    seen = watching.load(state) if state is not None else None
    monitor, pins = watching.Monitor(seen), _pins(directory, root_fp, seen)
    old = False
    while True:
        found: dict[str, Any] = client(directory).raw("GET", "/v1/log", query={"first": monitor.size, "limit": watching.BATCH})
        head = pins.head(found["bundle"], found["head"], time.time())
        monitor.begin(head)
        if head.size > monitor.size and not found["entries"]:
            raise NotVerified("log.gap", f"the log leaves out entry {monitor.size}")
        for entry in monitor.take(map(watching.entry_of, found["entries"])):
            if watching.concerns(entry, name):
                print(json.dumps(watching.told(entry)), flush=True)
        if monitor.size < head.size:
            continue
        monitor.check(head.size, head.root)
        if (age := time.time() - head.time) > STALE_S and not old:
            cliout.note(f"the head is {age:.0f} s old: this machine's clock, or somebody between here and the CA")
        old = age > STALE_S
        if state is not None:
            watching.save(state, pins.remember(monitor.seen))
        if once:
            cliout.note(f"{monitor.size} entries hold, head {monitor.size}:{monitor.root}")
            return
        time.sleep(every)


@audit_app.command("prove", epilog="Example: retinue-ca audit prove --certificate chain.pem")
def prove(
    leaf: Annotated[str | None, typer.Option("--leaf", metavar="HASH", help="A leaf hash.")] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", metavar="FILE", help="A certificate of this CA (PEM).")] = None,
    record: Annotated[Path | None, typer.Option("--record", metavar="FILE", help="A signed record, as an endpoint keeps it.")] = None,
    token: Annotated[Path | None, typer.Option("--jwt", metavar="FILE", help="A JWT-SVID; only the hash of its leaf leaves this machine.")] = None,
    root_fp: RootFp = None, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Prove that something is in the log: its entry, place and path, verified here against the head that the CA signed."""
    from identity.merkle import verify_inclusion

    wanted = _leaf(leaf, certificate, record, token)
    pins = _pins(directory, root_fp, None)
    found: dict[str, Any] = client(directory).raw("GET", "/v1/log/proof", query={"leaf": wanted})
    head = pins.head(found["bundle"], found["head"], time.time())
    path = [bytes.fromhex(step) for step in found["path"]]
    verify_inclusion(bytes.fromhex(wanted), found["index"], head.size, path, bytes.fromhex(head.root))
    del found["bundle"]

    def human() -> None:
        print(f"entry {found['index']} of {head.size}: {found['entry']['kind']} {cliout.clean(found['entry']['subject'])}")
        print(f"proved under head {head.size}:{head.root}, signed {when(head.time)}")

    cliout.emit(found, output_of(output, as_json), human=human)


def _pins(directory: Path, root_fp: str | None, seen: Seen | None) -> Pins:
    """Whom to believe: what an earlier run did, a fingerprint, an administrator's own roots, or the CA's own directory."""
    from ca.watch import Pins
    from identity import certs
    from identity.names import TrustDomain

    if seen is not None and seen.roots:
        return Pins(TrustDomain(seen.trust_domain), certs.parse_chain(seen.roots), seen.sequence)
    if root_fp is not None:
        from identity.wire.admin import Info

        if not re.fullmatch("[0-9a-f]{64}", root_fp):
            raise BadInput("log.root", "a root's fingerprint is 64 lower-case hex digits", hint="retinue-ca info")
        return Pins(TrustDomain(client(directory).get("/v1/info", Info).trust_domain), root_fp)
    if (mine := administrator()) is not None:
        from ca.remote import Identity

        identity = Identity.load(mine)
        return Pins(identity.trust_domain, certs.parse_chain(identity.roots))
    from ca.keyring import GOOD, Ring

    ring = Ring.load(directory)
    try:
        pem = "".join((directory / f"{member.name}.pem").read_text("ascii") for member in ring.of("root", GOOD))
    except (OSError, UnicodeDecodeError):
        raise BadState("ca.certificate", f"cannot read the roots in {directory}", hint="give --root-fp") from None
    return Pins(ring.trust_domain, certs.parse_chain(pem))


def _leaf(leaf: str | None, certificate: Path | None, record: Path | None, token: Path | None) -> str:
    from identity import certs, jwt
    from identity.transparency import about_certificate, certificate_leaf, jwt_leaf, record_leaf

    if sum(x is not None for x in (leaf, certificate, record, token)) != 1:
        raise BadInput("log.what", "one of --leaf, --certificate, --record and --jwt says what to prove")
    if leaf is not None:
        return leaf.strip().lower()
    try:
        if record is not None:
            return record_leaf(record.read_text("ascii").strip()).hex()
        if token is not None:
            return jwt_leaf(jwt.about(token.read_text("ascii").strip())).hex()
        assert certificate is not None
        shown = certs.parse_chain(certificate.read_text("ascii"))[0]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput("log.file", f"cannot read that file: {getattr(e, 'strerror', None) or 'not text'}") from None
    kind = certs.claimed_id(shown).kind
    profile = {"host": "endpoint", "sidecar": "endpoint", "cp": "server", "admin": "admin"}.get(kind, "workload")
    return certificate_leaf(about_certificate(shown, profile)).hex()
