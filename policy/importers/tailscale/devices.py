"""Tailscale devices (the API's device list) as subjects: who they are, their addresses, and what lies behind them.

Labels of a device: ``user`` and ``domain`` on an untagged one; ``tagged`` and one label per tag (``tag:web: yes``) on a
tagged one. Approved routes become outside subjects of their own, ``NAME (subnets)`` and ``NAME (internet)``, with the
labels ``via`` (the gateway), ``route: subnet|internet`` and the gateway's tags as ``via:tag:...``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from identity.errors import BadInput
from policy import nets
from policy.importers.model import SourceRefused, Untranslated
from policy.program import Subject

# What an exit node carries: the public internet (the vendor's list, as autogroup:internet compiles to it).
INTERNET: Final = (
    "0.0.0.0-9.255.255.255", "11.0.0.0-100.63.255.255", "100.128.0.0-169.253.255.255", "169.255.0.0-172.15.255.255",
    "172.32.0.0-192.167.255.255", "192.169.0.0-255.255.255.255", "2000::/3",
)  # fmt: skip
# Addresses a tailnet gives out: CGNAT without the block that ChromeOS uses, and the vendor's ULA.
TAILNET: Final = ("100.64.0.0-100.115.91.255", "100.115.94.0-100.127.255.255", "fd7a:115c:a1e0::/48")
EXIT: Final = frozenset({"0.0.0.0/0", "::/0"})
YES: Final = "yes"


@dataclass(frozen=True, slots=True)
class Device:
    """One device: its subject, the positions of its addresses, and the subjects behind it."""

    subject: Subject
    addresses: tuple[int, ...]
    behind: tuple[Subject, ...]


@dataclass(frozen=True, slots=True)
class Tailnet:
    devices: tuple[Device, ...]
    ids: dict[str, str]

    @property
    def users(self) -> tuple[str, ...]:
        """Every user that owns a device, sorted."""
        return tuple(sorted({d.subject.labels["user"] for d in self.devices if "user" in d.subject.labels}))

    def at(self, spans: tuple[nets.Range, ...]) -> frozenset[str]:
        """Names of the devices with an address in `spans`."""
        return frozenset(
            d.subject.name for d in self.devices if any(a <= x <= b for x in d.addresses for a, b in spans)
        )

    def inventory(self) -> tuple[Subject, ...]:
        return tuple(s for d in self.devices for s in (d.subject, *d.behind))


def load_devices(file: str, text: str, untranslated: list[Untranslated]) -> Tailnet:
    """Read devices.json. Raises SourceRefused."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceRefused("devices", f"not valid JSON: {error}", where=file) from None
    rows = document.get("devices") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise SourceRefused("devices", "a map with a list under devices is wanted", where=file)
    out: list[Device] = []
    ids: dict[str, str] = {}
    taken: set[str] = set()
    for index, row in enumerate(rows):
        where = f"{file}: devices[{index}]"
        if not isinstance(row, dict) or not isinstance(row.get("hostname"), str) or not row["hostname"]:
            raise SourceRefused("devices", "a device needs a hostname", where=where)
        if row.get("authorized") is False:
            untranslated.append(
                Untranslated(where, f"{row['hostname']} is not authorized: it has no access at all")
            )
            continue
        name = _name(row, index, taken)
        taken.add(name)
        if name != row["hostname"]:
            ids[name] = row["hostname"]
        device = _device(row, name, where)
        ids.update({s.name: ids.get(name, name) for s in device.behind})
        out.append(device)
    return Tailnet(tuple(out), ids)


def _name(row: dict[str, Any], index: int, taken: set[str]) -> str:
    """The hostname, or where two devices share it the unique machine name."""
    hostname = str(row["hostname"])
    candidates = (
        hostname,
        str(row.get("name") or "").partition(".")[0],
        f"{hostname}-{row.get('id', index)}",
    )
    return next((c for c in candidates if c and c not in taken), f"{hostname}-{index}")


def _strings(row: dict[str, Any], key: str, where: str) -> list[str]:
    values = row.get(key)
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise SourceRefused("devices", f"{key} must be a list of strings", where=where)
    return list(values)


def _device(row: dict[str, Any], name: str, where: str) -> Device:
    tags = _strings(row, "tags", where)
    labels: dict[str, str] = dict.fromkeys(tags, YES)
    user = row.get("user")
    if tags:
        labels["tagged"] = YES
    elif isinstance(user, str) and user:
        labels.update(user_labels(user))
    if row.get("isExternal") is True:
        labels["shared"] = YES
    try:
        addresses = tuple(nets.address(a) for a in _strings(row, "addresses", where))
        routes = _strings(row, "enabledRoutes", where)
        for route in routes:
            nets.parse_range(route)
    except BadInput as error:
        raise SourceRefused("devices", error.message, where=where) from None
    via = {f"via:{t}": YES for t in tags}
    subnets = tuple(r for r in routes if r not in EXIT)
    internet = tuple(r for r in INTERNET if ("::/0" if ":" in r else "0.0.0.0/0") in routes)
    behind = tuple(
        Subject(
            f"{name} ({kind}s)" if kind == "subnet" else f"{name} ({kind})",
            {"via": name, "route": kind, **via},
            nets=part,
        )
        for kind, part in (("subnet", subnets), ("internet", internet))
        if part
    )
    return Device(Subject(name, labels), addresses, behind)


def user_labels(user: str) -> dict[str, str]:
    """Labels of a device that belongs to a user."""
    return {"user": user, "domain": user.rpartition("@")[2]}


def families(spans: Iterable[nets.Range]) -> tuple[tuple[nets.Range, ...], tuple[nets.Range, ...]]:
    """The IPv4 and the IPv6 part."""
    merged = nets.merge(spans)
    return tuple(s for s in merged if s[0] < nets.V6), tuple(s for s in merged if s[0] >= nets.V6)
