"""`retinue policy key|authority|sign|bundle|as-of`: what operators do with keys of their own, away from the CA.

The key file never leaves the operator's machine; what is passed around are documents and bundles, signed more and more.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput, BadState, Conflict, NotFound
from mesh.cli_policy import app
from mesh.policy_files import Format, Json, read_files, read_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from policy.bundle import Bundle
    from policy.signing import Authority

key_app = typer.Typer(no_args_is_help=True, help="An operator's own signing key.", rich_markup_mode=None)
authority_app = typer.Typer(
    no_args_is_help=True, help="Who may sign policy: documents that the root signers sign.", rich_markup_mode=None
)
app.add_typer(key_app, name="key")
app.add_typer(authority_app, name="authority")

KeyFile = Annotated[Path, typer.Option("--key", "-k", metavar="FILE", help="The operator's key file.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it.")]
Passphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", metavar="FILE", help="File that holds the passphrase of the key.")
]


# ---- keys


@key_app.command("new", epilog="Example: retinue policy key new alice.key")
def key_new(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The new key file; it must not exist.")],
    passphrase_file: Passphrase = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Make a signing key (Ed25519, mode 0600) and print its public half for the authority."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
    )

    from identity.keys import b64, ed25519_public

    key, secret = Ed25519PrivateKey.generate(), _passphrase(passphrase_file)
    sealing: KeySerializationEncryption = BestAvailableEncryption(secret) if secret else NoEncryption()
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealing)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise Conflict("key.exists", f"{path} exists already", hint="choose another name; a key is never overwritten") from None
    except OSError as error:
        raise BadInput("file.write", f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(fd, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(fd)
    _public(b64(ed25519_public(key)), Output.JSON if as_json else output)
    cliout.note(f"{path}: keep it secret" + ("" if secret else "; it has no passphrase"))


@key_app.command("show", epilog="Example: retinue policy key show alice.key")
def key_show(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The key file.")], passphrase_file: Passphrase = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Print the public half of a key."""
    from identity.keys import b64, ed25519_public

    _public(b64(ed25519_public(_key(path, passphrase_file))), Output.JSON if as_json else output)


def _public(key: str, output: Output) -> None:
    cliout.emit({"public": key}, output, human=lambda: print(key))


def _passphrase(path: Path | None) -> bytes | None:
    if path is None:
        return None
    secret = read_text(path).strip("\r\n").encode()
    if not secret:
        raise BadInput("key.passphrase", f"{path} is empty")
    return secret


def _key(path: Path, passphrase_file: Path | None) -> Ed25519PrivateKey:
    import stat

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound("file.missing", f"there is no file {path}", hint="make one: retinue policy key new FILE") from None
    except OSError as error:
        raise BadInput("file.read", f"cannot read {path}: {error.strerror}") from None
    with os.fdopen(fd, "rb") as f:
        mode, data = stat.S_IMODE(os.fstat(fd).st_mode), f.read(65536)
    if mode & 0o077:
        raise BadState("state.key_mode", f"{path} has mode {mode:04o}: others can read it", hint=f"chmod 600 {path}")
    try:
        key = load_pem_private_key(data, _passphrase(passphrase_file))
    except TypeError:
        raise BadInput("key.passphrase", f"{path} has a passphrase, or none where one was given", hint="see --passphrase-file") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BadInput("key.form", f"{path} is not a readable key, or the passphrase is wrong") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput("key.form", f"{path} is not an Ed25519 key", hint="make one: retinue policy key new FILE")
    return key


# ---- the authority

_FORM = """trust_domain: prod.example
signers:
  alice: {key: KEY, roles: [security]}
  bob: {key: KEY}
  carol: {key: KEY, roles: [payments-lead]}
root: {signers: [alice, bob], threshold: 2}
scopes:
  "": {signers: [alice, bob], threshold: 1}
  acme/payments: {signers: [carol], threshold: 1}"""


