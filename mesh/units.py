"""Control groups that hold an identity inside the host's own network namespace: finding, checking and watching them.

A socket belongs for life to the control group of the process that made it (cgroups(7), struct sock_cgroup_data), and
that is what the firewall compares (mesh/unit_rules.py). A group that is made anew under its path is another group, with
another id; it takes the old one's place, since only root may make it: the groups above it have to be root's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from identity.errors import BadInput, NotFound, Refused, RetinueError
from mesh.plan import UnitPlan
from policy.processes import group_of_unit as group_of_system_unit

TREE: Final = Path("/sys/fs/cgroup")  # what nft takes paths from
OWNER: Final = 0  # of everything above a group that holds an identity
MAX_LEVEL: Final = 255  # nft's type of the level is a byte
_ATTRIB, _CREATE, _DELETE, _DELETE_SELF, _ONLYDIR = 0x4, 0x100, 0x200, 0x400, 0x0100_0000  # linux/inotify.h
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")  # systemd.unit(5)


def root() -> Path:
    """Where the unified hierarchy is mounted: /sys/fs/cgroup, or a directory in it. Raises NotFound."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                place = Path(before.split(" ")[4])
                if before.split(" ")[3] == "/" and (place == TREE or TREE in place.parents):
                    return place
    raise NotFound("attach.no_cgroups", "the unified control group hierarchy is not mounted below /sys/fs/cgroup",
                   hint="units need cgroup v2; give the workload a network namespace: retinue attach --netns")  # fmt: skip


def clean(path: str) -> str:
    """A path from the root of the hierarchy, without slashes around. Raises BadInput."""
    words = path.strip("/").split("/")
    if not path.isprintable() or '"' in path or any(w in {"", ".", ".."} for w in words) or len(words) > MAX_LEVEL:
        raise BadInput("attach.cgroup", f"not a control group below the root: {ascii(path)[:80]}", hint="such as /system.slice/nginx.service")
    return "/".join(words)


def inspect(path: str) -> int:
    """Id of a control group that may hold an identity. Raises BadInput, NotFound, Refused ``attach.cgroup``."""
    check_way(path)
    ident = ident_of(path)
    if ident is None:
        raise NotFound("attach.cgroup", f"there is no control group /{clean(path)}", hint="start the unit first, or attach in its ExecStartPre")
    return ident


def check_way(path: str) -> None:
    """Is all above a group root's alone? Then only root makes it anew and moves processes into it from outside (cgroups(7):
    both need a directory above). Raises BadInput, NotFound, Refused ``attach.cgroup``.
    """
    base, name = root(), clean(path)
    for above in reversed((base / name).parents):
        if base not in above.parents:
            continue
        try:
            found = above.lstat()
        except OSError:
            break  # then it is not there either
        if found.st_uid != OWNER or stat.S_IMODE(found.st_mode) & 0o022:
            raise Refused(
                "attach.cgroup", f"/{above.relative_to(base)} does not belong to root alone: its owner could make /{name} anew",
                hint="attach a group that only root can make, such as a system service",
            )  # fmt: skip


def named(path: str) -> UnitPlan | str:
    """A group that policy names, as it is now, or why its members are not believed to be what policy means."""
    try:
        check_way(path)
    except RetinueError as e:
        return e.message
    return unit_plan(path, None)


class NamedGroups(Mapping[str, UnitPlan | str]):
    """`named` by path, each looked up when it is first asked for and then kept. Iterating gives those asked for."""

    def __init__(self, look: Callable[[str], UnitPlan | str] = named) -> None:
        self._look = look
        self._found: dict[str, UnitPlan | str] = {}

    def __getitem__(self, path: str) -> UnitPlan | str:
        if path not in self._found:
            self._found[path] = self._look(path)
        return self._found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def ident_of(path: str) -> int | None:
    """Id of the group that a path means now; None when there is none."""
    try:
        found = (root() / clean(path)).lstat()
    except (OSError, NotFound):
        return None
    return found.st_ino if stat.S_ISDIR(found.st_mode) else None


def unit_plan(path: str, uid: int | None) -> UnitPlan:
    """The group as it is now."""
    name = clean(path)
    try:
        place = str((root() / name).relative_to(TREE))
    except NotFound:
        return UnitPlan(name, name, None, uid)
    return UnitPlan(name, place, ident_of(path), uid)


def group_of_unit(name: str) -> str:
    """The group of a systemd unit: what systemd says, or else where it puts services. Raises BadInput."""
    if not _UNIT.fullmatch(name) or name.startswith("-"):
        raise BadInput("attach.unit", f"not the name of a unit: {ascii(name)[:80]}", hint="such as nginx.service")
    full = name if re.search(r"\.(service|scope|slice)$", name) else f"{name}.service"
    try:
        words = ["systemctl", "show", "--property=ControlGroup", "--value", "--", full]
        said = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    if said:
        return said
    place = group_of_system_unit(full)
    if place is None:
        raise BadInput("attach.unit", f"not the name of a unit: {ascii(name)[:80]}", hint="such as nginx.service")
    return f"/{place}"


def join(path: str) -> str:
    """Make this process a member; returns the group it was in. Raises Refused ``attach.cgroup``."""
    before = group_of(os.getpid()) or ""
    try:
        (root() / path.strip("/") / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as e:
        raise Refused("attach.cgroup", f"cannot enter the control group {ascii(path)[:80]}: {e.strerror}") from None
    return before


def exists(place: str) -> bool:
    """Is there a group at this place, as nft has it?"""
    return (TREE / place).is_dir()


def group_of(pid: int) -> str | None:
    """The group of a process in the unified hierarchy, as `clean` writes it; empty for the root, None when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(errors="replace").split("\n")
    except OSError:
        return None
    return next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)


def within(group: str, path: str) -> bool:
    """Is `group` the group at `path`, or one below it?"""
    name = clean(path)
    return group == name or group.startswith(name + "/")


class GroupWatch:
    """Calls `changed` when a directory appears, goes or changes hands on the way to one of the groups. Needs a running loop."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int | None = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._watched: dict[str, int] = {}
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def follow(self, paths: Iterable[str]) -> None:
        """Watch what lies above these groups, as far as it is there, and nothing else."""
        if self._fd is None:
            return
        wanted = {str(place) for path in paths for place in _above(path)}
        for place in self._watched.keys() - wanted:
            self._libc.inotify_rm_watch(self._fd, self._watched.pop(place))
        for place in wanted:
            # Again also where it is watched: the directory may be another one by now.
            number = self._libc.inotify_add_watch(self._fd, os.fsencode(place), _ATTRIB | _CREATE | _DELETE | _DELETE_SELF | _ONLYDIR)
            if number >= 0:
                self._watched[place] = number
            else:
                self._watched.pop(place, None)

    def close(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _read(self) -> None:
        if self._fd is None:
            return
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 65536)
        self._changed()


def _above(path: str) -> Iterator[Path]:
    try:
        base = root()
        words = clean(path).split("/")[:-1]
    except (NotFound, BadInput):
        return
    yield base
    for word in words:
        base = base / word
        yield base
