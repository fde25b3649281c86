"""Scope: which signed objects an endpoint may see. Pure; kept up to date change by change.

An endpoint sees the bundle, the policy, its own endpoint record, the placements of what it holds, held or is about to
hold, and the placements and prepares of every instance that policy permits with one of its own, in either direction,
with the endpoint records of their holders.

Work is over label classes: two subjects that every selector of the program treats alike are one class, so a pair of
classes is decided once a policy. A change of one instance touches only the endpoints that can see it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from identity.records import envelope_hash
from policy.classes import Classes
from policy.program import Program, Subject

BUNDLE = "bundle"
POLICY = "policy"


@dataclass(frozen=True, slots=True)
class EndpointFact:
    """What scope knows of an endpoint. `record` is None once it is revoked."""

    name: str
    record: str | None


@dataclass(frozen=True, slots=True)
class InstanceFact:
    """What scope knows of an instance: `holder` and `target` of a prepared move, `former` holders, its envelopes."""

    key: str
    subject: Subject
    revoked: bool
    holder: str | None
    target: str | None
    former: frozenset[str]
    placement: str | None
    prepare: str | None

    @property
    def here(self) -> frozenset[str]:
        """Endpoints whose scope follows from this instance being (about to be) theirs."""
        return frozenset(e for e in (self.holder, self.target) if e is not None)


class Near:
    """Which label classes of one program may talk, in either direction; decided once a pair of classes."""

    def __init__(self, program: Program | None) -> None:
        self._classes = Classes(program or Program(()))
        self._near: list[set[int]] = []

    def of(self, subject: Subject) -> int:
        """The class of a subject; a new one is compared with the others here, once."""
        number = self._classes.put(subject)
        if number == len(self._near):
            near = {*self._classes.targets(number), *self._classes.sources(number)}
            self._near.append(near)
            for other in near:
                self._near[other].add(number)
        return number

    def near(self, number: int) -> Set[int]:
        """Classes that may talk with this one."""
        return self._near[number]

    def __len__(self) -> int:
        return len(self._near)


@dataclass(slots=True)
class View:
    """What one endpoint sees. Only World changes it."""

    endpoint: str
    objects: dict[str, str] = field(default_factory=dict)
    shown: dict[str, frozenset[str]] = field(default_factory=dict)  # instance -> endpoints its records name
    refs: Counter[str] = field(default_factory=Counter)
    lines: dict[str, bytes] = field(default_factory=dict)

    def hash(self) -> str:
        """identity.records.state_hash(objects), each envelope hashed once."""
        digest = hashlib.sha256()
        for key in sorted(self.lines):
            digest.update(self.lines[key])
        return digest.hexdigest()


@dataclass(slots=True)
class Touched:
    """What a batch of changes touched. `all` means that every view is to be made anew."""

    all: bool = False
    views: set[str] = field(default_factory=set)  # endpoints whose own instances changed
    instances: dict[str, set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )  # instance -> who may see it
    endpoints: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)  # bundle, policy

    def merge(self, other: Touched) -> None:
        self.all = self.all or other.all
        self.views |= other.views
        self.endpoints |= other.endpoints
        self.keys |= other.keys
        for key, seen in other.instances.items():
            self.instances[key] |= seen


class World:
    """All facts of one trust domain, indexed for scope. Setters say whom a change touches."""

    def __init__(self) -> None:
        self.endpoints: dict[str, EndpointFact] = {}
        self.instances: dict[str, InstanceFact] = {}
        self.bundle: str | None = None
        self.policy: str | None = None
        self.program: Program | None = None
        self._classes = Near(None)
        self._members: dict[int, set[str]] = defaultdict(set)  # class -> instances
        self._hosts: dict[int, Counter[str]] = defaultdict(
            Counter
        )  # class -> endpoints with an instance of it
        self._own: dict[str, set[str]] = defaultdict(
            set
        )  # endpoint -> instances it holds, held, is about to hold
        self._class_of: dict[str, int] = {}
        self._lines: dict[str, tuple[str, bytes]] = {}  # object key -> its newest envelope and line

    # ---- facts

    def set_bundle(self, envelope: str) -> Touched:
        self.bundle = envelope
        return Touched(keys={BUNDLE})

    def set_policy(self, envelope: str, program: Program) -> Touched:
        """Classes are made for the new program first: when that fails, the old policy stays in force here."""
        touched = self._reclass(program)
        self.policy = envelope
        return touched

    def _reclass(self, program: Program | None) -> Touched:
        classes = Near(program)
        numbers = {key: classes.of(fact.subject) for key, fact in self.instances.items()}
        self.program, self._classes, self._class_of = program, classes, numbers
        self._members.clear()
        self._hosts.clear()
        for key, fact in self.instances.items():
            self._index(fact, numbers[key])
        return Touched(all=True)

    def set_endpoint(self, fact: EndpointFact) -> Touched:
        self.endpoints[fact.name] = fact
        return Touched(endpoints={fact.name})

    def set_instance(self, fact: InstanceFact) -> Touched:
        old = self.instances.get(fact.key)
        if old is not None and old.subject != fact.subject:
            # Another set of labels is another class: rare, so everything is sorted anew.
            self.instances[fact.key] = fact
            self._own_reindex(old, fact)
            return self._reclass(self.program)
        number = self._classes.of(fact.subject)
        out = Touched()
        if old is not None:
            out.instances[fact.key] |= self._audience(old)
            out.views |= self._own_changed(old, fact)
            self._unindex(old)
        else:
            out.views |= fact.here
        self.instances[fact.key] = fact
        self._class_of[fact.key] = number
        self._index(fact, number)
        out.instances[fact.key] |= self._audience(fact)
        return out

    def _own_reindex(self, old: InstanceFact, new: InstanceFact) -> None:
        for endpoint in old.here | old.former:
            self._own[endpoint].discard(old.key)
        for endpoint in new.here | new.former:
            self._own[endpoint].add(new.key)

    @staticmethod
    def _own_changed(old: InstanceFact, new: InstanceFact) -> frozenset[str]:
        return old.here ^ new.here if old.revoked == new.revoked else old.here | new.here

    def _index(self, fact: InstanceFact, number: int) -> None:
        self._members[number].add(fact.key)
        for endpoint in fact.here | fact.former:
            self._own[endpoint].add(fact.key)
        if not fact.revoked:
            for endpoint in fact.here:
                self._hosts[number][endpoint] += 1

    def _unindex(self, fact: InstanceFact) -> None:
        number = self._class_of[fact.key]
        self._members[number].discard(fact.key)
        for endpoint in fact.here | fact.former:
            self._own[endpoint].discard(fact.key)
        if not fact.revoked:
            for endpoint in fact.here:
                self._hosts[number][endpoint] -= 1
                if self._hosts[number][endpoint] <= 0:
                    del self._hosts[number][endpoint]

    def _audience(self, fact: InstanceFact) -> set[str]:
        out = set(fact.here | fact.former)
        for near in self._classes.near(self._class_of[fact.key]):
            out.update(self._hosts[near])
        return out

    def audience(self, key: str) -> set[str]:
        """Endpoints that may see an instance; empty for an unknown one."""
        fact = self.instances.get(key)
        return set() if fact is None else self._audience(fact)

    # ---- views

    def view(self, endpoint: str) -> View:
        """The whole scope of one endpoint."""
        view = View(endpoint)
        self._put(view, BUNDLE, self.bundle)
        self._put(view, POLICY, self.policy)
        self._show_endpoint(view, endpoint)
        for key in self._visible(endpoint):
            self._show(view, key, True)
        return view

    def _visible(self, endpoint: str) -> Iterable[str]:
        near: set[int] = set()
        for key in self._own[endpoint]:
            fact = self.instances[key]
            if endpoint in fact.here and not fact.revoked:
                near |= self._classes.near(self._class_of[key])
        return set(self._own[endpoint]).union(*(self._members[number] for number in near))

    def update(self, view: View, touched: Touched) -> set[str]:
        """Bring a view up to date and return the object keys that changed in it."""
        if touched.all or view.endpoint in touched.views:
            return self._replace(view)
        changed: set[str] = set()
        for key in touched.keys:
            changed |= self._put(view, key, self.bundle if key == BUNDLE else self.policy)
        for name in touched.endpoints:
            if name == view.endpoint or view.refs[name] > 0:
                changed |= self._show_endpoint(view, name)
        for key, seen in touched.instances.items():
            if view.endpoint in seen:
                changed |= self._show(view, key, view.endpoint in self.audience(key))
        return changed

    def _replace(self, view: View) -> set[str]:
        new, old = self.view(view.endpoint), view.objects
        changed = {k for k in old.keys() | new.objects.keys() if old.get(k) != new.objects.get(k)}
        view.objects, view.shown, view.refs, view.lines = new.objects, new.shown, new.refs, new.lines
        return changed

    def _show(self, view: View, key: str, visible: bool) -> set[str]:
        fact = self.instances[key]
        own = view.endpoint in fact.here
        # A former holder learns that it is no longer the one, and nothing else.
        permitted_here = visible and (
            own or view.endpoint not in fact.former or self._near(view.endpoint, key)
        )
        changed = self._put(view, f"placement/{key}", fact.placement if visible else None)
        changed |= self._put(view, f"prepare/{key}", fact.prepare if permitted_here else None)
        before, after = view.shown.get(key, frozenset()), fact.here if permitted_here else frozenset()
        view.shown[key] = after
        if not after:
            del view.shown[key]
        for name in after - before:
            view.refs[name] += 1
            changed |= self._show_endpoint(view, name)
        for name in before - after:
            view.refs[name] -= 1
            if view.refs[name] <= 0:
                del view.refs[name]
                changed |= self._show_endpoint(view, name)
        return changed

    def _near(self, endpoint: str, key: str) -> bool:
        return any(self._hosts[n][endpoint] > 0 for n in self._classes.near(self._class_of[key]))

    def _show_endpoint(self, view: View, name: str) -> set[str]:
        fact = self.endpoints.get(name)
        wanted = fact is not None and (name == view.endpoint or view.refs[name] > 0)
        return self._put(view, f"endpoint/{name}", fact.record if wanted and fact is not None else None)

    def _put(self, view: View, key: str, envelope: str | None) -> set[str]:
        if view.objects.get(key) == envelope:
            return set()
        if envelope is None:
            del view.objects[key], view.lines[key]
        else:
            view.objects[key] = envelope
            view.lines[key] = self._line(key, envelope)
        return {key}

    def _line(self, key: str, envelope: str) -> bytes:
        known, line = self._lines.get(key, ("", b""))
        if known != envelope:
            line = f"{key}\0{envelope_hash(envelope)}\n".encode()
            self._lines[key] = envelope, line
        return line
