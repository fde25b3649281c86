"""Grants that ended by themselves, told in the audit as ``grant.expired`` with their cause: a time, or a workload.

Which grants are live is kept in the database, so that a restart tells none twice, and one that never was live (its
workload has not started yet) is not told at all. A grant that its author took out was not ended by itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Final

from ca import audit
from ca.store import Store
from policy.model import Grant, Policy
from policy.windows import show_instant

KEY: Final = "live_grants"  # in `meta`: JSON list of grant ids


def cause(grant: Grant, now: int, running: Collection[str]) -> str | None:
    """Why a grant is over; None while it is not (or not yet)."""
    if grant.not_after is not None and now >= grant.not_after:
        return f"its end {show_instant(grant.not_after)}"
    if grant.ends_with is not None and grant.ends_with not in running:
        return f"the end of the workload {grant.ends_with}"
    return None


def follow(store: Store, policies: Collection[Policy], now: int, running: Collection[str]) -> list[str]:
    """Tell what ended since the last call; returns the ids. One short transaction, and only when something changed."""
    grants = {g.rule.id: g for policy in policies for g in policy.grants}
    live = sorted(
        rule for rule, g in grants.items()
        if cause(g, now, running) is None and (g.not_before is None or now >= g.not_before)
    )  # fmt: skip
    text = json.dumps(live)
    with store.read() as tx:
        if (store.get(tx, KEY) or "[]") == text:
            return []
    told = []
    with store.write() as tx:
        for rule in json.loads(store.get(tx, KEY) or "[]"):
            why = cause(grants[rule], now, running) if rule in grants else None
            if why is not None:
                audit.append(tx, now, "clock", "grant.expired", rule.removeprefix("grant:"), cause=why)
                told.append(rule)
        store.put(tx, KEY, text)
    return told
