"""Access rules and grants of a Tailscale policy, as allow rules of one tier under default deny."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from policy.importers.model import Source, SourceRefused, Untranslated
from policy.importers.tailscale.aliases import (
    MEMBER,
    OUTSIDE,
    ROLES,
    Aliases,
    Ends,
    alike,
    join,
)
from policy.importers.tailscale.ports import (
    USUAL,
    capability,
    port_bits,
    port_map,
    protocol,
    split_destination,
)
from policy.nets import nets_in
from policy.ports import ALL_PORTS, PortMap, union
from policy.program import Action, AllOf, AnyOf, Exists, In, Nothing, Rule, Selector, Where

SELF: Final = "autogroup:self"
# Application capabilities of the vendor's own domain that a grant may give.
VENDOR_CAPABILITIES: Final = frozenset(f"tailscale.com/cap/{c}" for c in (
    "drive", "relay", "kubernetes", "webui", "tsidp", "golink", "secrets", "drive-sharer",
))  # fmt: skip
_CAPABILITY: Final = re.compile(r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+/\S+")


@dataclass(frozen=True, slots=True)
class Target:
    """One destination word and the ports it is given."""

    word: str
    ports: PortMap
    where: str


class Rules:
    """Turns the entries of `acls` and `grants` into rules; ids are their places in the file."""

    def __init__(
        self, aliases: Aliases, source: Source, postures: Mapping[str, Any], untranslated: list[Untranslated]
    ) -> None:
        self.aliases = aliases
        self.source = source
        self.postures = postures
        self.untranslated = untranslated

    # ---- entries

    def everything(self, where: Where | None) -> Iterator[Rule]:
        """What a policy without `acls` and `grants` means: everything is allowed."""
        targets = [Target("*", port_map(USUAL, ALL_PORTS, "*", ""), "")]
        return self.rules("default", ["*"], targets, where, "neither acls nor grants: everything is allowed")

    def acl(self, index: int, entry: Mapping[str, Any]) -> Iterator[Rule]:
        """One access rule. Raises SourceRefused."""
        name = f"acls[{index}]"
        fields = self.fields(name, entry, {"action", "src", "dst", "proto", "srcposture", "users", "ports"})
        if fields.get("action") != "accept":
            raise SourceRefused(
                "action",
                f'action "{fields.get("action")}" is not supported',
                where=self.at(name, entry),
                hint="the only action is accept",
            )
        protocols: tuple[int, ...] = USUAL
        if fields.get("proto") not in (None, ""):
            protocols = (protocol(str(fields["proto"]), self.at(name, entry)),)
        targets = []
        for i, text in enumerate(self.words(name, fields, "dst", "ports")):
            where = self.at(f"{name}.dst[{i}]", entry)
            word, ports = split_destination(text, where)
            try:
                bits = port_bits(ports, where)
            except SourceRefused as error:
                raise SourceRefused(
                    "port", f'dst="{text}": {error.message.removeprefix(where + ": ")}', where=where
                ) from None
            targets.append(Target(word, port_map(protocols, bits, text, where), where))
        yield from self.checked(
            name, self.words(name, fields, "src", "users"), targets, entry, fields, wildcard_self=True
        )

    def grant(self, index: int, entry: Mapping[str, Any]) -> Iterator[Rule]:
        """One grant: network access from `ip`; `app` is checked and gives no network access. Raises SourceRefused."""
        name = f"grants[{index}]"
        fields = self.fields(name, entry, {"src", "dst", "ip", "app", "via", "srcposture"})
        where = self.at(name, entry)
        ip, app = self.words(name, fields, "ip"), fields.get("app")
        if not ip and not app:
            raise SourceRefused("grant", "ip and app can not both be empty", where=where)
        destinations = self.words(name, fields, "dst")
        self.application(app, destinations, where)
        ports = union(capability(text, self.at(f"{name}.ip[{i}]", entry)) for i, text in enumerate(ip))
        targets = [
            Target(word, ports, self.at(f"{name}.dst[{i}]", entry)) for i, word in enumerate(destinations)
        ]
        via = []
        for tag in self.words(name, fields, "via"):
            if not tag.startswith("tag:"):
                raise SourceRefused("via", f'via can only be a tag, not "{tag}"', where=where)
            if tag not in self.aliases.tags:
                raise SourceRefused("tag", f'tag "{tag}" not found', where=where)
            via.append(tag)
        yield from self.checked(name, self.words(name, fields, "src"), targets, entry, fields, via=via)

    def fields(self, name: str, entry: Any, known: set[str]) -> dict[str, Any]:
        """The entry with lower-case keys; keys are not case-sensitive, and unknown ones are refused."""
        if not isinstance(entry, dict):
            raise SourceRefused("type", f"{name} must be a map")
        out = {}
        for key, value in entry.items():
            if key.lower() not in known:
                raise SourceRefused("field", f'unknown field "{key}" in {name}', where=self.at(name, entry))
            out[key.lower()] = value
        return out

    def words(self, name: str, fields: Mapping[str, Any], *keys: str) -> list[str]:
        """The list of strings under one of the keys (the older ones come last)."""
        value: Any = next((fields[k] for k in keys if fields.get(k) is not None), [])
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise SourceRefused("type", f"{name}.{keys[0]} must be a list of strings")
        return value

    def at(self, name: str, entry: Any) -> str:
        where = self.source.where(entry)
        return f"{where} {name}" if where else name

    def application(self, app: Any, destinations: Sequence[str], where: str) -> None:
        """Check application capabilities as the vendor does. Raises SourceRefused."""
        if app is None:
            return
        if not isinstance(app, dict) or not all(isinstance(v, list) for v in app.values()):
            raise SourceRefused("app", "app must map capability names to lists", where=where)
        for name in app:
            if not _CAPABILITY.fullmatch(name):
                raise SourceRefused(
                    "app", f'"{name}": capability name must have the form {{domain}}/{{path}}', where=where
                )
            if name.startswith("tailscale.com/") and name not in VENDOR_CAPABILITIES:
                raise SourceRefused(
                    "app", f'"{name}": capability name must not be in the tailscale.com domain', where=where
                )
        if app and "autogroup:internet" in destinations:
            raise SourceRefused("app", "cannot use app grants with autogroup:internet", where=where)

    # ---- sources and destinations

    def checked(
        self, name: str, sources: Sequence[str], targets: Sequence[Target], entry: Any, fields: Mapping[str, Any],
        *, via: Sequence[str] = (), wildcard_self: bool = False,
    ) -> Iterator[Rule]:  # fmt: skip
        """The entry's rules, unless it depends on device posture."""
        where = self.at(name, entry)
        if any(t.word == SELF for t in targets):
            for word in sources:
                people = (
                    "@" in word
                    or word.startswith("group:")
                    or word in MEMBER | ROLES
                    or (word == "*" and wildcard_self)
                )
                if not people:
                    raise SourceRefused(
                        "self",
                        f'autogroup:self can only be used with users, groups, or supported autogroups, not "{word}"',
                        where=where,
                    )
        rules = list(self.rules(name, sources, targets, self.source.where(entry), via=via))
        postures = self.words(name, fields, "srcposture")
        for posture in postures:
            if posture.partition(" ")[0] not in self.postures:
                raise SourceRefused("posture", f'posture not found: "{posture}"', where=where)
        if postures and rules:
            self.untranslated.append(Untranslated(
                f"{name}.srcPosture", "device posture is not in the device list; the rule is left out, access it gives is not carried over"
            ))  # fmt: skip
            return
        yield from rules

    def rules(
        self, name: str, sources: Sequence[str], targets: Sequence[Target], where: Where | None, why: str = "",
        *, via: Sequence[str] = (),
    ) -> Iterator[Rule]:  # fmt: skip
        at = f"{where} {name}" if where else name
        src = [self.aliases.resolve(word, "src", f"{at}.src") for word in sources]
        number = 0
        for ports, group in _by_ports(targets):
            dst = [self.destination(t.word, via, t.where) for t in group if t.word != SELF]
            pairs = [
                *_pairs(src, dst),
                *(self.own(sources) if any(t.word == SELF for t in group) else ()),
            ]
            for one, other in pairs:
                if ports and not isinstance(one, Nothing) and not isinstance(other, Nothing):
                    number += 1
                    yield Rule(f"{name}.{number}", Action.ALLOW, one, other, ports, where, why)

    def destination(self, word: str, via: Sequence[str], where: str) -> Ends:
        ends = self.aliases.resolve(word, "dst", where)
        if not via:
            return ends
        gateways = AnyOf(tuple(Exists(f"via:{t}") for t in via)) if len(via) > 1 else Exists(f"via:{via[0]}")
        if word == "*":
            return alike(Nothing(), gateways)
        parts = [
            AllOf((OUTSIDE, gateways, s)) if _speaks_of_nets(s) else Nothing() for s in (ends.v4, ends.v6)
        ]
        return Ends(parts[0], parts[1])

    def own(self, sources: Sequence[str]) -> Iterator[tuple[Selector, Selector]]:
        """autogroup:self: for each user among the sources, that user's devices to themselves."""
        users: dict[str, None] = {}
        for word in sources:
            if word.startswith("user:*@"):
                users.update(dict.fromkeys(u for u in self.aliases.tailnet.users if u.endswith(word[6:])))
            elif word.startswith("group:") and word in self.aliases.groups:
                users.update(dict.fromkeys(self.aliases.members(word)))
            elif "@" in word:
                users[word] = None
            elif word == "*" or word in MEMBER:
                users.update(dict.fromkeys(self.aliases.tailnet.users))
        for user in users:
            mine = In("user", frozenset({user}))
            yield mine, mine


def _speaks_of_nets(selector: Selector) -> bool:
    return any(True for _ in nets_in(selector))


def _by_ports(targets: Sequence[Target]) -> Iterator[tuple[PortMap, list[Target]]]:
    groups: dict[PortMap, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.ports, []).append(target)
    yield from groups.items()


def _pairs(src: Sequence[Ends], dst: Sequence[Ends]) -> Iterator[tuple[Selector, Selector]]:
    """Source and destination selectors, so that a pair of addresses is always of one family."""
    src_alike, src_apart = (join([e for e in src if (e.both is not None) is b]) for b in (True, False))
    dst_alike, dst_apart = (join([e for e in dst if (e.both is not None) is b]) for b in (True, False))
    if src_alike and dst_alike and src_alike.both and dst_alike.both:
        yield src_alike.both, dst_alike.both
    if dst_apart:
        every = join([e for e in (src_alike, src_apart) if e])
        if every:
            yield every.v4, dst_apart.v4
            yield every.v6, dst_apart.v6
    if src_apart and dst_alike:
        yield src_apart.v4, dst_alike.v4
        yield src_apart.v6, dst_alike.v6
