"""`retinue-ca admin`, `approve` and `approvals`: administrators with certificates, and acts that want two of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, client, output_of, when
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput

if TYPE_CHECKING:
    from identity.wire.people import AdminInfo, Approval, Role

app = typer.Typer(help="Administrators with certificates of their own.", no_args_is_help=True, rich_markup_mode=None)

Who = Annotated[str, typer.Argument(metavar="NAME", help="Name of the administrator.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory for key, certificate and roots (0700).")]
Csr = Annotated[Path | None, typer.Option("--csr", metavar="FILE", help="Their request, made with: retinue-ca admin request. Without it a key is made here.")]
Server = Annotated[str | None, typer.Option("--server-url", metavar="URL", help="https://HOST:PORT that they will use, noted in the directory.")]
ROLES = ("viewer", "registrar", "operator", "ca-admin")


def check_role(text: str) -> Role:
    """Raises BadInput."""
    for role in ROLES:
        if text == role:
            return role  # type: ignore[return-value]  # it is one of them
    raise BadInput("usage", f"not a role: {ascii(text)[:40]}", hint=f"use {', '.join(ROLES)}")


@app.command("add", epilog="Example: retinue-ca admin add alice --role registrar --scope 'payments/*' --out ./alice")
def add(
    name: Who,
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="viewer, registrar, operator or ca-admin.")],
    out: Out,
    scope: Annotated[list[str] | None, typer.Option("--scope", metavar="SUBTREE", help="Only below this, such as 'payments/*'; repeat it.")] = None,
    csr: Csr = None, server_url: Server = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Make an administrator, with a certificate for eight hours that renews itself while it is used.

    The first one is made by root on the CA's own machine.
    """
    from identity.wire.people import AdminAdd

    chosen, (request, key) = check_role(role), _request(csr)
    _credential("/v1/admins", AdminAdd(name=name, role=chosen, scopes=scope or [], csr=request), key, out, server_url, directory, output_of(output, as_json))


@app.command("certify", epilog="Example: retinue-ca admin certify alice --csr alice.csr --out ./alice")
def certify(
    name: Who, out: Out, csr: Csr = None, server_url: Server = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """A new certificate for an administrator whose own has expired or is lost."""
    from identity.wire.people import AdminCertify

    request, key = _request(csr)
    _credential("/v1/admins/certify", AdminCertify(name=name, csr=request), key, out, server_url, directory, output_of(output, as_json))


@app.command("renew", epilog="Example: retinue-ca admin renew   # who: RETINUE_ADMIN_IDENTITY=./alice")
def renew(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """A new key and certificate for eight hours, now; any command does that by itself once half of the time is over.

    After its end only `admin certify` helps: by two ca-admins, or by root on the CA's own machine.
    """
    from ca.remote import RemoteClient

    ca = client(directory)
    if not isinstance(ca, RemoteClient):
        raise BadInput("admin.local", "root has no administrator's certificate", hint="give --admin-identity DIR; or: retinue-ca admin certify NAME")
    made = ca.renew()
    data = made.model_dump(exclude={"chain", "roots"}) | {"dir": str(ca.directory)}
    cliout.emit(data, output_of(output, as_json), human=lambda: print(f"{made.admin.spiffe_id}: certificate until {when(made.expires)}, in {ca.directory}"))


@app.command("request", epilog="Example: retinue-ca admin request --out ./alice > alice.csr")
def request_(out: Out, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Make a key here and print the request for its certificate: the key never leaves this machine."""
    from ca.remote import new_key
    from identity import certs
    from identity.errors import BadState
    from identity.keys import private_pem, write_secret

    key = new_key()
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_secret(out / "key.pem", private_pem(key))
    except OSError as e:
        raise BadState("admin.identity", f"cannot write {out}: {e.strerror}") from None
    csr = certs.make_csr(key)

    def human() -> None:
        print(csr, end="")
        cliout.note("next: a ca-admin runs retinue-ca admin add or certify with --csr; put what it writes beside key.pem")

    cliout.emit({"csr": csr, "key": str(out / "key.pem")}, output_of(output, as_json), human=human)


@app.command("list", epilog="Example: retinue-ca admin list -o json")
def list_(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Every administrator."""
    from identity.wire.people import AdminList

    found = client(directory).get("/v1/admins", AdminList).admins
    cliout.emit(found, output_of(output, as_json), columns=_ADMIN, rows=[_admin_row(a) for a in found])


@app.command("revoke", epilog="Example: retinue-ca admin revoke alice")
def revoke(name: Who, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Put an administrator out with all certificates. The name is not given again."""
    from identity.wire.people import AdminInfo, AdminRef

    done = client(directory).post("/v1/admins/revoke", AdminRef(name=name), AdminInfo)
    cliout.emit(done, output_of(output, as_json), columns=_ADMIN, rows=[_admin_row(done)])


def approve(
    approval: Annotated[str, typer.Argument(metavar="ID", help="Id of the act, from retinue-ca approvals.")],
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Be the second person: who asked may then run the same command again, once, within the hour."""
    from identity.wire.people import Approval, ApprovalRef

    done = client(directory).post("/v1/approvals", ApprovalRef(id=approval), Approval)

    def human() -> None:
        print(f"{done.id}: {cliout.clean(done.asked_by)} may now {done.act} ({cliout.clean(done.summary)}) until {when(done.expires)}")

    cliout.emit(done, output_of(output, as_json), human=human)


def approvals(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Acts that wait for a second person, or had one; newest first."""
    from identity.wire.people import ApprovalList

    found = client(directory).get("/v1/approvals", ApprovalList).approvals
    rows = [_approval_row(a) for a in found]
    cliout.emit(found, output_of(output, as_json), columns=("id", "state", "act", "what", "asked by", "approved by", "until"), rows=rows)


_ADMIN = ("name", "role", "scopes", "state", "certificate until", "made by")


def _admin_row(a: AdminInfo) -> tuple[Any, ...]:
    return (a.name, a.role, " ".join(a.scopes) or "everything", a.state, when(a.expires) if a.expires else None, a.created_by)


def _approval_row(a: Approval) -> tuple[Any, ...]:
    return (a.id, a.state, a.act, a.summary, a.asked_by, a.approved_by, when(a.expires))


def _request(path: Path | None) -> tuple[str, Any]:
    """A request from a file, or of a new key."""
    from ca.remote import new_key
    from identity import certs

    if path is None:
        key = new_key()
        return certs.make_csr(key), key
    try:
        text = path.read_text(encoding="ascii", errors="replace")[: certs.MAX_CSR + 1]
    except OSError as e:
        raise BadInput("admin.csr", f"cannot read {path}: {e.strerror}") from None
    certs.csr_key(text)
    return text, None


def _credential(path: str, request: Any, key: Any, out: Path, server: str | None, directory: Path, output: Output) -> None:
    from ca.remote import check_server, save
    from identity.wire.people import AdminCredential

    if server is not None:
        check_server(server)
    made = client(directory).post(path, request, AdminCredential)
    save(out, made, key, server)
    data = made.model_dump(exclude={"chain", "roots"}) | {"dir": str(out)}

    def human() -> None:
        print(f"{made.admin.spiffe_id} is {made.admin.role}, certificate until {when(made.expires)}, in {out}")
        cliout.note(f"next: retinue-ca --server https://HOST:PORT --admin-identity {out} workload list")

    cliout.emit(data, output, human=human)
