"""Who a word of a Tailscale policy means: users, groups, tags, hosts, IP sets, autogroups and addresses.

A word resolves to `Ends`: one selector for both address families where the word speaks of identities, or one for each
where it is written as addresses (a device has an address of either family, and a literal names one of them).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from identity.errors import BadInput
from policy import nets
from policy.importers.model import SourceRefused, Untranslated
from policy.importers.tailscale.devices import INTERNET, TAILNET, Tailnet, families
from policy.program import AllOf, AnyOf, Everything, Exists, In, Named, Nets, Nothing, Selector

Side = Literal["src", "dst"]

# Autogroups by the user's role in the tailnet; the device list does not say who has which.
ROLES: Final = frozenset(f"autogroup:{r}" for r in (
    "admin", "owner", "it-admin", "network-admin", "billing-admin", "auditor", "admins", "owners",
))  # fmt: skip
MEMBER: Final = frozenset({"autogroup:member", "autogroup:members"})
SUBNETS: Final = In("route", frozenset({"subnet"}))
OUTSIDE: Final = Exists("via")
V4_NETS: Final = Nets(("0.0.0.0/0",))
V6_NETS: Final = Nets(("::/0",))


def any_of(terms: Sequence[Selector]) -> Selector:
    """The union, flat, without what adds nothing and with plain networks in one term."""
    flat: list[Selector] = []
    cidrs: list[str] = []
    for term in terms:
        for one in term.terms if isinstance(term, AnyOf) else (term,):
            if isinstance(one, Nets) and not one.excluding:
                cidrs += [c for c in one.cidrs if c not in cidrs]
            elif one not in flat and not isinstance(one, Nothing):
                flat.append(one)
    if cidrs:
        flat.append(Nets(tuple(cidrs)))
    return flat[0] if len(flat) == 1 else AnyOf(tuple(flat)) if flat else Nothing()


@dataclass(frozen=True, slots=True)
class Ends:
    """What a word selects: `both` families alike (then v4 and v6 are its restrictions), or v4 and v6 apart."""

    v4: Selector
    v6: Selector
    both: Selector | None = None


def alike(inside: Selector, outside: Selector | None = None) -> Ends:
    """Ends of a word that speaks of identities, and of the address ranges that `outside` selects."""
    if outside is None:
        return Ends(inside, inside, inside)
    return Ends(
        any_of((inside, AllOf((outside, V4_NETS)))),
        any_of((inside, AllOf((outside, V6_NETS)))),
        any_of((inside, outside)),
    )


def join(ends: Sequence[Ends]) -> Ends | None:
    """The union of words of one kind; None when there is none."""
    if not ends:
        return None
    both = None if any(e.both is None for e in ends) else any_of([e.both for e in ends if e.both is not None])
    return Ends(any_of([e.v4 for e in ends]), any_of([e.v6 for e in ends]), both)


class Aliases:
    """The names that a policy defines. `section` maps are the policy's own, already checked to be maps."""

    def __init__(self, policy: Mapping[str, Any], tailnet: Tailnet, untranslated: list[Untranslated]) -> None:
        self.tailnet = tailnet
        self.untranslated = untranslated
        self.groups: Mapping[str, Any] = policy.get("groups") or {}
        self.hosts: Mapping[str, Any] = policy.get("hosts") or {}
        self.ipsets: Mapping[str, Any] = policy.get("ipsets") or {}
        self.tags = frozenset(policy.get("tagowners") or {})
        self.named: dict[str, Selector] = {}  # group selectors, for the written file

    # ---- resolving

    def resolve(self, word: str, side: Side, where: str) -> Ends:
        """Raises SourceRefused for a word that means nothing, or nothing on this side of a rule."""
        if word == "*":
            return self.everything(side)
        kind = word.partition(":")[0] if ":" in word and not word[0].isdigit() else ""
        match kind:
            case "autogroup":
                return self.autogroup(word, side, where)
            case "group":
                return alike(self.group(word, side, where))
            case "tag":
                self.known_tag(word, side, where)
                return alike(Exists(word))
            case "ipset":
                return self.spans(self.ipset(word, where))
            case "svc":
                self.untranslated.append(
                    Untranslated(
                        where, f"{word} is a service; which devices host it is not in the device list"
                    )
                )
                return alike(Nothing())
            case "user" if word.startswith("user:*@"):
                return alike(In("domain", frozenset({word[len("user:*@") :]})))
        if "@" in word:
            return alike(In("user", frozenset({word})))
        if word in self.hosts:
            return self.spans(self.host(word, side))
        return self.spans(self.literal(word, side, where))

    def everything(self, side: Side) -> Ends:
        """``*``: as a source every device and approved subnet, as a destination also what exit nodes carry."""
        if side == "dst":
            return alike(Everything(), OUTSIDE)
        ends = alike(Everything(), SUBNETS)
        extra = [Nets(tuple(t for t in TAILNET if (":" in t) == v6)) for v6 in (False, True)]
        return Ends(
            any_of((ends.v4, extra[0])),
            any_of((ends.v6, extra[1])),
            any_of((ends.both or Nothing(), Nets(TAILNET))),
        )

    def autogroup(self, word: str, side: Side, where: str) -> Ends:
        if word in MEMBER:
            return alike(Exists("user"))
        if word == "autogroup:tagged":
            return alike(Exists("tagged"))
        if word == "autogroup:shared" and side == "src":
            return alike(Exists("shared"))
        if word == "autogroup:danger-all" and side == "src":
            return alike(Everything(), Nets(("0.0.0.0/0", "::/0")))
        if word == "autogroup:internet" and side == "dst":
            v4, v6 = (Nets(tuple(t for t in INTERNET if (":" in t) == v6)) for v6 in (False, True))
            exits = In("route", frozenset({"internet"}))
            return Ends(AllOf((exits, v4)), AllOf((exits, v6)), AllOf((exits, Nets(INTERNET))))
        if word in ROLES:
            self.untranslated.append(
                Untranslated(where, f"{word} goes by the role of a user, which is not in the device list")
            )
            return alike(Nothing())
        if word in {"autogroup:self", "autogroup:internet", "autogroup:shared", "autogroup:danger-all"}:
            raise SourceRefused("autogroup", f'"{word}" not valid on the {side} side of a rule', where=where)
        raise SourceRefused("autogroup", f'unknown autogroup "{word}"', where=where,
                            hint="for example autogroup:member, autogroup:tagged, autogroup:self, autogroup:internet")  # fmt: skip

    def group(self, word: str, side: Side, where: str) -> Selector:
        if word not in self.groups:
            if "@" in word:  # a group of the identity provider
                self.untranslated.append(
                    Untranslated(where, f"the members of {word} are known to the identity provider only")
                )
                return Nothing()
            raise SourceRefused("group", f'{side}="{word}": group not found: "{word}"', where=where)
        if word not in self.named:
            members = self.members(word)
            self.named[word] = In("user", frozenset(members)) if members else Nothing()
        return self.named[word]

    def members(self, group: str, above: tuple[str, ...] = ()) -> list[str]:
        """Users of a group and of the groups in it. Raises SourceRefused."""
        if group in above:
            raise SourceRefused("group", f'the group "{group}" contains itself')
        value = self.groups[group]
        if (
            not group.startswith("group:")
            or not isinstance(value, list)
            or not all(isinstance(m, str) for m in value)
        ):
            raise SourceRefused("group", f'"{group}" must be named group:... and list users')
        out: list[str] = []
        for member in value:
            if member.startswith("group:"):
                if member not in self.groups:
                    raise SourceRefused("group", f'group "{group}": group not found: "{member}"')
                out += self.members(member, (*above, group))
            elif "@" in member:
                out.append(member)
            else:
                raise SourceRefused("group", f'group "{group}": not a user: "{member}"')
        return out

    def known_tag(self, word: str, side: Side, where: str) -> None:
        """Raises SourceRefused for a tag that tagOwners does not define."""
        if word not in self.tags:
            raise SourceRefused(
                "tag",
                f'{side}="{word}": tag not found: "{word}"',
                where=where,
                hint="define it under tagOwners",
            )

    # ---- addresses

    def host(self, word: str, side: Side) -> tuple[nets.Range, ...]:
        value = self.hosts[word]
        if not isinstance(value, str):
            raise SourceRefused("host", f'host "{word}" must be an address or a network')
        return self.literal(value, side, f'hosts "{word}"')

    def literal(self, word: str, side: Side, where: str) -> tuple[nets.Range, ...]:
        if word in {"0.0.0.0/0", "::/0"}:
            raise SourceRefused(
                "everywhere",
                f'{side} "{word}": to allow all IP addresses, use "*" or "autogroup:internet"',
                where=where,
            )
        try:
            return nets.parse_range(word)
        except BadInput:
            raise SourceRefused(
                "alias", f'{side}="{word}": no such user, group, tag, host or address', where=where
            ) from None

    def ipset(self, word: str, where: str, above: tuple[str, ...] = ()) -> tuple[nets.Range, ...]:
        """Addresses of an IP set: entries are added in order, ``remove`` takes away. Raises SourceRefused."""
        entries = self.ipsets.get(word)
        if not isinstance(entries, list) or word in above:
            raise SourceRefused(
                "ipset",
                f'IP set not found: "{word}"'
                if word not in above
                else f'the IP set "{word}" contains itself',
                where=where,
            )
        out: tuple[nets.Range, ...] = ()
        for entry in entries:
            verb, _, name = str(entry).strip().rpartition(" ")
            name = name.removeprefix("host:")
            if name.startswith("ipset:"):
                part = self.ipset(name, where, (*above, word))
            else:
                part = self.host(name, "dst") if name in self.hosts else self.literal(name, "dst", where)
            out = nets.subtract(out, part) if verb == "remove" else nets.merge((*out, *part))
        return out

    @functools.lru_cache(maxsize=1024)  # noqa: B019  the object lives as long as one import
    def spans(self, spans: tuple[nets.Range, ...]) -> Ends:
        """Ends of addresses: the devices that have one of them, and the ranges themselves for what is no device."""
        v4, v6 = (self._family(part) for part in families(spans))
        return Ends(v4, v6)

    def _family(self, part: tuple[nets.Range, ...]) -> Selector:
        if not part:
            return Nothing()
        devices = self.tailnet.at(part)
        ranges = Nets(tuple(nets.show(s) for s in part))
        return any_of((Named(devices) if devices else Nothing(), ranges))
