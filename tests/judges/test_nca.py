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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from policy import nets
from policy.evaluate import isolates, permitted
from policy.importers import run
from policy.ports import ANYTHING, NOTHING, PortMap
from policy.program import BOTH, Program, Subject

NCA = Path(__file__).resolve().parents[3] / "shared" / "judges" / "nca"
MANIFEST = NCA / "manifest.json"
ROOTS = [Path(p) for p in (os.environ.get("RETINUE_NCA"), str(NCA)) if p]
GOAL = 0.95
KINDS = ("equivalence", "containment", "twoWayContainment", "vacuity", "permits", "forbids")
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


def questions() -> Iterator[tuple[Path, dict[str, Any], str, list[str]]]:
    root = source()
    assert root is not None
    for scheme in json.loads(MANIFEST.read_text()):
        if "/k8s_testcases/" in scheme["scheme"] and not scheme["needs_network"]:
            for query in scheme["queries"]:
                ((kind, names), *_) = query["ask"].items()
                if kind in KINDS and query.get("expected") is not None and (root / scheme["scheme"]).exists():
                    yield root / scheme["scheme"], query, kind, names


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
    top = yaml.safe_load(scheme.read_text())
    own, _, wanted = name.partition("/")
    config = next(c for c in top["networkConfigList"] if c["name"] == own)
    objects = [
        one
        for key in ("namespaceList", "podList", "resourceList", "networkPolicyList")
        for part in ((config,) if key in config else (top,))
        for one in read(scheme.parent, part.get(key))
    ]
    if wanted:
        namespace, _, policy = wanted.rpartition("/")
        objects = [
            o for o in objects
            if "NetworkPolicy" not in str(o.get("kind"))
            or (o["metadata"]["name"] == policy and namespace in {"", o["metadata"].get("namespace", "default")})
        ]  # fmt: skip
    found = run("kubernetes", {"all.yaml": yaml.safe_dump_all(objects)})
    return found.policy.program, found.inventory


def tables(scheme: Path, names: list[str]) -> tuple[list[Table], Table]:
    """What each configuration allows, over pairs and address ranges that all of them treat alike. The second table is
    what each says explicitly (an end is selected by a policy of its own), by its number before the source's name.
    """
    found = [load(scheme, name) for name in names]
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


def answer(scheme: Path, kind: str, names: list[str]) -> int:
    if kind == "vacuity":
        return sum(all(p == ANYTHING for p in tables(scheme, [name])[0][0].values()) for name in names)
    (first, *others), said = tables(scheme, names)
    if kind == "equivalence":
        return sum(a != b for a, b in itertools.combinations([first, *others], 2))
    if kind == "containment":
        return sum(within(other, first) for other in others)
    if kind == "twoWayContainment":
        relation = {(True, True): 3, (True, False): 2, (False, True): 1, (False, False): 0}
        return sum(relation[within(first, other), within(other, first)] for other in others)
    explicit = [{(a, b): said[f"{n} {a}", b] for a, b in first} for n in range(1, len(names))]
    if kind == "permits":
        return sum(not within(one, first) for one in explicit)
    return sum(any(ports & first[pair] for pair, ports in one.items()) for one in explicit)


def test_comparisons_of_sets_of_policies() -> None:
    right: Counter[str] = Counter()
    wrong = []
    for scheme, query, kind, names in questions():
        got = answer(scheme, kind, names)
        if got == query["expected"]:
            right[kind] += 1
        else:
            wrong.append(f"{scheme.name} {query['name']} ({kind} of {names}): {got}, and should be {query['expected']}")
    total = right.total() + len(wrong)
    print(f"{right.total()} of {total} agree: {dict(right)}", *wrong, sep="\n")
    assert right.total() > 0
    assert right.total() >= GOAL * total, "\n".join(wrong)
