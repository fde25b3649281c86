"""The bill of materials against what is really installed and locked."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "tools" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sbom"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def document(sbom: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = sbom.bill()
    return found


def installed_closure(sbom: ModuleType, name: str, seen: set[str]) -> set[str]:
    """What an installed distribution needs here, by the metadata of what is installed."""
    for text in requires(name) or []:
        need, _, marker = text.partition(";")
        if "extra ==" in marker or "extra==" in marker:
            continue
        other = sbom.normal(re.split(r"[\[=<>~!( ]", need.strip())[0])
        try:
            distribution(other)
        except PackageNotFoundError:
            continue  # another platform's
        if other not in seen:
            seen.add(other)
            installed_closure(sbom, other, seen)
    return seen


def test_the_products_python_packages_are_those_installed_for_it(sbom: ModuleType, document: dict[str, Any]) -> None:
    required = {c["name"] for c in document["components"] if c["purl"].startswith("pkg:pypi/") and c["scope"] == "required"}
    assert installed_closure(sbom, "retinue", set()) <= required


def test_versions_are_those_installed(document: dict[str, Any]) -> None:
    for component in document["components"]:
        if component["purl"].startswith("pkg:pypi/"):
            assert distribution(component["name"]).version == component["version"]


def test_every_package_is_pinned_by_hash(document: dict[str, Any]) -> None:
    for component in document["components"]:
        assert component["hashes"], component["purl"]
        assert all(re.fullmatch(r"[0-9a-f]{64}", h["content"]) for h in component["hashes"])


def test_the_crates_are_those_cargo_links(document: dict[str, Any]) -> None:
    out = subprocess.run(
        ["cargo", "tree", "--locked", "--offline", "-e", "normal,build", "--prefix", "none", "--target", "all", "-f", "{p}", "--features", "python",
         "--manifest-path", str(ROOT / "mesh" / "engine" / "Cargo.toml")], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    linked = {tuple(line.split()[:2]) for line in out.splitlines() if line and "/mesh/engine" not in line}
    required = {(c["name"], f"v{c['version']}") for c in document["components"] if c["purl"].startswith("pkg:cargo/") and c["scope"] == "required"}
    assert linked == required


def test_references_lead_somewhere_and_are_unique(document: dict[str, Any]) -> None:
    refs = [c["bom-ref"] for c in document["components"]] + [document["metadata"]["component"]["bom-ref"]]
    assert len(refs) == len(set(refs))
    assert {d["ref"] for d in document["dependencies"]} == set(refs)
    assert {to for d in document["dependencies"] for to in d["dependsOn"]} <= set(refs)


def test_equal_locks_give_equal_bytes(sbom: ModuleType, document: dict[str, Any]) -> None:
    assert json.dumps(sbom.bill(), sort_keys=True) == json.dumps(document, sort_keys=True)
