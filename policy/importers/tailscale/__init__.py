"""Tailscale policy files (HuJSON) with a device list: access rules, grants, subnet routes, exit nodes, in-file tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from identity.errors import BadInput
from policy import nets
from policy.imported import ImportedPolicy
from policy.importers.model import Files, Imported, Source, SourceRefused, Untranslated
from policy.importers.tailscale.aliases import Aliases
from policy.importers.tailscale.devices import load_devices
from policy.importers.tailscale.hujson import parse_hujson
from policy.importers.tailscale.rules import Rules
from policy.importers.tailscale.tests import failures, run_tests
from policy.program import Program, Tier

POLICY: Final = "policy.hujson"
DEVICES: Final = "devices.json"
MAPS: Final = frozenset({"groups", "hosts", "tagowners", "autoapprovers", "postures", "ipsets"})
LISTS: Final = frozenset({"acls", "grants", "tests", "ssh", "sshtests", "nodeattrs"})
SETTINGS: Final = frozenset({
    "derpmap", "disableipv4", "randomizeclientport", "onecgnatroute", "defaultsrcposture", "magicdns", "extradnsrecords",
})  # fmt: skip
_POOLS: Final = nets.ranges_of(("100.64.0.0/10",))  # the vendor's page on IP pools
_RESERVED: Final = nets.ranges_of(("100.100.0.0/24", "100.100.100.0/24", "100.115.92.0/23"))


def import_tailscale(files: Files) -> Imported:
    """`files` has policy.hujson and devices.json. Raises SourceRefused."""
    for name in (POLICY, DEVICES):
        if name not in files:
            raise SourceRefused(
                "missing", f"there is no {name}", hint=f"a folder with {POLICY} and {DEVICES} is wanted"
            )
    source = Source()
    root = parse_hujson(POLICY, files[POLICY], source)
    policy = _sections(root)
    untranslated: list[Untranslated] = []
    tailnet = load_devices(DEVICES, files[DEVICES], untranslated)
    aliases = Aliases(policy, tailnet, untranslated)
    _references(policy, aliases)
    rules = Rules(aliases, source, policy.get("postures") or {}, untranslated)
    acls, grants = policy.get("acls"), policy.get("grants")
    out = [r for i, entry in enumerate(acls or ()) for r in rules.acl(i, entry)]
    out += [r for i, entry in enumerate(grants or ()) for r in rules.grant(i, entry)]
    if acls is None and grants is None:
        out += rules.everything(source.where(root))
    if policy.get("defaultsrcposture") and out:
        untranslated.append(
            Untranslated(
                "defaultSrcPosture", "device posture is not in the device list; nothing is allowed instead"
            )
        )
        out = []
    program = Program((Tier("access rules", tuple(out)),))
    tests = policy.get("tests") or []
    outcomes = run_tests(tests, program, aliases)
    _all_pass(outcomes)
    return Imported(
        ImportedPolicy(program, "tailscale", dict(sorted(aliases.named.items()))),
        tailnet.inventory(),
        untranslated,
        [dict(row) for row in failures(outcomes)],
        tailnet.ids,
        len(acls or ()) + len(grants or ()),
    )


def _all_pass(outcomes: list[str]) -> None:
    failed = [f"tests[{i}]: {why}" for i, why in enumerate(outcomes) if why]
    if failed:
        raise SourceRefused("test", f"test(s) failed: {'; '.join(failed[:5])}", where=POLICY)


def _sections(root: Any) -> dict[str, Any]:
    """The sections under lower-case names (the vendor reads keys without case). Raises SourceRefused."""
    if not isinstance(root, dict):
        raise SourceRefused("type", "the policy must be a map", where=POLICY)
    out = {}
    for key, value in root.items():
        name = key.lower()
        if name not in MAPS | LISTS | SETTINGS:
            raise SourceRefused("field", f'unknown field "{key}"', where=POLICY)
        wanted: type | None = dict if name in MAPS else list if name in LISTS else None
        if wanted is not None and value is not None and not isinstance(value, wanted):
            raise SourceRefused(
                "type", f'"{key}" must be a {"map" if wanted is dict else "list"}', where=POLICY
            )
        out[name] = value
    return out


def _references(policy: Mapping[str, Any], aliases: Aliases) -> None:
    """Names in sections that grant no network access must exist too. Raises SourceRefused."""
    for group in aliases.groups:
        aliases.members(group)
    for tag, owners in (policy.get("tagowners") or {}).items():
        if not tag.startswith("tag:") or ":" in tag[4:] or not tag[4:]:
            raise SourceRefused("tag", f'tagOwners: not a tag name: "{tag}"', where=POLICY)
        _names(owners or [], aliases, f'tagOwners "{tag}"')
    approvers = policy.get("autoapprovers") or {}
    routes = approvers.get("routes") or {}
    if not isinstance(routes, dict):
        raise SourceRefused("type", "autoApprovers.routes must be a map", where=POLICY)
    lists = [("exitNode", approvers.get("exitNode") or []), *((r, v or []) for r, v in routes.items())]
    for name, words in lists:
        _names(words, aliases, f'autoApprovers "{name}"')
    for index, entry in enumerate(policy.get("nodeattrs") or []):
        if not isinstance(entry, dict):
            raise SourceRefused("type", f"nodeAttrs[{index}] must be a map", where=POLICY)
        _names(entry.get("target") or [], aliases, f"nodeAttrs[{index}]", targets=True)
        _pools(entry.get("ipPool"), f"nodeAttrs[{index}].ipPool")


def _pools(words: Any, where: str) -> None:
    """Networks from which devices get their addresses: inside the tailnet's, outside what the vendor keeps for itself."""
    for word in words if isinstance(words, list) else [] if words is None else [words]:
        try:
            spans = nets.parse_range(word)
        except (BadInput, AttributeError):
            raise SourceRefused("ip_pool", f"{where}: not a network: {ascii(word)[:60]}", where=POLICY) from None
        if not nets.covers(_POOLS, spans) or nets.subtract(spans, _RESERVED) != spans:
            raise SourceRefused("ip_pool", f"{where}: {word} is not free for devices", where=POLICY,
                                hint="a pool lies within 100.64.0.0/10, without 100.100.0.0/24, 100.100.100.0/24 and 100.115.92.0/23")  # fmt: skip


def _names(words: Any, aliases: Aliases, where: str, *, targets: bool = False) -> None:
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise SourceRefused("type", f"{where} must be a list of strings", where=POLICY)
    for word in words:
        if word.startswith("tag:") and word not in aliases.tags:
            raise SourceRefused("tag", f'{where}: tag not found: "{word}"', where=POLICY)
        if word.startswith("group:") and word not in aliases.groups and "@" not in word:
            raise SourceRefused("group", f'{where}: group not found: "{word}"', where=POLICY)
        if targets and (word.startswith("autogroup:") or (":" not in word and "@" not in word and word not in aliases.hosts)):
            aliases.resolve(word, "src", where)  # an autogroup, "*" or an address; or nothing at all