@authority_app.command("new", epilog="Example: retinue policy authority new authority.yaml --out authority.json")
def authority_new(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Who signs for what, in YAML.")],
    out: Out,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="FILE", help="The chain so far; the new document is its next version.")
    ] = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Make the next authority document from a YAML file. The root signers sign it next.

    The file holds trust_domain, signers (name: {key, roles}), root (signers, threshold) and scopes (path: {signers,
    threshold}); the path "" is the whole mesh.
    """
    import json

    from policy.bundle import next_document
    from policy.signing import open_authority

    document = _document(path)
    chain = _chain(base) if base is not None else []
    known = open_authority(chain, document.trust_domain) if chain else None
    sealed = next_document(known, document)
    out.write_text(json.dumps([*map(json.loads, chain), json.loads(sealed.model_dump_json())], indent=1) + "\n")
    data = {"version": len(chain) + 1, "fingerprint": sealed.hash, "file": str(out)}
    cliout.emit(data, Output.JSON if as_json else output, human=lambda: print(f"version {data['version']}, fingerprint {sealed.hash}"))
    cliout.note(f"sign it: retinue policy authority sign {out} --key KEY")


def _document(path: Path) -> Any:
    from identity.names import TrustDomain
    from identity.records_policy import AuthorityDocument, PolicySigner, ScopeSigners
    from policy.document import Node, parse

    def words(node: Node, what: str) -> list[str]:
        return [one.scalar(what) for one in node.one_or_more(what)]

    top = parse(str(path), read_text(path)).mapping(
        "the authority", {"trust_domain", "signers", "root", "scopes"}, {"trust_domain", "signers", "root", "scopes"}
    )
    signers = {}
    top["signers"].mapping("signers")
    for name, _, node in top["signers"].pairs():
        fields = node.mapping("a signer", {"key", "roles"}, {"key"})
        roles = words(fields["roles"], "a role") if "roles" in fields else []
        signers[name] = _fits(node, lambda f=fields, r=roles: PolicySigner(key=f["key"].scalar("a key"), roles=r))
    root = top["root"].mapping("root", {"signers", "threshold"}, {"signers", "threshold"})
    top["scopes"].mapping("scopes")
    scopes = []
    for scope, _, node in top["scopes"].pairs():
        fields = node.mapping("a scope", {"signers", "threshold"}, {"signers", "threshold"})
        scopes.append(
            _fits(node, lambda s=scope, f=fields: ScopeSigners(
                scope=s, signers=words(f["signers"], "a signer"), threshold=f["threshold"].integer("threshold", 1, 20)
            ))
        )  # fmt: skip
    return _fits(top["root"], lambda: AuthorityDocument(
        trust_domain=TrustDomain(top["trust_domain"].scalar("trust_domain")).name, version=1, signers=signers,
        root=words(root["signers"], "a signer"), threshold=root["threshold"].integer("threshold", 1, 20),
        scopes=sorted(scopes, key=lambda s: s.scope), issued=int(time.time()),
    ))  # fmt: skip


def _fits(node: Any, make: Any) -> Any:
    from pydantic import ValidationError

    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise node.bad("authority.document", f"{where}: {first['msg']}", hint="write it like:\n" + _FORM) from None


def _chain(path: Path) -> list[str]:
    """The documents of a chain file, or of a bundle or a CA's answer that holds one."""
    import json

    from identity.records_policy import parse_sealed

    try:
        top = json.loads(read_text(path))
    except ValueError:
        raise BadInput("authority.form", f"{path} is not a chain of authority documents", hint="see: retinue policy authority new") from None
    if isinstance(top, dict):
        top = top.get("authority") or top.get("chain")
    if not isinstance(top, list) or not top:
        raise BadInput("authority.form", f"{path} holds no authority document", hint="see: retinue policy authority new")
    return [parse_sealed(one if isinstance(one, str) else json.dumps(one)).model_dump_json() for one in top]


