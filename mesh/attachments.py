"""Who is attached on this machine: network namespaces, processes, links and control groups, and noticing when they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from identity.errors import BadInput, Conflict, NotFound, RetinueError
from identity.names import workload_path
from identity.wire.local import Attach
from mesh import netns, taps, units
from mesh.attestation import Caller, NamespaceId, namespace_at
from mesh.compile import LocalAttachment
from mesh.plan import UnitPlan
from mesh.processes import process_start
from mesh.snapshot import InstanceKey, instance_key
from mesh.state import SavedPlace, StateDir
from mesh.taps import LinkWatch

_PROCESS: Final = re.compile(r"/proc/([1-9][0-9]{0,9})/ns/net")

log = structlog.get_logger("retinue.attachments")


class Attachments:
    """The table. `changed` is called, on the loop, after a process took its attachment along when it ended."""

    def __init__(self, state: StateDir, boot: str, changed: Callable[[], None]) -> None:
        self._state, self._boot, self._changed = state, boot, changed
        self._places: dict[InstanceKey, SavedPlace] = {}
        self._watched: dict[InstanceKey, int] = {}
        self._links: LinkWatch | None = None
        self._groups: units.GroupWatch | None = None
        self._seen: dict[str, int | None] = {}  # control group -> its id when it was last looked at
        self._named: dict[str, UnitPlan | str] = {}  # the groups that policy names, as the newest plan knows them
        self._followed: frozenset[str] = frozenset()

    def load(self) -> None:
        """Take over what was attached before, as far as it still exists. Raises BadState."""
        for place in self._state.load_attachments(self._boot):
            key = instance_key(place.attach.name, place.attach.instance)
            pid = _pid(place.attach)
            if pid is not None and (place.started is None or process_start(pid) != place.started):
                log.info("the process of an attachment is gone", instance=key)
                continue
            if place.attach.kind == "tap" and (place.inode is None or taps.index_of(place.attach.device or "") != place.inode):
                log.info("the link of an attachment is gone", instance=key)
                continue
            self._places[key] = place
            if pid is not None:
                self._watch(key, pid)
        self._watch_links()
        self._watch_groups()

    def entries(self) -> list[Attach]:
        """What is attached, in order of the instances."""
        return [p.attach for _, p in sorted(self._places.items())]

    def __contains__(self, key: InstanceKey) -> bool:
        return key in self._places

    def local(self) -> Mapping[InstanceKey, LocalAttachment]:
        """The places as the compiler wants them. Named namespaces and control groups are looked up anew: they may have
        been recreated. The groups that it asks for are followed from then on.
        """
        out = {}
        named: dict[str, UnitPlan | str] = {}
        groups = units.NamedGroups(lambda path: self._look(path, named))
        for key, place in self._places.items():
            inode = place.inode
            if place.attach.kind == "netns" and _pid(place.attach) is None and place.attach.netns is not None:
                with contextlib.suppress(RetinueError):
                    inode = netns.identify(place.attach.netns)
            group = place.attach.cgroup
            unit = None if group is None else units.unit_plan(group, place.attach.uid)
            at_home = place.attach.kind in {"host", "unit"}
            out[key] = LocalAttachment(
                place.attach.kind, place.attach.netns, inode, place.attach.device, unit, groups if at_home else {}
            )
        return out

    def _look(self, path: str, named: dict[str, UnitPlan | str]) -> UnitPlan | str:
        self._named = named
        if path not in self._followed:
            self._follow_groups({*self._followed, path})  # before it is looked at: a change in between has to be heard
        named[path] = units.named(path)
        return named[path]

    def is_at(self, key: InstanceKey, space: NamespaceId) -> bool:
        """Is this the instance's network namespace, looked up now? The asker keeps `space` from ending meanwhile."""
        place = self._places.get(key)
        if place is None or place.attach.netns is None or namespace_at(place.attach.netns) != space:
            return False
        pid = _pid(place.attach)
        return pid is None or (place.started is not None and process_start(pid) == place.started)

    def is_member(self, key: InstanceKey, caller: Caller) -> bool:
        """Does this process belong to the instance's control group, and is it of its user? Both are its own to leave."""
        place = self._places.get(key)
        if place is None or place.attach.cgroup is None or place.attach.uid not in {None, caller.uid}:
            return False
        group = units.group_of(caller.pid)
        return group is not None and caller.alive() and units.within(group, place.attach.cgroup)

    def attach(self, request: Attach) -> InstanceKey:
        """Enter an attachment; the same one again is no change. Raises BadInput, NotFound, Conflict, BadState."""
        workload_path(request.name)
        key = instance_key(request.name, request.instance)
        place = _inspect(request)
        before = self._places.get(key)
        if before is not None and _spot(before) != _spot(place) and _stands(before):
            raise Conflict(
                "attach.taken", f"{key} is attached elsewhere on this host ({_where(before.attach)})",
                hint=f"retinue detach {request.name} --instance {request.instance}",
            )  # fmt: skip
        if before == place:
            return key
        self._save(self._places | {key: place})
        self._unwatch(key)
        self._watch_links()
        self._watch_groups()
        pid = _pid(request)
        if pid is not None:
            self._watch(key, pid)
        return key

    def detach(self, key: InstanceKey) -> Attach | None:
        """Take one away; None when it was not attached. Raises BadState."""
        place = self._places.get(key)
        if place is None:
            return None
        self._save({k: p for k, p in self._places.items() if k != key})
        self._unwatch(key)
        return place.attach

    def close(self) -> None:
        """Stop watching; the table stays on disk."""
        for key in list(self._watched):
            self._unwatch(key)
        if self._links is not None:
            self._links.close()
            self._links = None
        if self._groups is not None:
            self._groups.close()
            self._groups = None

    def _watch_links(self) -> None:
        if self._links is None and any(p.attach.kind == "tap" for p in self._places.values()):
            self._links = LinkWatch(self._link_ended, self._links_missed)
            self._links_missed()  # what went before it listened

    def _link_ended(self, index: int) -> None:
        for key in [k for k, p in self._places.items() if p.attach.kind == "tap" and p.inode == index]:
            self._ended(key)

    def _links_missed(self) -> None:
        for place in list(self._places.values()):
            if place.attach.kind == "tap" and place.inode is not None and taps.index_of(place.attach.device or "") != place.inode:
                self._link_ended(place.inode)

    def _watch_groups(self) -> None:
        paths = {p.attach.cgroup for p in self._places.values() if p.attach.cgroup is not None}
        self._follow_groups(paths | self._named.keys())
        self._seen = {path: units.ident_of(path) for path in paths}

    def _follow_groups(self, paths: Collection[str]) -> None:
        self._followed = frozenset(paths)
        try:
            if self._groups is None and paths:
                self._groups = units.GroupWatch(self._groups_changed)
        except OSError as e:
            log.warning("control groups are not watched; a unit that starts again has to be attached again", why=e.strerror)
        if self._groups is not None:
            self._groups.follow(sorted(paths))

    def _groups_changed(self) -> None:
        before, named = self._seen, self._named
        self._watch_groups()
        self._named = {path: units.named(path) for path in named}
        if self._seen != before or self._named != named:
            log.info("a control group of an attachment or a rule appeared, went or changed hands")
            self._changed()

    def _save(self, places: dict[InstanceKey, SavedPlace]) -> None:
        self._state.save_attachments([p for _, p in sorted(places.items())], self._boot)
        self._places = places

    def _watch(self, key: InstanceKey, pid: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            asyncio.get_running_loop().call_soon(self._ended, key)
            return
        self._unwatch(key)
        self._watched[key] = fd
        asyncio.get_running_loop().add_reader(fd, self._ended, key)

    def _unwatch(self, key: InstanceKey) -> None:
        fd = self._watched.pop(key, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def _ended(self, key: InstanceKey) -> None:
        log.info("the process or link of an attachment ended", instance=key)
        try:
            self.detach(key)
        except Exception as e:  # the disk: the table in memory still has to follow the world
            log.exception("cannot save attachments", why=str(e))
            self._places.pop(key, None)
            self._unwatch(key)
        self._changed()


def _pid(attach: Attach) -> int | None:
    match = _PROCESS.fullmatch(attach.netns or "")
    return int(match[1]) if match else None


def _where(attach: Attach) -> str:
    return attach.netns or attach.device or attach.cgroup or "the host itself"


def _spot(place: SavedPlace) -> tuple[str, int | None, str | None]:
    return place.attach.kind, place.inode, place.attach.cgroup


def _stands(place: SavedPlace) -> bool:
    """Is the place of an attachment still there? A namespace that was made again under its name is another one."""
    match place.attach.kind:
        case "tap":
            return taps.index_of(place.attach.device or "") == place.inode
        case "netns":
            with contextlib.suppress(RetinueError):
                return netns.identify(place.attach.netns or "") == place.inode
            return False
        case "unit":
            return units.ident_of(place.attach.cgroup or "") is not None
    return True


def _inspect(request: Attach) -> SavedPlace:
    """Look at the place asked for. Raises BadInput, NotFound, Refused."""
    if request.kind == "unit":
        if request.netns is not None or request.device is not None or not request.cgroup:
            raise BadInput("attach.kind", "an attachment of kind unit needs a control group, and nothing else")
        group = "/" + units.clean(request.cgroup)
        return SavedPlace(attach=request.model_copy(update={"cgroup": group}), inode=units.inspect(group))
    if request.cgroup is not None or request.uid is not None:
        raise BadInput("attach.kind", f"an attachment of kind {request.kind} has no control group and no user")
    if request.kind == "tap":
        if request.netns is not None or not request.device:
            raise BadInput("attach.kind", "an attachment of kind tap needs a device, and no network namespace")
        with ThreadPoolExecutor(1) as aside:  # netlink has a loop of its own
            return SavedPlace(attach=request, inode=aside.submit(taps.inspect, request.device).result())
    if request.device is not None:
        raise BadInput("attach.kind", f"an attachment of kind {request.kind} has no device")
    if request.kind == "host":
        if request.netns is not None:
            raise BadInput("attach.kind", "an attachment of kind host has no network namespace of its own")
        return SavedPlace(attach=request)
    if not request.netns:
        raise BadInput("attach.netns", "an attachment of kind netns needs a network namespace")
    pid = _pid(request)
    started = process_start(pid) if pid is not None else None
    inode = netns.foreign(request.netns)
    if pid is not None and (started is None or process_start(pid) != started):
        raise NotFound("attach.netns", f"process {pid} has ended")
    return SavedPlace(attach=request, inode=inode, started=started)
