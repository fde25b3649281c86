"""Registration entries: which process of a host may have which identity, by facts the kernel tells about the process.

An entry names a workload and selectors; all of them have to hold. What proves something is the user (uid) together with
a place that the user cannot choose: a cgroup, a system unit, a container or the namespace of an attachment. gid, groups,
path and sha256 narrow an entry and prove nothing alone: a process may exec any program after it connected.

The entries of one endpoint are one signed record with a generation that only grows, so a deleted entry cannot be played
back and one host's entries cannot be given to another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from identity.errors import BadInput
from identity.labels import check_labels
from identity.names import workload_path
from identity.records import Count, Payload, Seconds

MAX_ENTRIES: Final = 1024  # of one endpoint
MAX_HINT: Final = 128
NOBODY: Final = 65534  # the kernel's stand-in for a user it cannot name here (user_namespaces(7)); never a proof

Id = Annotated[int, Field(ge=0, le=(1 << 32) - 2)]

_PARENT = re.compile(r"[a-z0-9*?][a-z0-9*?._-]{0,62}")
_HINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]*")
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_HEX = re.compile(r"[0-9a-f]+")
_UNIT = re.compile(r"[A-Za-z0-9:_.@\\-]{1,250}\.(service|scope)")
_CONTAINER = re.compile(r"(?:^|[-/])([0-9a-f]{64})(?:\.scope)?$")


class Selectors(BaseModel):
    """What has to hold for a process. `cgroup` holds for itself and what is below it; `netns` names the workload whose
    attachment's network namespace the process is in; `groups` are supplementary ones, all of them.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    uid: Id | None = None
    gid: Id | None = None
    groups: list[Id] = Field(default=[], max_length=16)
    unit: str | None = Field(default=None, max_length=256)
    cgroup: str | None = Field(default=None, max_length=1024)
    container: str | None = Field(default=None, max_length=64)
    netns: str | None = Field(default=None, max_length=255)
    path: str | None = Field(default=None, max_length=1024)
    sha256: str | None = Field(default=None, max_length=64)


class Entry(BaseModel):
    """One entry as signed. `labels` must be among the certified labels of the placement; `ends` is when it is over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    id: str = Field(max_length=32)
    name: str = Field(max_length=255)
    selectors: Selectors
    labels: dict[str, str] = {}
    hint: str = Field(default="", max_length=MAX_HINT)
    ends: Seconds | None = None


class EntriesRecord(Payload):
    """All entries of one endpoint."""

    typ: ClassVar[str] = "entries"
    role: ClassVar[str] = "records"
    limit: ClassVar[int] = 2 * 1024 * 1024

    endpoint: str
    generation: Count
    entries: list[Entry] = Field(max_length=MAX_ENTRIES)
    issued: Seconds


class EntryRecord(Payload):
    """One entry as the control plane keeps it: never sent, verified before it goes into a set."""

    typ: ClassVar[str] = "entry"
    role: ClassVar[str] = "records"

    parent: str
    entry: Entry
    ttl: int | None = None
    ends_with: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a process. path and sha256 are None where they were not asked for or cannot be read."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    cgroup: str = "/"
    netns: frozenset[str] = frozenset()
    path: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One selector: what was asked for, what was found."""

    selector: str
    wanted: str
    found: str
    ok: bool


# ---- what an entry may say


def check_parent(text: str) -> str:
    """An endpoint's name, or a pattern of names with ``*`` and ``?``. Raises BadInput ``entry.parent``."""
    if not _PARENT.fullmatch(text):
        raise BadInput("entry.parent", f"not a host name or pattern: {ascii(text)[:80]}", hint="write web-1, or web-* for several")
    return text


def is_parent(pattern: str, endpoint: str) -> bool:
    """Does a parent pattern name this endpoint?"""
    return fnmatchcase(endpoint, pattern)


def check_selectors(s: Selectors) -> Selectors:
    """Do they prove who a process is? Raises BadInput ``entry.selectors``, ``entry.<selector>``."""
    if s.uid is None or not (s.unit or s.cgroup or s.container or s.netns):
        raise BadInput(
            "entry.selectors", "an entry needs a uid and one of unit, cgroup, container or netns",
            hint="path, sha256, gid and groups only narrow an entry: any process of the user can meet them",
        )  # fmt: skip
    if NOBODY in {s.uid, s.gid, *s.groups}:
        raise BadInput("entry.nobody", f"{NOBODY} stands for every user the kernel cannot name here", hint="give the program a user of its own")
    if s.unit is not None and not _UNIT.fullmatch(s.unit):
        raise BadInput("entry.unit", f"not a system unit: {ascii(s.unit)[:80]}", hint="write nginx.service or run-1.scope")
    if s.cgroup is not None and not _is_plain_path(s.cgroup):
        raise BadInput("entry.cgroup", f"not a cgroup path: {ascii(s.cgroup)[:80]}", hint="as in /proc/PID/cgroup, below /")
    if s.container is not None and not (12 <= len(s.container) <= 64 and _HEX.fullmatch(s.container)):
        raise BadInput("entry.container", f"not a container id: {ascii(s.container)[:80]}", hint="12 to 64 lower-case hex digits")
    if s.netns is not None:
        workload_path(s.netns)
    if s.path is not None and not _is_plain_path(s.path):
        raise BadInput("entry.path", f"not the path of a program: {ascii(s.path)[:80]}", hint="absolute, without . and ..")
    if s.sha256 is not None and not (len(s.sha256) == 64 and _HEX.fullmatch(s.sha256)):
        raise BadInput("entry.sha256", "a SHA-256 is 64 lower-case hex digits", hint="sha256sum PROGRAM")
    return s


