"""`retinue-ca authority`: roots, intermediates and record keys come and go; keys and certificates are blocked."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, client, output_of
from identity import cliout
from identity.cliout import Output

if TYPE_CHECKING:
    from identity.wire.authority import AuthorityInfo

app = typer.Typer(
    help="The authority's roots, intermediates and record keys: prepare, activate, taint, revoke.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip

KindName = Literal["root", "intermediate", "records", "policy"]
KindArg = Annotated[KindName, typer.Argument(metavar="KIND", help="root, intermediate, records or policy.")]
MemberArg = Annotated[str, typer.Argument(metavar="NAME", help="Its name, as `show` prints it.")]
EntryArg = Annotated[str, typer.Argument(metavar="ENTRY", help="key:SPKI, serial:ISSUER:SERIAL or id:BEFORE:SPIFFE-ID.")]


@app.command(epilog="Example: retinue-ca authority show")
def show(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Every member, its state, and how many certificates in force hang from it."""
    from identity.wire.authority import AuthorityInfo

    _print(client(directory).get("/v1/authority", AuthorityInfo), output_of(output, as_json))


@app.command(epilog="Example: retinue-ca authority prepare intermediate")
def prepare(kind: KindArg, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Make the successor of the one that signs, and publish it. Roots and intermediates need the root's key."""
    from identity.wire.authority import AuthorityInfo, KindRef

    _print(client(directory).post("/v1/authority/prepare", KindRef(kind=kind), AuthorityInfo), output_of(output, as_json))


@app.command(epilog="Example: retinue-ca authority activate intermediate")
def activate(kind: KindArg, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Let the prepared one sign; the one before stays good. Records are signed anew when a record key changes."""
    from identity.wire.authority import AuthorityInfo, KindRef

    _print(client(directory).post("/v1/authority/activate", KindRef(kind=kind), AuthorityInfo), output_of(output, as_json))


@app.command(epilog="Example: retinue-ca authority taint intermediate --spread 900")
def taint(
    name: MemberArg,
    spread: Annotated[int, typer.Option(metavar="SECONDS", min=1, max=604800, help="Over which everything below it is renewed.")] = 600,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Have every certificate below an old root or intermediate renewed, each at a moment of its own."""
    from identity.wire.authority import AuthorityInfo, MemberRef

    asked = MemberRef(name=name, spread=spread)
    _print(client(directory).post("/v1/authority/taint", asked, AuthorityInfo), output_of(output, as_json))


@app.command(epilog="Example: retinue-ca authority revoke intermediate")
def revoke(
    name: MemberArg,
    force: Annotated[bool, typer.Option("--force", help="Although certificates in force hang from it: they are cut off.")] = False,
    compromised: Annotated[bool, typer.Option("--compromised", help="Others have its key: it vouches for nothing, not even its successor.")] = False,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Have it refused everywhere from now on, and destroy its key here."""
    from identity.wire.authority import AuthorityInfo, MemberRef

    asked = MemberRef(name=name, force=force, compromised=compromised)
    _print(client(directory).post("/v1/authority/revoke", asked, AuthorityInfo), output_of(output, as_json))


@app.command(epilog="Example: retinue-ca authority block id:1900000000:spiffe://prod.example/wl/shop/api")
def block(
    entry: EntryArg,
    days: Annotated[int, typer.Option(metavar="DAYS", min=1, max=3652, help="How long it is listed.")] = 90,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Have a key, a certificate, or what an identity was given before a time refused everywhere."""
    from identity.wire.authority import AuthorityInfo, BlockRef

    asked = BlockRef(entry=entry, until=int(time.time()) + days * 86400)
    _print(client(directory).post("/v1/authority/block", asked, AuthorityInfo), output_of(output, as_json))


@app.command(epilog="Example: retinue-ca authority unblock id:1900000000:spiffe://prod.example/wl/shop/api")
def unblock(entry: EntryArg, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Take what `block` put there off the list."""
    from identity.wire.authority import AuthorityInfo, BlockRef

    _print(client(directory).post("/v1/authority/unblock", BlockRef(entry=entry), AuthorityInfo), output_of(output, as_json))


def _print(found: AuthorityInfo, chosen: Output) -> None:
    rows = [
        (m.name, m.state, _when(m.since), _when(m.not_after), "here" if m.here else "away", m.certificates, m.key[:16])
        for m in found.members
    ]
    columns = ("member", "state", "since", "ends", "key", "certificates", "key hash")
    cliout.emit(found, chosen, columns=columns, rows=rows)
    if chosen is Output.TABLE and found.blocked:
        cliout.note(f"{len(found.blocked)} entries on the block list: retinue-ca authority show -o json")


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(seconds))
