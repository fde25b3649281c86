"""The internal form of a policy: ordered tiers of rules over selectors. Everything that decides reads this, only.

The surface language (policy/language.py) and every importer compile to a Program; policy/evaluate.py is the one
evaluator over it. A Program is wider than the surface language on purpose: importers need ordered tiers with `pass`,
one-sided rules and subjects that are isolated by being selected.

Evaluation, for each direction (egress of the source, ingress of the destination), tiers top-down:
    first-match   the first rule that matches decides: allow and deny are final, pass leaves the tier
    deny-wins     any matching deny is final, else any matching pass leaves the tier, else any matching allow is final
    no rule       deny when `isolates` selects the subject (source for egress, destination for ingress),
                  else the tier's `otherwise`
After the last tier: `default`. A flow is allowed when both directions allow it.

Audit comes on top of that (policy.evaluate): a denial by a rule with `audit`, and a denial by default between two ends
that an `Audit` covers, are recorded and not enforced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from policy.ports import ANYTHING, PortMap

Direction = Literal["egress", "ingress"]
BOTH: tuple[Direction, Direction] = ("egress", "ingress")
FOREIGN = "spiffe://"  # how the name of a subject of another trust domain begins; names of our own have no colon


class Action(StrEnum):
    ALLOW = "allow"
    DENY = "deny"
    PASS = "pass"


@dataclass(frozen=True, slots=True)
class Where:
    """A position in a source file, 1-based."""

    file: str
    line: int
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks or is asked: a workload, host, operator, an address range outside (then `nets` says which), or an
    identity of another trust domain (then `name` is its SPIFFE ID).
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    spiffe_id: str = ""
    nets: tuple[str, ...] = ()  # addresses behind or outside; empty for an inside identity

    @property
    def foreign(self) -> bool:
        """Is it of another trust domain?"""
        return self.name.startswith(FOREIGN)

    def __hash__(self) -> int:
        return hash((self.name, self.spiffe_id))


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """Who may use an allow rule at the source: a uid (decimal) or a control group (path below the root, no slash around)."""

    kind: Literal["uid", "cgroup"]
    value: str

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `id` is unique in its program; `why` is the author's reason.

    concerns:  narrows the rule to flows with at least one end that it selects (a segment's members, a scope)
    audit:     a deny that is recorded, not enforced
    max_rate:  a ceiling in bytes a second for each pair and direction, of an allow
    processes: only these processes at the source may use the allow; empty: all
    idle_timeout: seconds; a TCP or UDP flow of an allow that carried nothing for so long is ended
    """

    id: str
    action: Action
    src: Selector
    dst: Selector
    ports: PortMap = ANYTHING
    where: Where | None = None
    why: str = ""
    directions: tuple[Direction, ...] = BOTH
    concerns: Selector | None = None
    audit: bool = False
    max_rate: int | None = None
    processes: tuple[Process, ...] = ()
    idle_timeout: int | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """A segment that audits until `until` (seconds since the epoch); both ends of a flow lie `within`.

    concerns: narrows it to flows with at least one end that it selects
    """

    segment: str
    members: Selector
    until: int
    within: Selector | None = None
    where: Where | None = None
    concerns: Selector | None = None


@dataclass(frozen=True, slots=True)
class Alert:
    """Refused flows with an end that `concerns` selects are told to the sink `sink`, one incident in `collapse` seconds."""

    segment: str
    concerns: Selector
    sink: str
    collapse: int


@dataclass(frozen=True, slots=True)
class Tier:
    """Rules that are decided together. `isolates`: subjects that are denied when no rule of this tier matches."""

    name: str
    rules: tuple[Rule, ...]
    order: Literal["first-match", "deny-wins"] = "deny-wins"
    isolates: Mapping[Direction, Selector] = field(default_factory=dict)
    otherwise: Action = Action.PASS


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled policy; `digest` is the SHA-256 of its source files. `held` selects members of enforcing segments:
    an audit opens nothing from or to them.
    """

    tiers: tuple[Tier, ...]
    default: Action = Action.DENY
    digest: str = ""
    audits: tuple[Audit, ...] = ()
    held: Selector = field(default_factory=lambda: Nothing())  # noqa: PLW0108 -- it is defined below
    alerts: tuple[Alert, ...] = ()
    ends: frozenset[str] = frozenset()  # workloads with whose end something of this ends, in force or not


# ---- selectors: a closed expression tree over a subject's name and labels


@dataclass(frozen=True, slots=True)
class Everything:
    """Every inside identity (and, where the program says so, nobody outside)."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """No subject at all."""


@dataclass(frozen=True, slots=True)
class Named:
    """Subjects by name."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Under:
    """Subjects whose name is `prefix` or lies below it in the tree (``shop`` has ``shop/api`` below it)."""

    prefix: str


@dataclass(frozen=True, slots=True)
class In:
    """The label `key` exists and its value is one of `values`."""

    key: str
    values: frozenset[str]


@dataclass(frozen=True, slots=True)
class Exists:
    key: str


@dataclass(frozen=True, slots=True)
class Not:
    term: Selector


@dataclass(frozen=True, slots=True)
class AllOf:
    terms: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    terms: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class Nets:
    """Addresses outside the mesh (or behind a gateway): CIDRs or ``a-b`` ranges, minus `excluding`."""

    cidrs: tuple[str, ...]
    excluding: tuple[str, ...] = ()


Selector = Everything | Nothing | Named | Under | In | Exists | Not | AllOf | AnyOf | Nets