@authority_app.command("sign", epilog="Example: retinue policy authority sign authority.json --key alice.key")
def authority_sign(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The chain; its last document is signed, in place.")],
    key: KeyFile,
    passphrase_file: Passphrase = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Sign the newest document of a chain. A new version takes the root signers of the old one and its own."""
    import json

    from identity.keys import b64, ed25519_public, write_file
    from identity.records_policy import AuthorityDocument, add_signature, parse_sealed

    chain, private = _chain(path), _key(key, passphrase_file)
    last = add_signature(AuthorityDocument, parse_sealed(chain[-1]), private, b64(ed25519_public(private)))
    texts = [*chain[:-1], last.model_dump_json()]
    write_file(path, (json.dumps([json.loads(t) for t in texts], indent=1) + "\n").encode())
    said = _complete(texts)
    data = {"version": len(texts), "signatures": len(last.signatures), "complete": said.startswith("complete")}
    cliout.emit(data, Output.JSON if as_json else output, human=lambda: print(said))


def _complete(chain: list[str]) -> str:
    from identity.errors import NotVerified
    from identity.records_policy import parse_sealed
    from policy.signing import open_authority

    try:
        found = open_authority(chain, _domain(chain))
    except NotVerified as error:
        return f"{len(parse_sealed(chain[-1]).signatures)} signatures; not complete yet: {error.message}"
    return f"complete: version {found.version}, fingerprint {found.fingerprint}"


def _domain(chain: list[str]) -> str:
    import json

    from identity.keys import unb64
    from identity.records_policy import parse_sealed

    try:
        return str(json.loads(unb64(parse_sealed(chain[-1]).payload))["trust_domain"])
    except (ValueError, KeyError, TypeError):
        raise BadInput("authority.form", "an authority document without a trust domain") from None


@authority_app.command("show", epilog="Example: retinue policy authority show authority.json")
def authority_show(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A chain file, or a bundle.")],
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Verify a chain and say who signs for what, with the fingerprint to compare."""
    from policy.signing import open_authority

    chain = _chain(path)
    found = open_authority(chain, _domain(chain))
    document = found.document
    data = {
        "version": found.version, "fingerprint": found.fingerprint, "trust_domain": document.trust_domain,
        "root": {"signers": document.root, "threshold": document.threshold},
        "scopes": {s.scope: {"signers": s.signers, "threshold": s.threshold} for s in document.scopes},
        "signers": {n: {"key": s.key, "roles": s.roles} for n, s in document.signers.items()},
    }  # fmt: skip
    rows = [("(root)", ", ".join(document.root), document.threshold)]
    rows += [(s.scope or "(whole mesh)", ", ".join(s.signers), s.threshold) for s in document.scopes]
    cliout.emit(data, Output.JSON if as_json else output, columns=("scope", "signers", "takes"), rows=rows)
    cliout.note(f"version {found.version}, fingerprint {found.fingerprint}")


# ---- bundles


@app.command("sign", epilog="Example: retinue policy sign payments.yaml --base current.bundle --key carol.key --out next.bundle")
def sign(
    out: Out,
    key: KeyFile,
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE...", help="All policy files of the scopes that change.")] = None,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BUNDLE", help="The bundle in force: retinue-ca policy bundle > FILE.")
    ] = None,
    authority: Annotated[
        Path | None, typer.Option("--authority", metavar="FILE", help="The authority's chain (default: the base's).")
    ] = None,
    add: Annotated[Path | None, typer.Option("--add", metavar="BUNDLE", help="Add a signature to this bundle instead.")] = None,
    withdraw: Annotated[
        list[str] | None, typer.Option("--withdraw", metavar="SCOPE", help="Take this scope's part back; may be repeated.")
    ] = None,
    passphrase_file: Passphrase = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Sign policy files as the whole part of their scopes, beside the parts of others; or add a signature to a bundle.

    The signature covers the exact bytes of every file of the part, its scope, its serial and the part before.
    """
    from policy.bundle import compose, dump_bundle, sign_bundle, states
    from policy.language import load
    from policy.signing import open_authority

    private = _key(key, passphrase_file)
    if add is not None and (files or withdraw):
        raise BadInput("usage", "--add takes a bundle as it is", hint="give either files or --add")
    given = add if add is not None else base
    before = _bundle(given) if given is not None else None
    chain = _chain(authority) if authority is not None else list(before.authority) if before is not None else []
    if not chain:
        raise BadInput("usage", "no policy authority", hint="give --authority FILE, or --base with a bundle of an authority")
    trusted = open_authority(chain, before.trust_domain if before is not None else _domain(chain))
    if add is not None:
        assert before is not None
        made = before
    else:
        if not files and not withdraw:
            raise BadInput("usage", "nothing to sign", hint="name policy files, or --add BUNDLE")
        texts = [(Path(name).name, text) for name, text in (read_files(files) if files else [])]
        made = compose(trusted, before, texts, int(time.time()), withdraw or ())
        if made.files:
            load(made.files)  # what cannot be compiled is not worth a signature
    signed, scopes = sign_bundle(made, trusted, private)
    from identity.keys import write_file

    write_file(out, dump_bundle(signed).encode())
    _show_states(signed, trusted, Output.JSON if as_json else output)
    missing = [s for s in states(signed, trusted) if not s.complete]
    cliout.note(f"signed {', '.join(s or 'the whole mesh' for s in scopes) or 'nothing new'}; "
                + ("complete" if not missing else f"{len(missing)} parts lack signatures: retinue policy sign --add {out} --key KEY --out {out}"))  # fmt: skip


def _bundle(path: Path) -> Bundle:
    from policy.bundle import read_bundle

    return read_bundle(str(path), read_text(path))


def _show_states(bundle: Bundle, authority: Authority, output: Output) -> None:
    from policy.bundle import states

    found = states(bundle, authority)
    data = [
        {"scope": s.scope, "serial": s.serial, "files": list(s.files), "signed": list(s.signed), "takes": s.wanted, "complete": s.complete}
        for s in found
    ]
    rows = [
        (s.scope or "(whole mesh)", s.serial, ", ".join(s.files), ", ".join(s.signed) or "nobody", s.wanted, "yes" if s.complete else "no")
        for s in found
    ]
    cliout.emit(data, output, columns=("scope", "serial", "files", "signed by", "takes", "complete"), rows=rows)


@app.command("bundle", epilog="Example: retinue policy bundle next.bundle")
def bundle_show(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.")],
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Say what a bundle holds and who signed it. Exit status 1 when signatures are missing, or its files are not the signed ones."""
    from policy.bundle import check_contents, states
    from policy.signing import open_authority, verify_bundle

    found = _bundle(path)
    authority = open_authority(found.authority, found.trust_domain)
    check_contents(found)
    _show_states(found, authority, Output.JSON if as_json else output)
    if not all(s.complete for s in states(found, authority)):
        raise typer.Exit(1)
    verify_bundle(authority, found.files, found.texts())


