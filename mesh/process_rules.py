"""The part of the firewall for rules that name processes at their source: users and control groups (texts, pure).

Only packets that a socket of this host sends can be told by it, so only those of the host itself and of units are asked, where
they leave their sender. The kernel fixes a socket's control group when a process makes it; its user is that of the file. What
the kernel sends for a connection whose socket has no process any more (the rest of what was written before close, and
acknowledgements in TIME_WAIT) goes on within a TCP flow that was begun; a SYN never does. Answers are not compared.

Sets:  uid4, uid6             user . source . destination . protocol . port
       bound4, bound6         the same without the user: all that only some processes may use
       groupflow<L>_4, _6     group at level L below the root . source . destination . protocol . port; the comment names the id
                              of the group that is meant, so one that is made anew under its path is another element
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from mesh.plan import Plan, UnitPlan
from mesh.unit_rules import GROUP
from policy.program import Process

GROUP_FLOW: Final = f"{GROUP}flow"  # begins as those of units do: both are emptied when one of their groups goes


def elements(processes: Iterable[Process], groups: Mapping[str, UnitPlan], flows: Iterable[str], family: int) -> dict[str, set[str]]:
    """The elements by set. flows: ``source . destination . protocol . port-port``. A group that is not there has none."""
    flows = list(flows)
    out: dict[str, set[str]] = {f"bound{family}": set(flows)}
    for process in processes:
        group = groups.get(process.value) if process.kind == "cgroup" else None
        if process.kind == "uid":
            out.setdefault(f"uid{family}", set()).update(f"{process.value} . {flow}" for flow in flows)
        elif group is not None and group.ident is not None:
            lines = (f'"{group.place}" . {flow} comment "group {group.ident}"' for flow in flows)
            out.setdefault(f"{GROUP_FLOW}{group.level}_{family}", set()).update(lines)
    return out


def levels(plan: Plan) -> tuple[int, ...]:
    """The levels that need a set, of groups that are there or not."""
    return tuple(sorted({group.level for pair in plan.pairs.values() for group in pair.groups}))


def sets(wanted: Iterable[int]) -> list[str]:
    """Their declarations."""
    out = []
    for family in (4, 6):
        flow = f"ipv{family}_addr . ipv{family}_addr . inet_proto . inet_service"
        out.append(f"set uid{family} {{ type uid . {flow}; flags interval; }}")
        out.append(f"set bound{family} {{ type {flow}; flags interval; }}")
        out += [f"set {GROUP_FLOW}{level}_{family} {{ type cgroupsv2 . {flow}; flags interval; }}" for level in wanted]
    return out


def lookups(family: int, wanted: Iterable[int]) -> str:
    """Rules for the first direction of a flow: a process that is named goes to ``pass``, the kernel's own rest to ``unowned``."""
    ip = "ip" if family == 4 else "ip6"
    flow = f"{ip} saddr . {ip} daddr . meta l4proto . th dport"
    rules = [f"meta skuid . {flow} @uid{family} goto pass"]
    rules += [f"socket cgroupv2 level {level} . {flow} @{GROUP_FLOW}{level}_{family} goto pass" for level in wanted]
    rules.append(f"{flow} @bound{family} jump unowned")
    return "\n    ".join(rules)


def answers(family: int) -> str:
    """The rule for the other direction."""
    ip = "ip" if family == 4 else "ip6"
    return f"{ip} daddr . {ip} saddr . meta l4proto . th sport @bound{family} goto pass"


CHAIN: Final = """
chain unowned {
    meta skuid >= 0 return
    meta l4proto != 6 return
    tcp flags & (syn|rst) != 0 return
    ct state established goto pass
}
"""
