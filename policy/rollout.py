"""Two revisions of the policy in force at once: a canary decided by the new one, everybody else by the old one. Pure.

A flow belongs to the trial when at least one of its ends is in the canary. Membership goes by identity (a name, or the
certified labels), which both ends of a flow know of each other, so both hosts decide it by the same revision; there is no
pair across the boundary that one host would judge by the old policy and the other by the new one. A workload stays in or
out when it moves, and all its instances with it.

`compose` writes this as one ordinary program: the old rules concern only flows with no end in the canary, the new ones
only flows with one. So the evaluator, the compiled firewall, scope and the gateway need not know of trials at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from identity.errors import BadInput, Bug
from identity.labels import check_labels
from policy.compile import compile_policy, next_change
from policy.model import Policy
from policy.program import Action, Everything, In, Named, Not, Nothing, Program, Rule, Selector, Tier, Where
from policy.selectors import both

MAX_NAMES: Final = 20_000
MARK: Final = "trial"  # behind the file's name in what a trial's rule says of its place


@dataclass(frozen=True, slots=True)
class Canary:
    """Who takes part in a trial: identities by name, or all that carry these labels, or everybody."""

    names: frozenset[str] = frozenset()
    labels: tuple[tuple[str, str], ...] = ()
    everybody: bool = False

    @classmethod
    def of(cls, names: Iterable[str] = (), labels: Mapping[str, str] | None = None, *, everybody: bool = False) -> Canary:
        """Raises BadInput ``rollout.canary`` when it is empty, or more than one way at once."""
        given = frozenset(names)
        ways = bool(given) + bool(labels) + everybody
        if ways != 1:
            raise BadInput(
                "rollout.canary", "a canary is chosen by label, by percentage, by host or as everybody: one of them, and not empty",
                hint="for example: --canary env=staging, or --percent 10",
            )  # fmt: skip
        if len(given) > MAX_NAMES:
            raise BadInput("rollout.canary", f"a canary of {len(given)} identities; at most {MAX_NAMES}", hint="choose it by label")
        if labels:
            check_labels(dict(labels))
        return cls(given, tuple(sorted((labels or {}).items())), everybody)

    @property
    def selector(self) -> Selector:
        if self.everybody:
            return Everything()
        if self.names:
            return Named(self.names)
        return both(*(In(key, frozenset((value,))) for key, value in self.labels))

    def __str__(self) -> str:
        if self.everybody:
            return "everybody"
        return f"{len(self.names)} identities" if self.names else ", ".join(f"{k}={v}" for k, v in self.labels)


def sample(names: Iterable[str], percent: int, salt: str) -> frozenset[str]:
    """So many percent of the names (at least one), by a hash of name and salt: the same ones again, and more for more percent.

    Raises BadInput ``rollout.percent``.
    """
    if not 1 <= percent <= 100:
        raise BadInput("rollout.percent", f"a percentage is from 1 to 100, not {percent}")
    ranked = sorted(set(names), key=lambda n: hashlib.sha256(f"{salt}\0{n}".encode()).digest())
    return frozenset(ranked[: max(1, len(ranked) * percent // 100)])


def compose(base: Program, trial: Program, who: Selector) -> Program:
    """One program in which `trial` decides flows with an end that `who` selects, and `base` all others.

    Both must deny by default and isolate nobody, as compiled policies do.
    """
    if not base.default is trial.default is Action.DENY:
        raise Bug("rollout.default", "only policies that deny by default can be in force together")
    if isinstance(who, Everything):
        return replace(trial, digest=trial.digest)
    order = list(dict.fromkeys([*(t.name for t in base.tiers), *(t.name for t in trial.tiers)]))
    # Guardrails come first wherever only one of the two has any.
    order.sort(key=lambda name: name != "guardrails")
    tiers = []
    for name in order:
        old = next((t for t in base.tiers if t.name == name), None)
        new = next((t for t in trial.tiers if t.name == name), None)
        like = old or new
        assert like is not None
        rules = [*(_outside(r, who) for r in (old.rules if old else ())), *_inside(new, who)]
        tiers.append(replace(like, rules=tuple(rules)))
    digest = hashlib.sha256(f"{base.digest}\0{trial.digest}".encode()).hexdigest()
    audits = (
        *(replace(a, within=_both(a.within, Not(who), Not(base.held))) for a in base.audits),
        *(replace(a, within=_both(a.within, Not(trial.held)), concerns=who) for a in trial.audits),
    )
    alerts = {a.segment: a for a in (*base.alerts, *trial.alerts)}
    return Program(tuple(tiers), digest=digest, audits=audits, alerts=tuple(alerts.values()),
                   ends=base.ends | trial.ends)


def _both(*terms: Selector | None) -> Selector:
    return both(*(t for t in terms if not isinstance(t, Not) or not isinstance(t.term, Nothing)), Everything())


def _outside(rule: Rule, who: Selector) -> Rule:
    return replace(rule, src=both(rule.src, Not(who)), dst=both(rule.dst, Not(who)))


def _inside(tier: Tier | None, who: Selector) -> Iterable[Rule]:
    """Each rule twice: for a source in the canary, and for a destination in it whose source is not."""
    for rule in tier.rules if tier is not None else ():
        where = Where(f"{rule.where.file}@{MARK}", rule.where.line, rule.where.column) if rule.where else None
        named = replace(rule, where=where)
        yield replace(named, src=both(rule.src, who))
        yield replace(named, id=f"{rule.id}+", src=both(rule.src, Not(who)), dst=both(rule.dst, who))


@dataclass(frozen=True, slots=True)
class Staged:
    """A policy and, while it is rolled out, the next one beside it."""

    base: Policy
    trial: Policy | None = None
    canary: Canary | None = None

    def program(self, now: int | None = None, running: Collection[str] | None = None) -> Program:
        """What is in force at `now`, as compile_policy has it."""
        base = compile_policy(self.base, now, running)
        if self.trial is None or self.canary is None:
            return base
        return compose(base, compile_policy(self.trial, now, running), self.canary.selector)

    def next_change(self, now: int) -> int | None:
        """The next instant at which `program` may give something else."""
        found = [next_change(p, now) for p in self.policies]
        return min((one for one in found if one is not None), default=None)

    @property
    def ends(self) -> frozenset[str]:
        """Workloads with which a grant ends."""
        return frozenset(g.ends_with for p in self.policies for g in p.grants if g.ends_with is not None)

    @property
    def policies(self) -> Sequence[Policy]:
        return (self.base,) if self.trial is None else (self.base, self.trial)
