"""Processes that a rule may name at its source: what a policy file says, and what the kernel can check of it (pure).

    uid:1001               sockets of this user
    cgroup:/PATH           sockets made in this control group of the unified hierarchy, or in one below it
    unit:NAME              the control group where systemd puts the system unit NAME, for example unit:nginx.service
"""

from __future__ import annotations

import re
from typing import Final

from policy.document import Node
from policy.program import Process

_UID_MAX: Final = (1 << 32) - 2
_GROUP: Final = re.compile(r"[A-Za-z0-9:_.@\\-]{1,128}(?:/[A-Za-z0-9:_.@\\-]{1,128}){0,15}")
_UNIT: Final = re.compile(r"[A-Za-z0-9_\\][A-Za-z0-9:_.\\@-]{0,127}")  # systemd.unit(5); none that begins like an option
_HINT: Final = "write uid:1001, unit:nginx.service or cgroup:/system.slice/nginx.service"


def parse_process(node: Node) -> Process:
    """One of the words above. Raises BadPolicy."""
    text = node.scalar("process")
    kind, _, value = text.partition(":")
    if kind == "uid" and value.isascii() and value.isdigit() and len(value) < 11 and int(value) <= _UID_MAX:
        return Process("uid", str(int(value)))
    if kind == "cgroup":
        path = value.removeprefix("/").removesuffix("/")
        if _GROUP.fullmatch(path) and not {".", ".."} & set(path.split("/")):
            return Process("cgroup", path)
        raise node.bad("policy.process", f"not a control group below the root: {ascii(text)[:60]}", hint="such as cgroup:/system.slice/nginx.service")
    if kind == "unit":
        group = group_of_unit(value) if _UNIT.fullmatch(value) else None
        if group is not None and _GROUP.fullmatch(group):
            return Process("cgroup", group)
        raise node.bad("policy.process", f"not a service, scope or slice: {ascii(text)[:60]}", hint="such as unit:nginx.service")
    if text.startswith("/"):
        raise node.bad("policy.not_enforced", "the path of an executable is no barrier, so it is not accepted as one",
                       hint=f"name what the kernel can check: {_HINT}")  # fmt: skip
    raise node.bad("policy.process", f"not a process: {ascii(text)[:60]}", hint=_HINT)


def group_of_unit(name: str) -> str | None:
    """Where systemd puts a system unit that has no Slice= of its own, without a slash in front (systemd.slice(5)): a service
    or scope in system.slice, an instance of a template in a slice of its template, a slice below those its name consists of.
    A name without a suffix is a service's. None for what has no control group of its own.
    """
    stem, dot, kind = name.rpartition(".")
    if kind not in {"service", "scope", "slice"}:
        stem, dot, kind = name, ".", "service"
    if kind == "slice":
        parts = stem.split("-")
        return "/".join(f"{'-'.join(parts[:n])}.slice" for n in range(1, len(parts) + 1)) if all(parts) else None
    if not stem:
        return None
    template, at, _ = stem.partition("@")
    escaped = template.replace("-", "\\x2d")
    between = f"system-{escaped}.slice/" if at and kind == "service" else ""
    return f"system.slice/{between}{stem}{dot}{kind}"
