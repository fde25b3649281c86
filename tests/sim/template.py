"""The control plane that every simulation begins with: hosts enrolled, workloads placed, a policy in force."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from ca.plane import Plane
from identity.bundle import TrustBundle, open_bundle
from identity.names import TrustDomain
from identity.wire.admin import WorkloadAdd
from tests.sim.clock import EPOCH
from tests.sim.joining import join
from tests.sim.ledger import Ledger

DOMAIN: Final = TrustDomain("sim.example")
HOSTS: Final = ("a", "b", "c")
ROLES: Final = ("web", "api", "db")

_template: Path | None = None
enrolled: dict[str, tuple[TrustBundle, str]] = {}  # what each host took away from its enrolment
signed = Ledger()  # what the template's plane signed


def watch(plane: Plane, ledger: Ledger) -> None:
    """Every record that this plane signs goes through the ledger."""
    sign = plane.authority.sign_record

    def watched(payload: Any) -> str:
        envelope = sign(payload)
        ledger.signed(payload)
        return envelope

    plane.authority.sign_record = watched  # type: ignore[method-assign]  # this one instance is watched


def template() -> Path:
    """A control plane with the hosts enrolled and some workloads placed, made once a process."""
    global _template
    if _template is None:
        root = Path(tempfile.mkdtemp(prefix="retinue-sim-", dir="/dev/shm"))
        Plane.create(root / "ca", DOMAIN, EPOCH)
        plane = Plane.open(root / "ca", lambda: EPOCH)
        watch(plane, signed)
        for host in HOSTS:
            reply = join(plane, host)
            trust = open_bundle(reply.bundle, plane.authority.root_fingerprint, DOMAIN, EPOCH)
            row = next(r for r in plane.registry.all() if r.name == host)
            enrolled[host] = trust, row.tunnel_key
        for n, role in enumerate(ROLES):
            fence = "strict" if role == "db" else "available"
            plane.placements.add(WorkloadAdd(name=role, host=HOSTS[n % len(HOSTS)], labels={"role": role}, fence=fence), plane.now, "t")
        files = Ledger.policy([("web", "api"), ("api", "db")])
        plane.policies.apply(files, "t", plane.now, "t")
        plane.publish()
        plane.close()
        _template = root
    return _template


def forget_template() -> None:
    """Remove the files of the template."""
    global _template
    if _template is not None:
        shutil.rmtree(_template, ignore_errors=True)
        _template = None
