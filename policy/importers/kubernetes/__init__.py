"""Kubernetes manifests: workloads, NetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy."""

from __future__ import annotations

from typing import Final

from policy.imported import ImportedPolicy
from policy.importers.kubernetes.admin import AdminPolicies
from policy.importers.kubernetes.manifests import Object, read_objects
from policy.importers.kubernetes.netpol import network_policies
from policy.importers.kubernetes.schema import SPECS, unknown_fields
from policy.importers.kubernetes.workloads import EXTERNAL, read_cluster
from policy.importers.model import Files, Imported, Source, SourceRefused, Untranslated
from policy.program import Action, Program

NETWORK: Final = "networking.k8s.io"
ADMIN: Final = "policy.networking.k8s.io"


def import_kubernetes(files: Files) -> Imported:
    """Every object of the files. Raises SourceRefused for what the API server would not accept."""
    source = Source()
    notes: list[str] = []
    untranslated: list[Untranslated] = []
    objects = read_objects(files, source, notes)
    if not objects:
        raise SourceRefused("empty", "there is no Kubernetes object in these files")
    for one in objects:
        if one.group in {NETWORK, ADMIN} and one.kind in SPECS:
            for path in unknown_fields(one.body.get("spec"), SPECS[one.kind], "spec"):
                notes.append(f"{one}: unknown field {path} is dropped, as the API server does")
    cluster = read_cluster(objects, notes, untranslated)
    admin = AdminPolicies(source, cluster, untranslated)

    def of(group: str, kind: str) -> list[Object]:
        return [o for o in objects if o.kind == kind and o.group == group]

    tiers = (
        admin.admin(of(ADMIN, "AdminNetworkPolicy")),
        network_policies(of(NETWORK, "NetworkPolicy"), source, cluster),
        admin.baseline(of(ADMIN, "BaselineAdminNetworkPolicy")),
    )
    used = tuple(t for t in tiers if t.rules or t.isolates)
    program = Program(used, Action.ALLOW)
    entries = sum(
        len((o.body.get("spec") or {}).get(k) or ())
        for o in objects
        if o.group in {NETWORK, ADMIN} and o.kind in SPECS
        for k in ("ingress", "egress")
    )
    return Imported(
        ImportedPolicy(program, "kubernetes"),
        (*cluster.subjects, EXTERNAL),
        untranslated,
        ids=cluster.ids,
        rules=entries,
        notes=notes,
    )
