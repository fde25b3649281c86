"""`retinue-ca explain`: why one workload may reach another, and who has an identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Instance, Json, app, client, output_of, when
from identity import cliout
from identity.cliout import Output

if TYPE_CHECKING:
    from ca.client import AdminClient


@app.command(epilog="Example: retinue-ca explain shop/web shop/api 8080")
def explain(
    src: Annotated[str, typer.Argument(metavar="SRC", help="The workload that asks; or the word identity.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="The workload that is asked, or whose identity it is.")],
    port: Annotated[int | None, typer.Argument(metavar="PORT", help="A port of --proto.")] = None,
    proto: Annotated[str, typer.Option(metavar="PROTO", help="tcp, udp, sctp, icmp or a number.")] = "tcp",
    instance: Instance = 0,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Why one workload may or may not reach another, and what would change it.

    retinue-ca explain identity NAME: who has that identity, by which proof, since when and until when.
    """
    if src == "identity" and port is None:
        _identity(client(directory), dst, instance, output_of(output, as_json))
        return
    from identity.wire.admin import ExplainReply

    found = client(directory).get(
        "/v1/explain", ExplainReply, {"src": src, "dst": dst, "proto": proto, "port": port}
    )

    def human() -> None:
        print(f"{found.verdict.upper()}  {cliout.clean(found.reason)}")
        if found.audited:
            print(f"  audit: will be denied by {cliout.clean(str(found.would_deny))} when the audit ends")
        for one in found.conditions:
            print(f"  limit: {cliout.clean(one)}")
        for miss in found.near_misses:
            print(f"  nearly: {cliout.clean(miss)}")
        if found.smallest_change:
            print(f"  would flip it: {cliout.clean(found.smallest_change)}")

    cliout.emit(found, output_of(output, as_json), human=human)


def _identity(ca: AdminClient, name: str, instance: int, output: Output) -> None:
    """Print what the CA knows of an identity; exit 1 when nobody holds it."""
    from ca.cli_entry import end_text
    from identity.wire.explain import IdentityExplained

    found = ca.get("/v1/explain/identity", IdentityExplained, {"name": name, "instance": instance})

    def human() -> None:
        print(cliout.clean(f"{'HELD' if found.holds else 'NOT HELD'}  {found.spiffe_id} instance {found.instance}"))
        said: list[tuple[str, object]] = [("because", found.reason), *(("proof", p) for p in found.proof), ("holder", found.holder)]
        said += [("epoch", found.epoch), ("since", found.since and when(found.since)), ("until", end_text(found.ends, found.ends_with))]
        if found.certificate is not None:
            c = found.certificate
            said.append(("cert", f"serial {c.serial}, issuer {c.issuer}, until {when(c.not_after)}"))
        said += [("entry", f"{e.id}  {e.parent}  {e.selectors}{'' if e.labels_ok else '  (labels differ)'}") for e in found.entries]
        said += [("fence", text) for text in found.fences]
        for what, text in said:
            print(cliout.clean(f"  {what:8} {'-' if text is None else text}"))

    cliout.emit(found, output, human=human)
    if not found.holds:
        raise typer.Exit(1)
