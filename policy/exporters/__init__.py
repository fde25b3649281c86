"""Exporters: our policy over an inventory as a native rule set of another system, with the same truth table.

What is written is read back by that system's importer and compared with the original, pair by pair and port by port; an
export that differs, or that the target has no words for, is refused. A workload that is not in the inventory gets nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from identity.errors import BadInput
from policy.exporters.model import Exported
from policy.exporters.table import NotExpressible, Table
from policy.foreign import trust_domains
from policy.importers import run as run_importer
from policy.ports import ICMPV6, NOTHING, PortMap
from policy.program import Program, Subject
from policy.questions import Row, identity, matrix

__all__ = ["KINDS", "Exported", "NotExpressible", "compare", "export"]

KINDS: Final = ("kubernetes", "aws")

_Ends = tuple[str, str, str, str]  # src, its network, dst, its network


def export(kind: str, program: Program, subjects: Sequence[Subject], inside: Sequence[str] = ()) -> Exported:
    """Write `program` over the inventory for a target, checked.

    inside: the workloads' own networks at the target; outside ranges are written without them.
    Raises BadInput (unknown kind, no workload), NotExpressible (the target has no words for it, or what was written reads otherwise).
    """
    table = Table(program, subjects, inside)
    if not table.inner:
        raise BadInput("export.empty", "the inventory has no workload to export rules for")
    match kind:
        case "kubernetes":
            from policy.exporters.kubernetes import export_kubernetes

            found = export_kubernetes(table)
        case "aws":
            from policy.exporters.aws import export_aws

            found = export_aws(table)
        case _:
            raise BadInput(
                "export.kind", f"cannot export to {ascii(kind)[:40]}", hint=f"one of {', '.join(KINDS)}"
            )
    if table.outer and not inside:
        found.notes.append(
            "outside ranges are written as they are; where workloads have addresses in them, give those networks as inside"
        )
    if len(table.outer) > 1:
        found.notes.append(
            "flows between two outside ranges pass no workload; the target does not decide them"
        )
    found.untranslated = list(_untranslated(program))
    found.pairs = compare(kind, found, program, table)
    return found


def _untranslated(program: Program) -> Iterator[dict[str, str]]:
    """What the truth table over the inventory does not show, and so nothing that is written says. Raises NotExpressible for
    what would be wider there.
    """
    for rule in (rule for tier in program.tiers for rule in tier.rules):
        where = f"{rule.id} ({rule.where})" if rule.where is not None else rule.id
        if domains := trust_domains(rule.src) | trust_domains(rule.dst):
            yield {"where": where, "why": f"identities of {', '.join(sorted(domains))}: the target does not know foreign identities, "
                                          "so nothing is opened for them"}  # fmt: skip
        if rule.processes:
            names = ", ".join(str(one) for one in rule.processes)
            raise NotExpressible("process", f"only {names} may use {where}; the target would open it to every process of the source",
                                 hint="leave the rule out of what is exported, or give the process an identity of its own")  # fmt: skip
        if rule.max_rate is not None:
            yield {"where": where, "why": f"the ceiling of {rule.max_rate} bytes a second; the target has none"}
        if rule.idle_timeout is not None:
            yield {"where": where, "why": f"flows are ended after {rule.idle_timeout} seconds of silence here; the target does not end them"}


def compare(kind: str, exported: Exported, program: Program, table: Table) -> int:
    """Read the export back and compare truth tables; how many ordered pairs were compared. Raises NotExpressible."""
    again = run_importer(kind, exported.files)
    by_name = {s.name: s for s in again.inventory}
    lost = [own for own, foreign in exported.names.items() if foreign not in by_name]
    if lost:
        raise NotExpressible("differs", f"what was written for {kind} does not name {lost[0]}")
    names = {foreign: own for own, foreign in exported.names.items()}
    inner = [by_name[foreign] for foreign in exported.names.values()]
    outer = []
    for number, one in enumerate(
        table.outer
    ):  # without labels: addresses are all that the target knows of them
        names[f"outside {number}"] = identity(one)
        outer.append(Subject(f"outside {number}", nets=one.nets))
    wanted = _cells(matrix(program, [*table.inner, *table.outer]), {})
    got = _cells(matrix(again.policy.program, [*inner, *outer]), names)
    for ends in sorted(set(wanted) | set(got)):
        want, have = wanted.get(ends, NOTHING), got.get(ends, NOTHING)
        if not _same(want, have):
            src, src_net, dst, dst_net = ends
            raise NotExpressible(
                "differs",
                f"what was written for {kind} reads back differently: {_show(src, src_net)} -> {_show(dst, dst_net)} "
                f"is {have}, and should be {want}",
            )
    count = len(table.inner)
    return count * (count - 1) + 2 * count * len(table.outer)


def _cells(rows: Sequence[Row], names: Mapping[str, str]) -> dict[_Ends, PortMap]:
    """Rows with an inside end, by their ends; a gateway and what lies behind it are one."""
    out: dict[_Ends, PortMap] = {}
    for row in rows:
        src, dst = names.get(row.src, row.src), names.get(row.dst, row.dst)
        if src == dst or (row.src_net and row.dst_net):
            continue
        ends = (src, row.src_net, dst, row.dst_net)
        out[ends] = out.get(ends, NOTHING) | row.ports
    return out


def _same(one: PortMap, other: PortMap) -> bool:
    """Equal on every protocol, however they are written; 58 is ICMP by another number."""
    return one == other or all(one.bits(p) == other.bits(p) for p in range(256) if p != ICMPV6)


def _show(name: str, net: str) -> str:
    return f"{name} [{net}]" if net else name
