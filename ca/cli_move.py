"""`retinue-ca workload move`, `workload abort`, `host drain` and `host undrain`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ca.cli import (
    DEFAULT_DIR,
    Dir,
    Format,
    Instance,
    Json,
    Name,
    client,
    host_app,
    output_of,
    workload_app,
)
from ca.cli_workload import show_workload
from identity import cliout
from identity.cliout import Output
from identity.errors import BadState, from_wire

_LEASE_S = 120.0  # longest wait for a lease, beside the waits that are asked for


def register() -> None:
    """Its commands join those of `workload` and `host`."""
    workload_app.command("move", epilog="Example: retinue-ca workload move shop/api --to web-2 --wait 5")(move)
    workload_app.command("abort", epilog="Example: retinue-ca workload abort shop/api")(abort)
    host_app.command("drain", epilog="Example: retinue-ca host drain web-1 --to web-2 --to web-3 --dry-run")(drain)
    host_app.command("undrain", epilog="Example: retinue-ca host undrain web-1")(undrain)


def move(
    name: Name,
    to: Annotated[str, typer.Option("--to", metavar="HOST", help="The new host.")],
    instance: Instance = 0,
    wait: Annotated[float, typer.Option(metavar="SECONDS", min=0, max=300, help="Seconds for the new host to be ready, and for everyone to follow.")] = 5.0,
    force: Annotated[bool, typer.Option("--force", help="Move even when the new host did not report ready, or the old one may still serve.")] = False,
    wait_lease: Annotated[bool, typer.Option("--wait-lease", help="Wait until an old host that does not answer has fenced itself.")] = False,
    plan: Annotated[bool, typer.Option("--plan", "--dry-run", help="Check it and say who would be told.")] = False,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Move an instance to another host: it keeps its addresses, everyone refuses the old place.

    An old host that does not answer may go on serving peers that cannot hear of the move either. An identity with a
    strict fence therefore waits for the end of its lease, unless forced; -o jsonl prints every step.
    """
    from identity.wire.admin import MoveReply, WorkloadMove

    request = WorkloadMove(name=name, instance=instance, to=to, wait=wait, force=force, dry_run=plan, wait_lease=wait_lease)
    chosen = output_of(output, as_json)
    last = _follow("/v1/workloads/move/steps", request, directory, 2 * wait + _LEASE_S + 30, chosen)
    if chosen is Output.JSONL:
        return
    done = MoveReply.model_validate(last["move"])

    def human() -> None:
        what = f"{cliout.clean(name)}/{instance}: {done.from_host or 'nowhere'} -> {to}"
        if not done.applied:
            print(f"{what} is possible; would be told: {', '.join(done.waiting_for) or 'nobody connected'}")
            return
        print(f"{what}, epoch {done.workload.epoch}")
        for step, ms in (("prepared", done.prepared_ms), ("committed", done.committed_ms), ("released", done.released_ms)):
            print(f"  {step:9}  {'not waited out' if ms is None else f'{ms:.1f} ms'}")
        if done.waiting_for:
            print(f"  not yet reported by: {', '.join(map(cliout.clean, done.waiting_for))}")

    cliout.emit(done, chosen, human=human)


def abort(
    name: Name, instance: Instance = 0, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """Take back a move that is not committed yet: the instance stays where it is."""
    from identity.wire.admin import Workload, WorkloadRef

    done = client(directory).post("/v1/workloads/abort", WorkloadRef(name=name, instance=instance), Workload)
    show_workload(done, output_of(output, as_json))


def drain(
    name: Name,
    to: Annotated[list[str] | None, typer.Option("--to", metavar="HOST", help="Only to this host; repeat it.")] = None,
    parallel: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="So many at a time.")] = 1,
    wait: Annotated[float, typer.Option(metavar="SECONDS", min=0, max=300, help="Seconds for each phase of each move.")] = 5.0,
    force: Annotated[bool, typer.Option("--force", help="As for workload move.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go where.")] = False,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Move everything off a host, to hosts where a place is attached for it. Nothing new comes there until undrain.

    Run it again to go on after an interruption. Exit 1 when something stayed.
    """
    from identity.wire.moves import Drain

    request = Drain(name=name, to=to or [], parallel=parallel, wait=wait, force=force, dry_run=dry_run)
    chosen = output_of(output, as_json)
    last = _follow("/v1/hosts/drain", request, directory, 2 * wait + _LEASE_S + 30, chosen)
    if chosen is not Output.JSONL:
        def human() -> None:
            if dry_run:
                print(f"{len(last['left'])} instances can be moved off {cliout.clean(name)}")
                return
            print(f"{last['moved']} instances were moved off {cliout.clean(name)}; {len(last['left'])} stayed")

        cliout.emit(last, chosen, human=human)
    if last["left"] and not dry_run:
        raise typer.Exit(1)


def undrain(name: Name, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Let instances come to a host again. Nothing is moved back."""
    from identity.wire.admin import Host, HostRef

    done = client(directory).post("/v1/hosts/undrain", HostRef(name=name), Host)
    cliout.emit(done, output_of(output, as_json), human=lambda: print(f"{cliout.clean(done.name)} takes instances again"))


def _follow(path: str, request: Any, directory: Any, timeout: float, chosen: Output) -> dict[str, Any]:
    """Print the lines of a running act (people: on standard error) and return the last. Raises what it ended with."""
    last: dict[str, Any] | None = None
    for last in client(directory).lines(path, request, timeout=timeout):
        if chosen is Output.JSONL and last.get("event") != "error":
            print(json.dumps(last), flush=True)
        elif chosen is Output.TABLE and last.get("event") in {"step", "instance"}:
            cliout.note(_said(last))
    if last is None or last.get("event") in {"step", "instance"}:
        raise BadState("ca.cut", "the CA ended before it was done", hint="see: retinue-ca workload list")
    if last.get("event") == "error":
        raise from_wire(last["status"], last["error"])
    return last


def _said(line: dict[str, Any]) -> str:
    if line["event"] == "step":
        return f"{line['ms']:8.0f} ms  {cliout.clean(line['instance'])}  {line['step']}: {cliout.clean(line['text'])}"
    why = f": {cliout.clean(line['text'])}" if line["text"] else ""
    return f"{line['done']}/{line['total']}  {cliout.clean(line['instance'])} -> {line['to']}  {line['outcome']}{why}"
