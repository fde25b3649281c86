"""`retinue-ca workload add`, `list` and `revoke`: identities and where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

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
    when,
    workload_app,
)
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput

if TYPE_CHECKING:
    from identity.wire.admin import Workload


@workload_app.command(
    "add", epilog="Example: retinue-ca workload add shop/api --host web-1 --label role=api --label env=prod"
)
def workload_add(
    name: Name,
    host: Annotated[str | None, typer.Option("--host", metavar="HOST", help="Place it there; without, a sidecar or a move places it.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="A certified label; repeat it.")] = None,
    fence: Annotated[str, typer.Option(metavar="FENCE", help="available, or strict: goes dark when the CA is not heard.")] = "available",
    replica: Annotated[bool, typer.Option("--replica", help="Another instance of a workload that exists.")] = False,
    ends_at: Annotated[str | None, typer.Option("--ends-at", metavar="TIME|+DURATION", help="When it is over: 2031-02-11T08:00:00Z, or +30m, +8h, +7d.")] = None,
    ends_with: Annotated[str | None, typer.Option("--ends-with", metavar="WORKLOAD", help="It is over when this workload has no instance left.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Create an instance of a workload identity and place it."""
    from ca.cli_entry import parse_end
    from identity.labels import parse_labels
    from identity.wire.admin import Workload, WorkloadAdd

    request = WorkloadAdd(
        name=name, host=host, labels=parse_labels(label or ()), fence=_fence(fence), replica=replica, ends_with=ends_with,
        **parse_end(ends_at),
    )  # fmt: skip
    show_workload(client(directory).post("/v1/workloads", request, Workload), output_of(output, as_json))


def _fence(text: str) -> Literal["available", "strict"]:
    if text == "available":
        return "available"
    if text == "strict":
        return "strict"
    raise BadInput("workload.fence", f"not a fence: {ascii(text)[:40]}", hint="use available or strict")


@workload_app.command("list", epilog="Example: retinue-ca workload list -o jsonl")
def workload_list(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Every instance: where it is, at which epoch, with which addresses."""
    from identity.wire.admin import WorkloadList

    found = client(directory).get("/v1/workloads", WorkloadList).workloads
    cliout.emit(found, output_of(output, as_json), columns=_WORKLOAD, rows=[_workload_row(w) for w in found])


_WORKLOAD = ("name", "instance", "state", "host", "epoch", "addresses", "labels", "ends")


def _workload_row(w: Workload) -> tuple[object, ...]:
    labels = " ".join(f"{k}={v}" for k, v in w.labels.items())
    ends = " or ".join(t for t in (w.ends_at and when(w.ends_at), w.ends_with and f"with {w.ends_with}") if t)
    return (w.name, w.instance, w.state, w.host, w.epoch, " ".join(w.addresses), labels, ends or "never")


def show_workload(w: Workload, output: Output) -> None:
    """One instance."""
    cliout.emit(w, output, columns=_WORKLOAD, rows=[_workload_row(w)])


@workload_app.command("revoke", epilog="Example: retinue-ca workload revoke shop/api --instance 1")
def workload_revoke(
    name: Name,
    instance: Instance = 0,
    directory: Dir = DEFAULT_DIR,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Revoke one instance for ever; open connections of it are cut everywhere."""
    from identity.wire.admin import Workload, WorkloadRef

    done = client(directory).post(
        "/v1/workloads/revoke", WorkloadRef(name=name, instance=instance), Workload
    )
    show_workload(done, output_of(output, as_json))
