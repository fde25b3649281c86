"""Write the bill of materials: every package of both lock files and what is linked statically, with version, hashes and what needs it.

Usage: python tools/sbom.py [OUT]        default out/sbom.json; CycloneDX 1.6 (ECMA-424), JSON

Nothing is asked of a network and nothing of the clock: equal locks give equal bytes. `scope` is "required" for what
the product runs with and "excluded" for what only building and testing need.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tomllib
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CRATE = ROOT / "mesh" / "engine"
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_VIA = re.compile(r"#\s+(?:via\s+)?([A-Za-z0-9][A-Za-z0-9._-]*)(?:\s.*)?$")


@dataclass
class Package:
    """One pinned package. `needs` names others of the same lock."""

    kind: str  # pypi, cargo or deb/debian
    name: str
    version: str
    hashes: list[str] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)

    @property
    def purl(self) -> str:
        return f"pkg:{self.kind}/{self.name}@{self.version}"


def normal(name: str) -> str:
    """A Python project's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def python_packages() -> tuple[dict[str, Package], set[str]]:
    """The packages of requirements.lock by name, and the names the product itself asks for."""
    found: dict[str, Package] = {}
    current: Package | None = None
    parents: dict[str, set[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if pin := _PIN.match(line):
            current = found[normal(pin[1])] = Package("pypi", normal(pin[1]), pin[2])
        elif current is not None and (digest := _HASH.search(line)):
            current.hashes.append(digest[1])
        elif current is not None and (via := _VIA.search(line)) and via[1] not in {"via", "retinue"}:
            parents.setdefault(current.name, set()).add(normal(via[1]))
    for child, those in parents.items():
        for parent in those & found.keys():
            found[parent].needs.add(child)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {normal(re.split(r"[\[=<>~! ]", d)[0]) for d in project["dependencies"]}
    return found, asked


def rust_packages() -> tuple[dict[str, Package], set[str]]:
    """The crates of Cargo.lock by name and version, and those the engine itself asks for."""
    lock = tomllib.loads((CRATE / "Cargo.lock").read_text())["package"]
    versions: dict[str, list[str]] = {}
    for entry in lock:
        versions.setdefault(entry["name"], []).append(entry["version"])

    def key(text: str) -> str:
        name, _, version = text.partition(" ")
        return f"{name} {version.split(' ')[0] or versions[name][0]}"

    found: dict[str, Package] = {}
    direct: set[str] = set()
    manifest = tomllib.loads((CRATE / "Cargo.toml").read_text())
    tables = [manifest.get("dependencies", {}), manifest.get("build-dependencies", {})]
    tables += [t.get("dependencies", {}) for t in manifest.get("target", {}).values()]
    asked = {spec.get("package", name) if isinstance(spec, dict) else name for table in tables for name, spec in table.items()}
    for entry in lock:
        needs = {key(d) for d in entry.get("dependencies", [])}
        if "checksum" not in entry:  # our own crate
            direct |= {n for n in needs if n.split(" ")[0] in asked}
            continue
        package = Package("cargo", entry["name"], entry["version"], [entry["checksum"]], needs)
        found[f"{package.name} {package.version}"] = package
    return found, direct


def linked_packages() -> tuple[dict[str, Package], set[str]]:
    """What the engine's build.rs links statically from this machine: nothing where that is not installed."""
    archive = next(iter(sorted(Path("/usr/lib").glob("*/libIPSec_MB.a"))), None)
    if archive is None:
        return {}, set()
    asked = ["dpkg-query", "-W", "-f", "${Version}", "libipsec-mb-dev"]
    try:
        version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        version = "unknown"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"libipsec-mb-dev": Package("deb/debian", "libipsec-mb-dev", version, [digest])}, {"libipsec-mb-dev"}


def closure(packages: dict[str, Package], roots: set[str]) -> set[str]:
    """Everything the roots need."""
    seen: set[str] = set()
    waiting = [r for r in roots if r in packages]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [n for n in packages[name].needs if n in packages]
    return seen


def bill() -> dict[str, Any]:
    """The document."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    me = f"pkg:pypi/{project['name']}@{project['version']}"
    components: list[dict[str, Any]] = []
    dependencies: list[dict[str, Any]] = []
    first: list[str] = []
    for packages, asked in (python_packages(), rust_packages(), linked_packages()):
        required = closure(packages, asked)
        first += [packages[name].purl for name in asked & packages.keys()]
        for name in sorted(packages):
            one = packages[name]
            components.append({
                "type": "library", "bom-ref": one.purl, "name": one.name, "version": one.version, "purl": one.purl,
                "scope": "required" if name in required else "excluded",
                "hashes": [{"alg": "SHA-256", "content": h} for h in sorted(one.hashes)],
            })  # fmt: skip
            dependencies.append({"ref": one.purl, "dependsOn": sorted(packages[n].purl for n in one.needs if n in packages)})
    text = json.dumps(components, sort_keys=True)
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, text)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application", "bom-ref": me, "name": project["name"], "version": project["version"], "purl": me,
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": components,
        "dependencies": [{"ref": me, "dependsOn": sorted(first)}, *dependencies],
    }  # fmt: skip


def main() -> int:
    """Write it and say what is in it."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "sbom.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document = bill()
    out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    required = sum(c["scope"] == "required" for c in document["components"])
    print(f"{out}: {len(document['components'])} packages, {required} of them in the product")
    return 0


if __name__ == "__main__":
    sys.exit(main())
