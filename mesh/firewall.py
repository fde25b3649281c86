"""The port firewall: one nftables table of our own, changed by atomic transactions and guarded against others' changes.

Its chains are in mesh/firewall_rules.py, the elements of its sets in mesh/firewall_sets.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mesh import idle_rules, nft, nft_counts, unit_rules, units
from mesh.firewall_names import table_name
from mesh.firewall_rules import NO_PLAN, NOTED, Shape, replacement
from mesh.firewall_sets import LIMITS, Delta, Sets, all_sets, narrowing, sets_delta, statements
from mesh.nft_touches import Touches
from mesh.plan import Plan
from policy.ports import proto_name, proto_number

_CHANGING: Final = (*NOTED, idle_rules.NOTED, *idle_rules.VOLATILE)  # what packets and time write
_COMPARE_LIMIT: Final = 20_000  # elements; larger tables are put back, not compared, when others touch them
_CALM: Final = 3.0  # seconds after our own commit until the table is read to know how it looks
_BEHIND: Final = 1.0  # seconds for which the kernel may keep a commit to itself before the table is looked at all the same


# ---- the kernel's view, in a comparable form (pure)


def fingerprint(objects: Iterable[Mapping[str, Any]]) -> tuple[frozenset[str], Sets]:
    """What a listed table holds: its rules and chains as texts, and the elements of the sets we fill."""
    rules: list[str] = []
    sets: Sets = {}
    position: dict[str, int] = {}
    for entry in objects:
        if "rule" in entry:
            rule = entry["rule"]
            position[rule["chain"]] = number = position.get(rule["chain"], 0) + 1
            rules.append(f"{rule['chain']}#{number} {_plain(rule['expr'])}")
        elif "chain" in entry:
            chain = {k: v for k, v in entry["chain"].items() if k != "handle"}
            rules.append(f"chain {_plain(chain)}")
        elif "limit" in entry:
            limit = {k: v for k, v in entry["limit"].items() if k != "handle"}
            sets.setdefault(LIMITS, set()).add(_plain(limit))
        elif "set" in entry or "map" in entry:
            one = entry.get("set") or entry["map"]
            if not one["name"].startswith(_CHANGING):
                sets[one["name"]] = {_plain(e) for e in one.get("elem", ())}
    return frozenset(rules), sets


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_plain(v)}" for k, v in sorted(value.items()) if k != "counter") + "}"
    if isinstance(value, list):
        return "[" + ",".join(_plain(v) for v in value) + "]"
    return str(value)


# ---- the thing itself


@dataclass(frozen=True, slots=True)
class DeniedFlow:
    """A noted flow (refused, or let through by an audit) under the tuple of its first packet; port 0 for protocols
    without ports.
    """

    src: str
    dst: str
    proto: str
    port: int
    packets: int


class Firewall:
    """Keeps the table equal to the plan last applied. `touches` tells which commits concern it; without it each may."""

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self.table = table_name(interface)
        self.touches: Touches | None = None
        self.close_v6 = False  # see `skeleton`; takes effect with the next whole table
        self.plan: Plan | None = None
        self._shape = NO_PLAN  # of the table that stands
        self._half: tuple[Plan, Delta] | None = None  # narrowed towards this plan, not yet widened
        self._print: tuple[frozenset[str], Sets] | None = None  # the table as our last commit left it
        self._generation: int | None = None  # up to which nobody else touched the table; None when that is not known
        self._own = 0  # commits of ours after it
        self._behind: float | None = None  # since when the kernel has a commit in force that it has not told of
        self._calm = 0.0  # when the table is read
        self._lock = asyncio.Lock()

    async def start(self) -> bool:
        """Make sure that a table stands: the one from before, or one that denies everything. True when it was there."""
        async with self._lock:
            if await nft.list_table(self.table) is not None:
                return True
            await self._put(None)
            return False

    async def narrow(self, plan: Plan) -> None:
        """Take away all that `plan` does not allow. Raises RetinueError; then the table is what it was.

        The first time in the life of this object the whole table is put in place of an earlier one, in one
        transaction: it cannot be known what that one allowed.
        """
        async with self._lock:
            if self.plan is None or self._half is not None or not self._shape.serves(Shape.of(plan)):
                await self._replace(plan)
                return
            delta = sets_delta(self.plan, plan)
            if delta.delete and not await self._try(narrowing(self.table, delta)):
                await self._replace(plan)
                return
            self._half = (plan, delta)

    async def widen(self, plan: Plan) -> None:
        """Allow all that `plan` allows. Raises RetinueError; then the table is not wider than it was."""
        async with self._lock:
            if self.plan is plan:
                return
            if self._half is None or self._half[0] is not plan:
                await self._replace(plan)
                return
            delta = self._half[1]
            text = statements(self.table, "add", delta.add) + idle_rules.renewal(self.table, delta.grace)
            if text and not await self._try(text):
                await self._replace(plan)
                return
            self.plan, self._half = plan, None

    async def apply(self, plan: Plan) -> None:
        """`narrow`, then `widen`."""
        await self.narrow(plan)
        await self.widen(plan)

    async def _put(self, plan: Plan | None) -> None:
        """The whole table. A group that has gone since the plan was made may not keep it from being put back."""
        sets = {} if plan is None else all_sets(plan)
        for name in [n for n in sets if n.startswith(unit_rules.GROUP)]:
            sets[name] = {e for e in sets[name] if units.exists(unit_rules.place_of(e))}
        shape = NO_PLAN if plan is None else Shape.of(plan)
        await self._commit(replacement(self.interface, sets, close_v6=self.close_v6, shape=shape), whole=True)
        self._shape = shape

    async def _replace(self, plan: Plan) -> None:
        await self._put(plan)
        self.plan, self._half = plan, None

    async def _try(self, text: str) -> bool:
        """Commit; False when the kernel refused because the table is not what we left there."""
        try:
            await self._commit(text)
        except nft.Rejected:
            return False
        return True

    async def _commit(self, text: str, *, whole: bool = False) -> None:
        """One transaction. After a `whole` table it does not matter who touched the one before."""
        since, own = (nft.generation(), 0) if whole else (self._generation, self._own)
        kept = self._generation, self._own
        self._print = self._generation = None  # whoever is interrupted here does not know whether it came into force
        try:
            await nft.run(text)
        except nft.Rejected:
            self._generation, self._own = kept
            raise
        self._generation, self._own = since, own + 1
        self._only_ours(nft.generation())
        self._calm = 0.0 if self.touches is None else time.monotonic() + _CALM

    def _only_ours(self, now: int) -> bool:
        """Was each commit up to generation `now` that touched the table one of ours? False when that is not known (yet).

        If so, `now` is from where the next look begins.
        """
        since = self._generation
        if since is None:
            return False
        told = now == since + self._own or (self.touches is not None and self.touches.between(since, now) == self._own)
        if told:
            self._generation, self._own = now, 0
        return told

    def _untold(self, now: int) -> bool:
        """Will the kernel tell in a moment who committed? That is a reason to look again; it may not take for ever."""
        if self._generation is None or self.touches is None or not self.touches.behind(now):
            self._behind = None
            return False
        if self._behind is None:
            self._behind = time.monotonic()
        return time.monotonic() < self._behind + _BEHIND

    async def verify(self) -> bool:
        """Compare the table with the plan and put it back when it differs. True when it had to be."""
        async with self._lock:
            if self.plan is None or self._half is not None:
                return False
            now = nft.generation()
            untold = self._untold(now)  # before the count, which it may complete
            undisturbed = self._only_ours(now)
            if untold and not undisturbed:
                return False
            known = self._print is not None or self.plan.element_count > _COMPARE_LIMIT or time.monotonic() < self._calm
            if undisturbed and known:
                return False
            objects = await nft.list_table(self.table)
            found = None if objects is None else fingerprint(objects)
            if undisturbed and nft.generation() == now:
                self._print = found  # nobody but us has committed: this is how our own transaction looks
                return False
            if found is not None and found == self._print:
                self._generation, self._own = now, 0
                return False
            await self._put(self.plan)
            return True

    async def remove(self) -> None:
        """Delete the table."""
        async with self._lock:
            await nft.run(f"add table inet {self.table}\ndelete table inet {self.table}\n")
            self.plan = self._half = self._print = self._generation = None

    async def counters(self) -> tuple[dict[str, int], list[DeniedFlow]]:
        """Packets by verdict, and the flows refused lately. Empty when the table is gone."""
        return await self.verdicts(), await self.noted("denied")

    async def holds(self, src: str, dst: str, proto: int, port: int | None) -> str | None:
        """The set in the kernel that lets a flow of this tuple begin, as the chains look them up; None when none does."""
        family, ends = (6 if ":" in src else 4), f"{src} . {dst}"
        for prefix in ("", "a"):
            wanted = [(f"{prefix}pair{family}", f"{ends} . {proto} . {port}")] if port is not None else []
            wanted.append((f"{prefix}proto{family}", f"{ends} . {proto}"))
            wanted += [(f"{prefix}range{family}", f"{ends} . {proto} . {port}")] if port is not None else []
            for name, element in wanted:
                if await nft.has(self.table, name, element):
                    return name
            rest = f"{prefix}rest{family}"
            if await nft.has(self.table, rest, ends) and not await nft.has(self.table, f"{prefix}except{family}", f"{ends} . {proto}"):
                return rest
            if not prefix and port is not None and await nft.has(self.table, f"bound{family}", f"{ends} . {proto} . {port}-{port}"):
                return f"bound{family}"
        return None

    async def verdicts(self) -> dict[str, int]:
        """Packets by verdict since the table was made."""
        return nft_counts.counters(self.table)

    async def noted(self, kind: str) -> list[DeniedFlow]:
        """Flows ``denied``, ``audited`` or ``idled`` (ended as idle) lately."""
        flows = [e for family in (4, 6) for e in await asyncio.to_thread(nft_counts.elements, self.table, f"{kind}{family}")]
        return sorted(
            (DeniedFlow(e.src, e.dst, proto_name(proto_number(e.proto)), e.port, e.packets) for e in flows),
            key=lambda f: (f.src, f.dst, f.proto, f.port),
        )
