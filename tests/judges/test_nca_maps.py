"""Connectivity maps and differences as the analyser of the nca manifest prints them, pair by pair against our evaluator.

A printed line says which pods, by namespace and by name or by one label, may send what to which pods or addresses. It is read
into a table over our own workloads; ours has to be the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from policy import nets
from policy.evaluate import permitted
from policy.ports import ANYTHING, NOTHING, PortMap, parse_ports, union
from policy.program import Program, Subject
from tests.judges.test_nca import Table, objects_of, pytestmark, queries, translate

__all__ = ["pytestmark"]

FIELDS = re.compile(r"(src_ns|src_pods|src|dst_ns|dst_pods|dst|conn): (\[.*?\](?= )|\{.*\}|[^ ]+(?: connections)?)")
PORTS = re.compile(r"protocols:([A-Z]+(?:,[A-Z]+)*)(?:,dst_ports:([0-9,-]+))?")
ONE = re.compile(r"(.+) => (.+) : (.+)")
LABEL = re.compile(r"(\S+) in \((.*)\)")
Pair = tuple[str, str]


def maps() -> Iterator[tuple[str, Path, list[str], Path]]:
    for path, query, kind, names in queries({"connectivityMap", "semanticDiff"}, "expectedOutput"):
        yield kind, path, names, (path.parent / query["expectedOutput"]).resolve()


def ports_of(text: str) -> PortMap:
    if text == "All connections":
        return ANYTHING
    found = PORTS.search(text)
    assert found is not None, text
    words = [f"{proto.lower()}/{part}" if part else proto.lower() for proto in found[1].split(",") for part in (found[2] or "").split(",")]
    return union(parse_ports(word) for word in words)


def chosen(namespaces: str | None, pods: str, known: tuple[Subject, ...]) -> set[str]:
    """Workloads that ``[a,b]`` and ``[*]``, ``[name,name]`` or ``[key in (value,value)]`` mean."""
    spaces = (namespaces or "[]")[1:-1].split(",")
    inside = [one for one in known if not one.nets and one.name.partition("/")[0] in spaces]
    words = pods[1:-1]
    if words == "*":
        return {one.name for one in inside}
    picked = set()
    for word in re.split(r",\s*(?![^(]*\))", words):
        label = LABEL.fullmatch(word)
        for one in inside:
            short = one.name.partition("/")[2].partition("[")[0].partition(" (")[0]
            if (one.labels.get(label[1]) in label[2].split(",")) if label else short == word:
                picked.add(one.name)
    assert picked, f"{pods} of {namespaces} means nobody"
    return picked


class Printed:
    """Tables under their headings."""

    def __init__(self, text: str, known: tuple[Subject, ...], cells: list[nets.Range]) -> None:
        self.known, self.cells = known, cells
        self.tables: dict[str, dict[Pair, PortMap]] = {}
        heading = ""
        for line in text.splitlines():
            if line.startswith("src"):
                self._line(heading, dict(FIELDS.findall(line)))
            elif (one := ONE.fullmatch(line)) is not None:
                self._add(heading, self._end(one[1]), self._end(one[2]), ports_of(one[3]))
            else:
                heading = line.partition(" (based")[0]

    def _line(self, heading: str, fields: Mapping[str, str]) -> None:
        ends = []
        for side in ("src", "dst"):
            address = fields.get(side)
            ends.append(self._end(address) if address is not None else chosen(fields[f"{side}_ns"], fields[f"{side}_pods"], self.known))
        self._add(heading, ends[0], ends[1], ports_of(fields["conn"]))

    def _end(self, word: str) -> set[str]:
        if not word[:1].isdigit():
            return {one.name for one in self.known if one.name.partition(" (")[0] == word}
        wide = nets.ranges_of(tuple(word.split(",")))
        return {nets.show(cell) for cell in self.cells if nets.covers(wide, (cell,))}

    def _add(self, heading: str, sources: set[str], targets: set[str], ports: PortMap) -> None:
        table = self.tables.setdefault(heading, {})
        for pair in ((a, b) for a in sources for b in targets if a != b):
            table[pair] = union([table.get(pair, NOTHING), ports])


def table_of(program: Program, known: tuple[Subject, ...], cells: list[nets.Range]) -> Table:
    addresses = [Subject(nets.show(cell), {}, nets=(nets.show(cell),)) for cell in cells]
    inside = [one for one in known if not one.nets]
    pairs = [(a, b) for a in (*inside, *addresses) for b in (*inside, *addresses) if a is not b and not (a.nets and b.nets)]
    return {(a.name, b.name): ports for a, b in pairs if (ports := permitted(program, a, b))}


def differences(one: Table, other: Table) -> list[str]:
    return [f"{a} => {b}: {one.get((a, b), NOTHING)}, and should be {other.get((a, b), NOTHING)}"
            for a, b in sorted(one.keys() | other.keys()) if one.get((a, b), NOTHING) != other.get((a, b), NOTHING)]  # fmt: skip


def v4_cells(*programs: Program) -> list[nets.Range]:
    cuts = sorted({cut for program in programs for cut in nets.cut_points(program)})
    return list(nets.cells((nets.V4_ALL,), cuts))


def wrong_lines(kind: str, objects: list[list[dict[str, Any]]], text: str) -> list[str]:
    """Pairs of workloads on which ours and the printed tables differ. What pods of one workload send each other is not printed."""
    sides = [(program, tuple(one for one in known if not one.name.endswith(" (twin)"))) for program, known in map(translate, objects)]
    cells = v4_cells(*(program for program, _ in sides))
    every = tuple({one.name: one for _, known in sides for one in known}.values())
    printed = Printed(text, every, cells).tables
    tables = [table_of(program, known, cells) for program, known in sides]
    if kind == "connectivityMap":
        (wanted,) = printed.values()
        return differences(tables[0], wanted)
    gained: dict[Pair, PortMap] = {}
    lost: dict[Pair, PortMap] = {}
    for heading, table in printed.items():
        for pair, ports in table.items():
            into = lost if heading.startswith(("Removed", "Lost")) else gained
            into[pair] = union([into.get(pair, NOTHING), ports])
    old, new = tables
    found = []
    for what, one, other, said in (("lost", old, new, lost), ("gained", new, old, gained)):
        mine = {pair: more for pair, ports in one.items() if (more := ports - other.get(pair, NOTHING))}
        found += [f"{what}: {line}" for line in differences(mine, said)]
    return found


def test_maps_and_differences_pair_by_pair() -> None:
    right, wrong, skipped = 0, dict[str, list[str]](), list[str]()
    for kind, scheme, names, path in maps():
        objects = [objects_of(scheme, name) for name in names]
        if any(one.get("kind") == "Ingress" for side in objects for one in side):
            skipped.append(scheme.name)  # the analyser counts what an Ingress sends in; that is no NetworkPolicy
            continue
        lines = wrong_lines(kind, objects, path.read_text())
        right += not lines
        if lines:
            wrong[f"{scheme.name} {kind} of {names}"] = lines
    print(f"{right} of {right + len(wrong)} printed tables agree in every pair; not asked for an Ingress in it: {', '.join(skipped) or 'none'}",
          *(f"{name}: {len(lines)} pairs differ, such as {'; '.join(lines[:4])}" for name, lines in wrong.items()), sep="\n")  # fmt: skip
    assert right
    assert not wrong
