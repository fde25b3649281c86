"""Comparisons of whole sets of policies, against the numbers of the nca manifest, when the policies it names are there.

The manifest beside the checkout holds the questions and their answers, but not the policies. They are looked for beside
it, and below the folder that RETINUE_NCA names (a checkout of the manifest's source at the commit its README gives).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from policy import nets
from policy.evaluate import isolates, matches, permitted
from policy.importers import run
from policy.importers.model import SourceRefused
from policy.ports import ANYTHING, NOTHING, PortMap
from policy.program import BOTH, Action, Program, Subject

NCA = Path(__file__).resolve().parents[3] / "shared" / "judges" / "nca"
MANIFEST = NCA / "manifest.json"
ROOTS = [Path(p) for p in (os.environ.get("RETINUE_NCA"), str(NCA)) if p]
GOAL = 0.95
KINDS = (
    "equivalence", "containment", "twoWayContainment", "vacuity", "permits", "forbids", "strongEquivalence", "redundancy",
    "pairwiseInterferes", "interferes", "emptiness", "allCaptured", "sanity", "semanticDiff",
)  # fmt: skip
Table = Mapping[tuple[str, str], PortMap]


def source() -> Path | None:
    return next((root for root in ROOTS if (root / "tests" / "k8s_testcases").is_dir()), None)


pytestmark = [
    pytest.mark.judges,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not MANIFEST.exists(), reason=f"the outside judge cases are absent: there is no {MANIFEST}"),
    pytest.mark.skipif(
        source() is None, reason=f"the nca manifest has questions but no policies: no tests/k8s_testcases in {NCA}, and RETINUE_NCA names none"
    ),
]


def queries(kinds: Collection[str], answer: str) -> Iterator[tuple[Path, dict[str, Any], str, list[str]]]:
    """(scheme file, query, kind, names of its configurations) of the Kubernetes questions of these kinds that have that answer."""
    root = source()
    assert root is not None
    for scheme in json.loads(MANIFEST.read_text()):
        path = root / scheme["scheme"]
        if "/k8s_testcases/" in scheme["scheme"] and not scheme["needs_network"] and path.exists():
            for query in scheme["queries"]:
                ((kind, names), *_) = query["ask"].items()
                if kind in kinds and query.get(answer) is not None:
                    yield path, query, kind, names


def read(base: Path, words: Any) -> Iterator[dict[str, Any]]:
    """The objects of the files that a scheme names, lists unpacked."""
    for word in [words] if isinstance(words, str) else words or []:
        place = base / word.rstrip("*").rstrip("/")
        paths = sorted(place.rglob("*") if word.endswith("**") else place.iterdir()) if place.is_dir() else [place]
        for path in paths:
            if path.suffix in {".yaml", ".yml", ".json"}:
                for document in yaml.safe_load_all(path.read_text()):
                    if isinstance(document, dict):
                        yield from unpack(document)


def unpack(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not isinstance(document.get("items"), list):
        yield document
        return
    given = {} if document["kind"] == "List" else {"kind": document["kind"].removesuffix("List"), "apiVersion": document["apiVersion"]}
    for item in document["items"]:
        yield given | item


@functools.cache
def load(scheme: Path, name: str) -> tuple[Program, tuple[Subject, ...]]:
    """A configuration, or with a path behind its name one of its policies alone."""
    return translate(objects_of(scheme, name))


def translate(objects: list[dict[str, Any]]) -> tuple[Program, tuple[Subject, ...]]:
    """Program and workloads; one that has several pods alike stands there twice, for they talk to each other, too."""
    found = run("kubernetes", {"all.yaml": yaml.safe_dump_all(objects)})
    twins = tuple(replace(one, name=f"{one.name} (twin)") for one in found.inventory if not one.nets and pods_of(one, objects) > 1)
    return found.policy.program, (*found.inventory, *twins)


def pods_of(one: Subject, objects: list[dict[str, Any]]) -> int:
    """How many pods are meant by it, as far as they differ in nothing."""
    count = 0
    for o in objects:
        about, spec = o.get("metadata") or {}, o.get("spec") or {}
        owner = next((own["name"] for own in about.get("ownerReferences") or []), about.get("name"))
        if f"{about.get('namespace') or 'default'}/{owner}" != one.name.partition("[")[0].partition(" (")[0]:
            continue
        if o.get("kind") == "Pod":
            count += (about.get("labels") or {}).items() <= one.labels.items()
        elif "template" in spec:
            count += spec.get("replicas", 1)
    return count


def is_policy(one: dict[str, Any]) -> bool:
    return one.get("kind") == "NetworkPolicy"


def label(one: dict[str, Any]) -> str:
    return f"{one['metadata'].get('namespace', 'default')}/{one['metadata']['name']}"


KEYS = {  # what of the files is meant; one folder may stand under several keys
    "namespaceList": lambda one: one.get("kind") == "Namespace",
    "podList": lambda one: one.get("kind") != "Namespace" and "NetworkPolicy" not in str(one.get("kind")),
    "networkPolicyList": lambda one: "NetworkPolicy" in str(one.get("kind")) or one.get("kind") == "Ingress",
}


def objects_of(scheme: Path, name: str) -> list[dict[str, Any]]:
    top = yaml.safe_load(scheme.read_text())
    own, _, wanted = name.partition("/")
    config = next(c for c in top["networkConfigList"] if c["name"] == own)
    objects = [
        one
        for key in ("namespaceList", "podList", "resourceList", "networkPolicyList")
        for part in ((config,) if key in config else (top,))
        for one in read(scheme.parent, part.get(key))
        if key == "resourceList" or KEYS[key](one)
    ]
    if wanted:
        namespace, _, policy = wanted.rpartition("/")
        objects = [
            o for o in objects
            if "NetworkPolicy" not in str(o.get("kind"))
            or (o["metadata"]["name"] == policy and namespace in {"", o["metadata"].get("namespace", "default")})
        ]  # fmt: skip
    return objects


def tables(scheme: Path, names: list[str]) -> tuple[list[Table], Table]:
    """What each configuration allows, over pairs and address ranges that all of them treat alike. The second table is
    what each says explicitly (an end is selected by a policy of its own), by its number before the source's name.
    """
    return compare([load(scheme, name) for name in names])


def compare(found: list[tuple[Program, tuple[Subject, ...]]]) -> tuple[list[Table], Table]:
    cuts = sorted({cut for program, _ in found for cut in nets.cut_points(program)})
    subjects = [
        replace(one, name=f"{one.name} {part}", nets=part) if one.nets else one
        for one in found[0][1]
        for part in ([(nets.show(cell),) for cell in nets.cells(nets.ranges_of(one.nets), cuts)] if one.nets else [()])
    ]
    pairs = [(a, b) for a, b in itertools.permutations(subjects, 2) if not (a.nets and b.nets)]
    held = [{(a.name, b.name): permitted(program, a, b) for a, b in pairs} for program, _ in found]
    said = {
        (f"{number} {a.name}", b.name): held[number][a.name, b.name] if selected(program, a, b) else NOTHING
        for number, (program, _) in enumerate(found)
        for a, b in pairs
    }
    return list(held), said


def selected(program: Program, src: Subject, dst: Subject) -> bool:
    return any(isolates(tier, way, src, dst) for tier in program.tiers for way in BOTH)


def within(one: Table, other: Table) -> bool:
    return not any(ports - other[pair] for pair, ports in one.items())


def equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    (first, second), _ = compare([translate(one), translate(other)])
    return first == second


Rules = set[tuple[str, int]]  # way and place in the list of a policy


def rules_of(policy: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for way in ("ingress", "egress"):
        yield from ((way, index) for index in range(len(policy["spec"].get(way) or [])))


def needless_policies(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of them can go without a difference."""
    policies = [o for o in objects if is_policy(o)]
    return [p for p in policies if len(policies) > 1 and equal(objects, [o for o in objects if o is not p])]


