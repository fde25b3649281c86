"""`retinue-ca entry` and `retinue-ca workload life`: who is given which identity, and until when."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ca.cli import (
    DEFAULT_DIR,
    Dir,
    Format,
    Instance,
    Json,
    Name,
    client,
    output_of,
    workload_app,
)
from ca.cli_workload import show_workload
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput

if TYPE_CHECKING:
    from identity.wire.entries import EntryInfo

app = typer.Typer(help="Registration entries: which process of a host has which identity.", no_args_is_help=True, rich_markup_mode=None)

EndsAt = Annotated[str | None, typer.Option("--ends-at", metavar="TIME|+DURATION", help="When it is over: 2031-02-11T08:00:00Z, or +30m, +8h, +7d.")]
EndsWith = Annotated[str | None, typer.Option("--ends-with", metavar="WORKLOAD", help="It is over when this workload has no instance left.")]
EntryId = Annotated[str, typer.Argument(metavar="ID", help="Id of the entry.")]

Wait = Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0, max=60, help="Seconds to wait until the hosts concerned have applied it.")]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"\+([0-9]{1,8})([smhd])")


def parse_end(text: str | None) -> dict[str, int]:
    """``ends_in`` for ``+8h``, ``ends_at`` for a time; nothing for None. Raises BadInput ``lease.time``."""
    if text is None:
        return {}
    match = _DURATION.fullmatch(text)
    if match:
        return {"ends_in": int(match[1]) * _UNITS[match[2]]}
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput("lease.time", f"not a time: {ascii(text)[:60]}", hint="write 2031-02-11T08:00:00Z, or +30m, +8h, +7d") from None
    return {"ends_at": int((at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp())}


@app.command("create", epilog="Example: retinue-ca entry create shop/api --parent web-1 --select uid:33 --select unit:api.service")
def create(
    name: Name,
    parent: Annotated[str, typer.Option("--parent", metavar="HOST", help="The host, or a pattern of names such as 'web-*'.")],
    select: Annotated[list[str] | None, typer.Option("--select", "-s", metavar="KIND:VALUE", help="uid, gid, group, unit, cgroup, container, netns, path or sha256; repeat it.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="Only where the identity has this certified label; repeat it.")] = None,
    wait: Wait = 5.0,
    hint: Annotated[str, typer.Option(metavar="TEXT", help="What programs tell their identities apart by.")] = "",
    ttl: Annotated[int | None, typer.Option(metavar="SECONDS", min=60, max=86400, help="Life of its certificates.")] = None,
    ends_at: EndsAt = None, ends_with: EndsWith = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Give the processes that all selectors hold for an identity that is placed on their host.

    uid and one of unit, cgroup, container or netns are needed: the rest narrows an entry and proves nothing alone.
    Once a workload has an entry on a host, only processes that match one are given it there, also after the entry's end.
    The command waits until the hosts concerned have applied it and names those that have not: they answer as before.
    """
    from identity.labels import parse_labels
    from identity.wire.entries import EntryCreate, EntryInfo

    request = EntryCreate(
        name=name, parent=parent, selectors=select or [], labels=parse_labels(label or ()), hint=hint, ttl=ttl,
        ends_with=ends_with, wait=wait, **parse_end(ends_at),
    )  # fmt: skip
    done = client(directory).post("/v1/entries", request, EntryInfo, timeout=wait + 30)
    _show([done], output_of(output, as_json))
    _note_late(done)


@app.command("list", epilog="Example: retinue-ca entry list -o jsonl")
def list_(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Every entry."""
    from identity.wire.entries import EntryList

    found = client(directory).get("/v1/entries", EntryList).entries
    cliout.emit(found, output_of(output, as_json), columns=_COLUMNS, rows=[_row(e) for e in found])


@app.command("show", epilog="Example: retinue-ca entry show e-0123456789")
def show(entry: EntryId, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """One entry."""
    from identity.errors import NotFound
    from identity.wire.entries import EntryList

    found = [e for e in client(directory).get("/v1/entries", EntryList).entries if e.id == entry]
    if not found:
        raise NotFound("entry.unknown", f"no entry {ascii(entry)[:40]}", hint="see: retinue-ca entry list")
    _show(found, output_of(output, as_json))


@app.command("delete", epilog="Example: retinue-ca entry delete e-0123456789")
def delete(
    entry: EntryId, wait: Wait = 5.0, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """Take an entry away: its programs lose the identity at once.

    Where it was the workload's last one, the programs of the workload's network namespace are given it again.
    """
    from identity.wire.entries import EntryInfo, EntryRef

    done = client(directory).post("/v1/entries/delete", EntryRef(id=entry, wait=wait), EntryInfo, timeout=wait + 30)
    cliout.emit(done, output_of(output, as_json), human=lambda: print(f"{done.id} of {cliout.clean(done.name)} is deleted"))
    _note_late(done)
    if done.opens:
        cliout.note(f"it was the last one on {', '.join(done.opens)}: whoever is in the namespace of {cliout.clean(done.name)} is given it there")


@workload_app.command("life", epilog="Example: retinue-ca workload life shop/batch --ends-at +8h")
def life(
    name: Name, instance: Instance = 0, ends_at: EndsAt = None, ends_with: EndsWith = None,
    forever: Annotated[bool, typer.Option("--forever", help="Take its end away.")] = False,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Change when an instance is over. Every host acts on the time by itself, also while the CA is away."""
    from identity.wire.admin import Workload, WorkloadLife

    if forever == (ends_at is not None or ends_with is not None):
        raise BadInput("usage", "give --ends-at, --ends-with or both; or --forever")
    request = WorkloadLife(name=name, instance=instance, ends_with=ends_with, **parse_end(ends_at))
    show_workload(client(directory).post("/v1/workloads/life", request, Workload), output_of(output, as_json))


_COLUMNS: Final = ("id", "name", "parent", "selectors", "ends", "hosts")


def _row(e: EntryInfo) -> tuple[Any, ...]:
    return (e.id, e.name, e.parent, " ".join(e.selectors), "ended" if e.ended else end_text(e.ends_at, e.ends_with), " ".join(e.hosts))


def _note_late(done: EntryInfo) -> None:
    if done.waiting_for:
        cliout.note(f"not known to have applied it yet, so as before there: {', '.join(done.waiting_for)}")


def end_text(ends_at: int | None, ends_with: str | None) -> str:
    """When something is over, for people."""
    at = None if ends_at is None else datetime.fromtimestamp(ends_at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return " or ".join(t for t in (at, ends_with and f"with {ends_with}") if t) or "never"


def _show(found: list[EntryInfo], output: Output) -> None:
    cliout.emit(found[0], output, columns=_COLUMNS, rows=[_row(e) for e in found])