# ---- the past


@app.command("as-of", epilog="Example: retinue policy as-of history.jsonl --at 2031-02-11 --root FINGERPRINT --who-can-reach shop/db")
def as_of(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="From: retinue-ca policy export-history FILE.")],
    at: Annotated[str, typer.Option("--at", metavar="INSTANT", help="The date, such as 2031-02-11T18:00Z.")],
    root: Annotated[str, typer.Option("--root", metavar="FINGERPRINT", help="Root fingerprint of the trust domain, from elsewhere.")],
    target: Annotated[str | None, typer.Option("--who-can-reach", metavar="NAME", help="Who could send to NAME (default: all pairs).")] = None,
    flow: Annotated[str | None, typer.Option("--on", metavar="PORT", help="Only on tcp/443, 443, icmp ...")] = None,
    head: Annotated[str | None, typer.Option("--head", metavar="SIZE:HASH", help="A head of the log that was noted: it must be in this history.")] = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Say who could reach whom on a date, from the signed history; every signature is checked first."""
    from policy.history import read_history
    from policy.ports import parse_flow
    from policy.questions import matrix, rows_json, who_can_reach
    from policy.windows import parse_instant, show_instant

    noted = _head(head)
    try:
        with path.open(encoding="utf-8") as lines:
            found = read_history(str(path), lines, root.lower().replace(":", ""), noted)
    except OSError as error:
        raise BadInput("file.read", f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput("file.encoding", f"{path} is not UTF-8 text") from None
    then = found.at(parse_instant(at))
    proto, port = parse_flow(flow) if flow is not None else (None, None)
    if target is None:
        rows = matrix(then.program, then.subjects)
    else:
        one = next((s for s in then.subjects if s.name == target), None)
        if one is None:
            raise NotFound("policy.subject", f"{ascii(target)[:80]} was not placed at that date")
        rows = who_can_reach(then.program, then.subjects, one, proto, port)
    by = "operators' keys" if then.signed else "the CA's policy key alone"
    data = {
        "at": then.when, "revision": then.record.revision, "digest": then.record.digest, "author": then.record.author,
        "signed_by": by, "log": {"size": found.size, "root": found.root}, "places": then.places, **rows_json(rows),
    }  # fmt: skip
    cells = [(r.src, ", ".join(then.places.get(r.src, ())), r.dst, ", ".join(then.places.get(r.dst, ())), r.ports) for r in rows]
    cliout.emit(data, Output.JSON if as_json else output, columns=("from", "on host", "to", "on host", "ports"), rows=cells)
    cliout.note(f"policy revision {then.record.revision}, digest {then.record.digest[:16]}, signed by {by}, at {show_instant(then.when)}; "
                f"log {found.size}:{found.root}")  # fmt: skip


def _head(text: str | None) -> tuple[int, str] | None:
    if text is None:
        return None
    size, colon, root = text.partition(":")
    if not colon or not (size.isascii() and size.isdigit()) or not root:
        raise BadInput("log.head", f"not a head of the log: {ascii(text)[:100]}", hint="write SIZE:HASH, as audit verify prints it")
    return int(size), root