def needless_rules(objects: list[dict[str, Any]], policy: dict[str, Any]) -> Rules:
    """Each of them can go without a difference."""
    found = Rules()
    types = policy["spec"].get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in policy["spec"] else [])]
    for way, index in rules_of(policy):
        rules = policy["spec"][way]
        spec = policy["spec"] | {way: [*rules[:index], *rules[index + 1 :]], "policyTypes": types}
        if equal(objects, [o if o is not policy else o | {"spec": spec} for o in objects]):
            found.add((way, index))
    return found


def redundant(objects: list[dict[str, Any]]) -> int:
    """Policies that can go without a difference, and rules of the others that can."""
    needless = needless_policies(objects)
    others = [p for p in objects if is_policy(p) and not any(p is n for n in needless)]
    return len(needless) + sum(len(needless_rules(objects, policy)) for policy in others)


def selects_nobody(rest: list[dict[str, Any]], policy: dict[str, Any]) -> bool:
    program, known = translate([*rest, policy])
    return not any(isolates(tier, way, one, one) for tier in program.tiers for way in BOTH for one in known)


def empty_rules(rest: list[dict[str, Any]], policy: dict[str, Any]) -> Rules:
    """Rules whose other end nobody is."""
    found = Rules()
    for way, index in rules_of(policy):
        rule = policy["spec"][way][index]
        if any("ipBlock" in peer for peer in rule.get("from" if way == "ingress" else "to") or []):
            continue  # addresses are there always
        spec = policy["spec"] | {"ingress": [], "egress": [], way: [rule], "podSelector": {}}
        alone, inventory = translate([*rest, policy | {"spec": spec}])
        ends = [r.src if way == "ingress" else r.dst for tier in alone.tiers for r in tier.rules if r.action is Action.ALLOW]
        if ends and not any(matches(end, one) for end in ends for one in inventory):
            found.add((way, index))
    return found


