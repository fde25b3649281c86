"""`retinue policy explain|matrix|who-can-reach|blast-radius|what-if|diff`: questions to policy files, answered offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput
from mesh.policy_files import At, Format, Inventory, Json, Policies, find_subject, load_policy, read_inventory

if TYPE_CHECKING:
    from policy.questions import Difference, Row


def explain(
    src: Annotated[str, typer.Argument(metavar="SRC", help="The workload that asks, or a SPIFFE ID of another trust domain.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="The workload that is asked.")],
    flow: Annotated[str, typer.Argument(metavar="PORT", help="tcp/443, 443 or icmp.")],
    policy: Policies,
    inventory: Inventory,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Say why SRC may or may not send to DST: the deciding rule, near misses, the smallest change."""
    output = Output.JSON if as_json else output
    from policy.explain import explain as explain_flow
    from policy.explain import to_json

    loaded, subjects = load_policy(policy, at), read_inventory(inventory)
    from policy.ports import parse_flow

    proto, port = parse_flow(flow)
    found = explain_flow(
        loaded.program, find_subject(subjects, src), find_subject(subjects, dst), proto, port, asleep=loaded.asleep
    )

    def human() -> None:
        print(f"{found.decision.verdict}: {cliout.clean(found.decision.reason)}")
        for one in found.conditions:
            print(f"condition: {cliout.clean(one)}")
        for miss in found.near_misses:
            print(
                f"near miss: rule {cliout.clean(miss.rule.id)} ({miss.rule.where}): {cliout.clean(miss.failed)}"
            )
        if found.smallest_change is not None:
            print(f"smallest change: {cliout.clean(found.smallest_change)}")
            for line in found.smallest_change.snippet.splitlines():
                print(f"    {cliout.clean(line)}")
        print(f"policy: {found.decision.digest[:16]}")

    cliout.emit(to_json(found), output, human=human)


def _print_rows(rows: list[Row], output: Output) -> None:
    from policy.questions import rows_json

    cells = [(r.src + _net(r.src_net), r.dst + _net(r.dst_net), r.ports) for r in rows]
    cliout.emit(rows_json(rows), output, columns=("from", "to", "ports"), rows=cells)


def _net(text: str) -> str:
    return f" [{text}]" if text else ""


def matrix(policy: Policies, inventory: Inventory, at: At = None, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """List everything that is allowed between the workloads of the inventory."""
    output = Output.JSON if as_json else output
    from policy.questions import matrix as all_rows

    _print_rows(all_rows(load_policy(policy, at).program, read_inventory(inventory)), output)


def who_can_reach(
    dst: Annotated[str, typer.Argument(metavar="DST", help="The workload that is asked.")],
    policy: Policies,
    inventory: Inventory,
    flow: Annotated[str | None, typer.Option("--on", metavar="PORT", help="Only on tcp/443, 443, icmp ...")] = None,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """List who may send to DST directly."""
    output = Output.JSON if as_json else output
    from policy.questions import who_can_reach as sources

    subjects = read_inventory(inventory)
    from policy.ports import parse_flow

    proto, port = parse_flow(flow) if flow is not None else (None, None)
    _print_rows(sources(load_policy(policy, at).program, subjects, find_subject(subjects, dst), proto, port), output)


def blast_radius(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workload in wrong hands.")],
    policy: Policies,
    inventory: Inventory,
    depth: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most so many steps.")] = None,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """List all that whoever holds NAME could reach, step by step."""
    output = Output.JSON if as_json else output
    from policy.questions import blast_radius as reached

    subjects = read_inventory(inventory)
    found = reached(load_policy(policy, at).program, subjects, find_subject(subjects, name).name, depth)
    data = [{"name": r.name, "hops": r.hops, "chain": list(r.chain)} for r in found]
    cliout.emit(
        data,
        output,
        columns=("name", "hops", "by way of"),
        rows=[(r.name, r.hops, " -> ".join(r.chain)) for r in found],
    )


def _print_differences(found: list[Difference], output: Output) -> None:
    data = [{"kind": d.kind, "src": d.src, "dst": d.dst, "ports": str(d.ports)} for d in found]
    cliout.emit(data, output, columns=("", "from", "to", "ports"),
                rows=[("+" if d.kind == "gains" else "-", d.src, d.dst, d.ports) for d in found])  # fmt: skip


def what_if(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workload, there or not.")],
    labels: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="KEY=VALUE to set, KEY= to take away.")],
    policy: Policies,
    inventory: Inventory,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Show what would change if the workload NAME had these labels; a new NAME is a new workload."""
    output = Output.JSON if as_json else output
    from policy.questions import what_if as changed

    wanted: dict[str, str | None] = {}
    for word in labels:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise BadInput(
                "label.form",
                f"not key=value: {ascii(word)[:60]}",
                hint="write role=web, or role= to take it away",
            )
        wanted[key] = value or None
    _print_differences(changed(load_policy(policy, at).program, read_inventory(inventory), name, wanted), output)


def diff(
    policy: Policies,
    against: Annotated[
        list[Path], typer.Option("--against", "-a", metavar="FILE", help="The policy files as they were before.")
    ],
    inventory: Inventory,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Show what the policy gives and takes compared with another one, pair by pair."""
    output = Output.JSON if as_json else output
    from policy.questions import difference

    before, after = load_policy(against, at), load_policy(policy, at)
    _print_differences(difference(before.program, after.program, read_inventory(inventory)), output)
