"""The fields of the policy kinds. The API server drops a field it does not know and warns; so does the importer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

# A map names its fields; a list holds what all items look like; None takes anything.
Shape = Mapping[str, Any] | list[Any] | None

_SELECTOR: Final[dict[str, Any]] = {
    "matchLabels": None,
    "matchExpressions": [{"key": None, "operator": None, "values": None}],
}
_PODS: Final[dict[str, Any]] = {"namespaceSelector": _SELECTOR, "podSelector": _SELECTOR}
_NP_PEER: Final[Shape] = [{**_PODS, "ipBlock": {"cidr": None, "except": None}}]
_NP_PORTS: Final[Shape] = [{"protocol": None, "port": None, "endPort": None}]
_ADMIN_PEER: Final[Shape] = [
    {"namespaces": _SELECTOR, "pods": _PODS, "networks": None, "nodes": _SELECTOR, "domainNames": None}
]
_ADMIN_PORTS: Final[Shape] = [
    {
        "portNumber": {"protocol": None, "port": None},
        "portRange": {"protocol": None, "start": None, "end": None},
        "namedPort": None,
    }
]
_ADMIN: Final[dict[str, Any]] = {
    "subject": {"namespaces": _SELECTOR, "pods": _PODS},
    "ingress": [{"name": None, "action": None, "from": _ADMIN_PEER, "ports": _ADMIN_PORTS}],
    "egress": [{"name": None, "action": None, "to": _ADMIN_PEER, "ports": _ADMIN_PORTS}],
}
SPECS: Final[Mapping[str, Shape]] = {
    "NetworkPolicy": {
        "podSelector": _SELECTOR,
        "policyTypes": None,
        "ingress": [{"from": _NP_PEER, "ports": _NP_PORTS}],
        "egress": [{"to": _NP_PEER, "ports": _NP_PORTS}],
    },
    "AdminNetworkPolicy": {**_ADMIN, "priority": None},
    "BaselineAdminNetworkPolicy": _ADMIN,
}


def unknown_fields(value: Any, shape: Shape, path: str) -> Iterator[str]:
    """Paths of the fields that the shape does not know."""
    if isinstance(shape, list) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, shape[0], f"{path}[{index}]")
    elif isinstance(shape, Mapping) and isinstance(value, dict):
        for key, item in value.items():
            if key not in shape:
                yield f"{path}.{key}"
            else:
                yield from unknown_fields(item, shape[key], f"{path}.{key}")