def empty(objects: list[dict[str, Any]]) -> int:
    """Policies that select nobody, and rules whose other end nobody is."""
    rest = [o for o in objects if not is_policy(o)]
    return sum(selects_nobody(rest, p) + len(empty_rules(rest, p)) for p in objects if is_policy(p))


def sanity(objects: list[dict[str, Any]]) -> int:
    """Everything is allowed; policies that select nobody; of the others rules without anybody at the other end, and what is
    needless: a policy, or else rules of it.
    """
    (table,), _ = compare([translate(objects)])
    allows_all = all(ports == ANYTHING for ports in table.values())
    rest = [o for o in objects if not is_policy(o)]
    needless = [] if allows_all else needless_policies(objects)
    count = int(allows_all)
    for policy in (o for o in objects if is_policy(o)):
        if selects_nobody(rest, policy):
            count += 1
            continue
        nobody = empty_rules(rest, policy)
        count += len(nobody)
        if allows_all:
            continue
        count += 1 if any(policy is n for n in needless) else len(needless_rules(objects, policy) - nobody)
    return count


def categories(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> int:
    """In how many ways two configurations of the same or of different workloads differ: connections gained and lost, between
    workloads that are in both, in one of them, and addresses, each way counted once.
    """
    sides = translate(old), translate(new)
    cuts = sorted({cut for program, _ in sides for cut in nets.cut_points(program)})
    tables: list[dict[tuple[str, str], PortMap]] = []
    names: list[set[str]] = []
    for program, known in sides:
        subjects = [
            replace(one, name=f"{nets.show(cell)}", nets=(nets.show(cell),)) if one.nets else one
            for one in known
            for cell in (nets.cells(nets.ranges_of(one.nets), cuts) if one.nets else [None])
        ]
        names.append({one.name for one in subjects if not one.nets})
        pairs = [(a, b) for a, b in itertools.permutations(subjects, 2) if not (a.nets and b.nets)]
        tables.append({(a.name, b.name): permitted(program, a, b) for a, b in pairs})
    both = names[0] & names[1]

    def kind(pair: tuple[str, str]) -> str:
        inside = [name for name in pair if name in names[0] | names[1]]
        return ("persistent" if all(name in both for name in inside) else "mixed" if any(name in both for name in inside) else "single") + (
            "" if len(inside) == 2 else " and addresses"
        )

    found = set()
    for way, (one, other) in (("lost", (tables[0], tables[1])), ("gained", (tables[1], tables[0]))):
        found |= {(way, kind(pair)) for pair, ports in one.items() if ports - other.get(pair, NOTHING)}
    return len(found)


def uncaptured(objects: list[dict[str, Any]]) -> int:
    """Workloads that no policy selects for what they get, and those that none selects for what they send; without any
    policy every pod and every workload that makes some, once. (The analyser adds a pod of its own for an Ingress; we do not.)
    """
    if not any(is_policy(o) for o in objects):
        return sum(o.get("kind") == "Pod" or "template" in (o.get("spec") or {}) for o in objects)
    program, known = translate(objects)
    # Pods of one workload that differ in labels are numbered in our inventory.
    return sum(
        len({one.name.partition(" (")[0] for one in known if not one.nets and not any(isolates(tier, way, one, one) for tier in program.tiers)})
        for way in BOTH
    )


def strongly_equal(scheme: Path, one: str, other: str) -> bool:
    mine, theirs = objects_of(scheme, one), objects_of(scheme, other)
    names = {label(o) for o in mine if is_policy(o)}
    return names == {label(o) for o in theirs if is_policy(o)} and all(
        equal(*([o for o in side if not is_policy(o) or label(o) == name] for side in (mine, theirs))) for name in names
    )


def answer(scheme: Path, kind: str, names: list[str]) -> int:
    if kind == "redundancy":
        return sum(redundant(objects_of(scheme, name)) for name in names)
    if kind == "strongEquivalence":
        return sum(not strongly_equal(scheme, a, b) for a, b in itertools.combinations(names, 2))
    if kind == "vacuity":
        return sum(all(p == ANYTHING for p in tables(scheme, [name])[0][0].values()) for name in names)
    if kind == "emptiness":
        return sum(empty(objects_of(scheme, name)) for name in names)
    if kind == "sanity":
        return sum(sanity(objects_of(scheme, name)) for name in names)
    if kind == "semanticDiff":
        return sum(categories(objects_of(scheme, a), objects_of(scheme, b)) for a, b in itertools.combinations(names, 2))
    if kind == "allCaptured":
        return sum(uncaptured(objects_of(scheme, name)) for name in names)
    (first, *others), said = tables(scheme, names)
    if kind == "pairwiseInterferes":
        held = [{(a, b): said[f"{n} {a}", b] for a, b in first} for n in range(len(names))]
        whole = [first, *others]
        return sum(not within(held[a], whole[b]) for a, b in itertools.permutations(range(len(names)), 2))
    if kind == "equivalence":
        return sum(a != b for a, b in itertools.combinations([first, *others], 2))
    if kind == "containment":
        return sum(within(other, first) for other in others)
    if kind == "twoWayContainment":
        relation = {(True, True): 3, (True, False): 2, (False, True): 1, (False, False): 0}
        return sum(relation[within(first, other), within(other, first)] for other in others)
    explicit = [{(a, b): said[f"{n} {a}", b] for a, b in first} for n in range(1, len(names))]
    if kind in {"permits", "interferes"}:
        return sum(not within(one, first) for one in explicit)
    return sum(any(ports & first[pair] for pair, ports in one.items()) for one in explicit)


def test_comparisons_of_sets_of_policies() -> None:
    right: Counter[str] = Counter()
    wrong, refused = list[str](), list[str]()
    for scheme, query, kind, names in queries(KINDS, "expected"):
        try:
            got: int | str = answer(scheme, kind, names)
        except SourceRefused as error:
            # The analyser reads on where the API server would refuse the object.
            refused.append(f"{scheme.name} {query['name']}: {error}")
            continue
        if got == query["expected"]:
            right[kind] += 1
        else:
            wrong.append(f"{scheme.name} {query['name']} ({kind} of {names}): {got}, and should be {query['expected']}")
    total = right.total() + len(wrong)
    print(f"{right.total()} of {total} agree ({right.total() / total:.1%}): {dict(right)}", *wrong, f"{len(refused)} refused as the API server does", *refused, sep="\n")
    assert right.total() > 0
    assert right.total() >= GOAL * total, "\n".join(wrong)
