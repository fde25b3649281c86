"""Virtual machines of an NSX export as subjects: display names, tags as labels, addresses from interfaces and segments.

Labels: ``tag:VALUE`` and ``tag:SCOPE|VALUE`` for each tag, ``segment:PATH`` for each segment the machine is attached to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from identity.errors import BadInput
from policy import nets
from policy.importers.model import SourceRefused
from policy.program import Subject

YES: Final = "yes"
EVERYWHERE: Final = (nets.V4_ALL, nets.V6_ALL)


@dataclass(frozen=True, slots=True)
class Machine:
    """`spans` are its addresses; the subnets of its segments when it has none of its own."""

    id: str
    subject: Subject
    name: str
    spans: tuple[nets.Range, ...]
    facts: Mapping[str, str]  # what conditions may ask about: Name, OSName, ComputerName


class Estate:
    """The machines, and the segments they are on. Raises SourceRefused for an export that does not hold together."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.segments = {str(s.get("path") or s.get("display_name")): s for s in rows(config, "segments")}
        self.subnets = nets.merge(
            r
            for path, s in self.segments.items()
            for n in rows(s, "subnets")
            for r in spans(n.get("network"), f"segment {path}")
        )
        ports = {
            str(part(p, "attachment").get("id")): path
            for path, s in self.segments.items()
            for p in rows(s, "segment_ports")
        }
        interfaces: dict[str, list[Mapping[str, Any]]] = {}
        for one in rows(config, "virtual_network_interface"):
            interfaces.setdefault(str(one.get("owner_vm_id")), []).append(one)
        self.machines: dict[str, Machine] = {}
        self.ids: dict[str, str] = {}
        taken: set[str] = set()
        for vm in rows(config, "virtual_machines"):
            identity, name = str(vm.get("external_id") or vm.get("display_name")), vm.get("display_name")
            if not isinstance(name, str) or not name or identity in self.machines:
                raise SourceRefused(
                    "machine",
                    f'a virtual machine needs a display_name and an external_id of its own, not "{name}", "{identity}"',
                )
            own = f"{name} ({identity})" if name in taken else name
            if own != name:
                self.ids[own] = name
            taken.add(own)
            cards = interfaces.get(identity, [])
            on = list(
                dict.fromkeys(ports[p] for c in cards if (p := str(c.get("lport_attachment_id"))) in ports)
            )
            addresses = nets.merge(
                r
                for c in cards
                for i in rows(c, "ip_address_info")
                for a in words(i, "ip_addresses")
                for r in spans(a, f"machine {name}")
            )
            if not addresses:
                addresses = nets.merge(
                    r
                    for path in on
                    for n in rows(self.segments[path], "subnets")
                    for r in spans(n.get("network"), f"segment {path}")
                )
            labels = {f"segment:{path}": YES for path in on}
            for tag in rows(vm, "tags"):
                labels[f"tag:{tag.get('tag')}"] = YES
                if tag.get("scope"):
                    labels[f"tag:{tag['scope']}|{tag.get('tag')}"] = YES
            facts = {"Name": name, "OSName": str(vm.get("guest_info", {}).get("os_name", "")) if isinstance(vm.get("guest_info"), dict) else "",
                     "ComputerName": str(vm.get("guest_info", {}).get("computer_name", "")) if isinstance(vm.get("guest_info"), dict) else ""}  # fmt: skip
            self.machines[identity] = Machine(identity, Subject(own, labels), name, addresses, facts)

    def __iter__(self) -> Iterator[Machine]:
        return iter(self.machines.values())

    def inside(self, parts: tuple[nets.Range, ...]) -> list[Machine]:
        """Machines whose IPv4 addresses, or whose IPv6 addresses, all lie in `parts`."""
        return [m for m in self if any(f and nets.covers(parts, f) for f in families(m.spans))]

    def inventory(self) -> tuple[Subject, ...]:
        """The machines, and the world outside the segments."""
        outside = nets.subtract(EVERYWHERE, self.subnets)
        return (*(m.subject for m in self), Subject("external", nets=tuple(nets.show(s) for s in outside)))


def families(parts: tuple[nets.Range, ...]) -> tuple[tuple[nets.Range, ...], tuple[nets.Range, ...]]:
    """The IPv4 and the IPv6 part."""
    return tuple(p for p in parts if p[0] < nets.V6), tuple(p for p in parts if p[0] >= nets.V6)


def part(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A map under a key; missing or null is empty. Raises SourceRefused."""
    found = value.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SourceRefused("type", f'"{key}" must be a map')
    return found


def rows(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A list of maps under a key; missing or null is empty. Raises SourceRefused."""
    found = value.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise SourceRefused("type", f'"{key}" must be a list of maps')
    return found


def words(value: Mapping[str, Any], key: str) -> Sequence[str]:
    """A list of strings under a key; missing or null is empty. Raises SourceRefused."""
    found = value.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(w, str) for w in found):
        raise SourceRefused("type", f'"{key}" must be a list of strings')
    return found


def spans(text: Any, where: str) -> tuple[nets.Range, ...]:
    """The addresses of a literal. Raises SourceRefused."""
    try:
        return nets.parse_range(str(text))
    except BadInput:
        raise SourceRefused("address", f'"{text}" is no address, network or range', where=where) from None