def check_entry(entry: Entry) -> Entry:
    """Raises BadInput."""
    if not _ID.fullmatch(entry.id):
        raise BadInput("entry.id", f"not an id: {ascii(entry.id)[:80]}")
    workload_path(entry.name)
    check_labels(entry.labels)
    if entry.hint and not _HINT.fullmatch(entry.hint):
        raise BadInput("entry.hint", f"not a hint: {ascii(entry.hint)[:80]}", hint="letters, digits and . _ / : -")
    check_selectors(entry.selectors)
    return entry


def _is_plain_path(text: str) -> bool:
    parts = text.split("/")[1:]
    return text.startswith("/") and all(p not in {"", ".", ".."} for p in parts) and text.isprintable()


# ---- does it hold


def container_of(cgroup: str) -> str | None:
    """The container id that a runtime wrote into a cgroup path (docker, containerd, cri-o, podman).

    None below a user's own slice: there the user makes the directories.
    """
    parts = cgroup.split("/")
    if "user.slice" in parts or any(p.startswith("user@") for p in parts):
        return None
    for part in reversed(parts):
        match = _CONTAINER.search(part)
        if match:
            return match[1]
    return None


def unit_of(cgroup: str) -> str | None:
    """The system unit of a cgroup path: the outermost one, since what lies below it is made by the unit itself."""
    return next((p for p in cgroup.split("/") if p.endswith((".service", ".scope"))), None)


def judge(s: Selectors, facts: Facts) -> tuple[Finding, ...]:
    """Every selector of an entry with what was found; the entry holds when all of them are ok."""
    out: list[Finding] = []

    def say(selector: str, wanted: object, found: object, ok: bool) -> None:
        out.append(Finding(selector, str(wanted), "-" if found is None else str(found), ok))

    nobody = NOBODY in {facts.uid, facts.gid}
    if s.uid is not None:
        say("uid", s.uid, facts.uid, s.uid == facts.uid and not nobody)
    if s.gid is not None:
        say("gid", s.gid, facts.gid, s.gid == facts.gid)
    for group in s.groups:
        say("group", group, " ".join(map(str, sorted(facts.groups))) or None, group in facts.groups)
    if s.unit is not None:
        unit = unit_of(facts.cgroup)
        say("unit", s.unit, unit, s.unit == unit)
    if s.cgroup is not None:
        say("cgroup", s.cgroup, facts.cgroup, f"{facts.cgroup}/".startswith(f"{s.cgroup}/"))
    if s.container is not None:
        container = container_of(facts.cgroup)
        say("container", s.container, container, container is not None and container.startswith(s.container))
    if s.netns is not None:
        say("netns", s.netns, " ".join(sorted(facts.netns)) or None, s.netns in facts.netns)
    if s.path is not None:
        say("path", s.path, facts.path, s.path == facts.path)
    if s.sha256 is not None:
        say("sha256", s.sha256, facts.sha256, s.sha256 == facts.sha256)
    return tuple(out)


def holds(s: Selectors, facts: Facts) -> bool:
    """Do all selectors hold? Never for selectors that prove nothing, whoever signed them."""
    proves = s.uid is not None and bool(s.unit or s.cgroup or s.container or s.netns)
    return proves and all(f.ok for f in judge(s, facts))


def weight(s: Selectors) -> tuple[int, int]:
    """How much an entry says: the number of selectors, then how deep its cgroup is. More specific is larger."""
    given = sum(v is not None for k, v in s.model_dump(exclude={"groups"}).items()) + len(s.groups)
    return given, len((s.cgroup or "").split("/"))


def describe(s: Selectors) -> str:
    """``uid:33 unit:nginx.service``"""
    words: Sequence[tuple[str, object]] = [
        *((k, v) for k, v in s.model_dump(exclude={"groups"}).items() if v is not None), *(("group", g) for g in s.groups)
    ]  # fmt: skip
    return " ".join(f"{k}:{v}" for k, v in words)


def parse_selectors(words: Sequence[str]) -> Selectors:
    """Selectors from ``kind:value`` words. Raises BadInput ``entry.form``, also for a kind given twice."""
    values: dict[str, object] = {}
    groups: list[int] = []
    for word in words:
        kind, colon, value = word.partition(":")
        if not colon or not value or kind not in {*Selectors.model_fields, "group"} - {"groups"}:
            raise BadInput(
                "entry.form", f"not a selector: {ascii(word)[:80]}",
                hint="uid:N gid:N group:N unit:NAME cgroup:/PATH container:ID netns:WORKLOAD path:/PATH sha256:HEX",
            )  # fmt: skip
        number = int(value) if value.isascii() and value.isdigit() and len(value) < 11 else None
        if kind in {"uid", "gid", "group"} and (number is None or number > (1 << 32) - 2):
            raise BadInput("entry.form", f"{kind} is a number: {ascii(value)[:40]}")
        if kind == "group":
            groups.append(number or 0)
        elif kind in values:
            raise BadInput("entry.form", f"{kind} is given twice")
        else:
            values[kind] = number if kind in {"uid", "gid"} else value
    try:
        return Selectors.model_validate({**values, "groups": groups})
    except ValueError:
        raise BadInput("entry.form", "a selector is too long, or there are too many") from None
