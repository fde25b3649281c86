"""Scope: which signed objects an endpoint may see. Pure; kept up to date change by change.

An endpoint sees the bundle, the policy, its own endpoint record, the placements of what it holds, held or is about to
hold, and the placements and prepares of every instance that policy permits with one of its own, in either direction,
with the endpoint records of their holders.

Work is over label classes: two subjects that every selector of the program treats alike are one class, so a pair of
classes is decided once a policy. What an endpoint sees by policy depends only on the classes its instances may talk
with: endpoints for which those are equal share one `Shared` set, kept once; a `View` adds the few objects of the
endpoint's own. A change costs what it touches: the sets that show it, and the views of whose own it is a part.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from itertools import accumulate
from weakref import WeakSet, WeakValueDictionary

from identity.records import envelope_hash
from policy.classes import Classes
from policy.program import Program, Subject

BUNDLE = "bundle"
POLICY = "policy"
ENTRIES = "entries"
OLDER = -1  # stands among the classes of a set for endpoints that read only what the first release did

Before = dict[str, str | None]  # object key -> what was shown under it before a step


@dataclass(frozen=True, slots=True)
class EndpointFact:
    """What scope knows of an endpoint. `record` is None once it is revoked."""

    name: str
    record: str | None
    entries: str | None = None


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
        self._unions: dict[frozenset[int], frozenset[int]] = {}

    def of(self, subject: Subject) -> int:
        """The class of a subject; a new one is compared with the others here, once."""
        number = self._classes.put(subject)
        if number == len(self._near):
            near = {*self._classes.targets(number), *self._classes.sources(number)}
            self._near.append(near)
            for other in near:
                self._near[other].add(number)
            self._unions.clear()
        return number

    def near(self, number: int) -> Set[int]:
        """Classes that may talk with this one."""
        return self._near[number]

    def union(self, numbers: frozenset[int]) -> frozenset[int]:
        """Classes that may talk with any of these; the same object for the same question."""
        found = self._unions.get(numbers)
        if found is None:
            found = frozenset[int]().union(*(self._near[n] for n in numbers))
            self._unions[numbers] = found
        return found

    def __len__(self) -> int:
        return len(self._near)


class Lines:
    """The line of each object in the state hash (identity.records.state_hash), made once an envelope."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[str, bytes]] = {}

    def of(self, key: str, envelope: str) -> bytes:
        known, line = self._made.get(key, ("", b""))
        if known != envelope:
            line = f"{key}\0{envelope_hash(envelope)}\n".encode()
            self._made[key] = envelope, line
        return line


@dataclass(slots=True, eq=False, weakref_slot=True)
class Shared:
    """What every endpoint sees whose instances may talk with the classes `near`. Only World changes it."""

    near: frozenset[int]
    lines: Lines
    objects: dict[str, str] = field(default_factory=dict)
    shown: dict[str, frozenset[str]] = field(default_factory=dict)  # instance -> endpoints its records name
    refs: Counter[str] = field(default_factory=Counter)
    views: WeakSet[View] = field(default_factory=WeakSet)
    _order: list[str] = field(default_factory=list)  # keys, sorted
    _text: tuple[bytes, list[int]] | None = None  # all lines in order, and where each begins
    _hash: str | None = None
    _json: bytes | None = None

    def put(self, key: str, envelope: str | None, before: Before) -> None:
        """Show `envelope` under `key`, or nothing; what was there goes to `before`."""
        old = self.objects.get(key)
        if old == envelope:
            return
        before.setdefault(key, old)
        self._text = self._hash = self._json = None
        if envelope is None:
            del self.objects[key]
            del self._order[bisect_left(self._order, key)]
        else:
            if old is None:
                insort(self._order, key)
            self.objects[key] = envelope

    def hash(self, own: Mapping[str, str] | None = None) -> str:
        """The state hash of this set with objects of `own` that it has not: one pass over bytes, or none."""
        extra = sorted(key for key in own or () if key not in self.objects)
        if extra and own is not None:
            text, starts = self._lined()
            digest, at = hashlib.sha256(), 0
            for key in extra:
                upto = starts[bisect_left(self._order, key)]
                digest.update(memoryview(text)[at:upto])
                digest.update(self.lines.of(key, own[key]))
                at = upto
            digest.update(memoryview(text)[at:])
            return digest.hexdigest()
        if self._hash is None:
            self._hash = hashlib.sha256(self._lined()[0]).hexdigest()
        return self._hash

    def _lined(self) -> tuple[bytes, list[int]]:
        if self._text is None:
            lines = [self.lines.of(key, self.objects[key]) for key in self._order]
            self._text = b"".join(lines), [*accumulate(map(len, lines), initial=0)]
        return self._text

    def json(self) -> bytes:
        """The members of the JSON object of this set, without its braces; empty for an empty set."""
        if self._json is None:
            self._json = json.dumps(self.objects, separators=(",", ":")).encode()[1:-1]
        return self._json


@dataclass(slots=True, eq=False, weakref_slot=True)
class View:
    """What one endpoint sees: a shared set and objects of its `own`, which the shared set may have as well."""

    endpoint: str
    shared: Shared
    own: dict[str, str]

    @property
    def objects(self) -> dict[str, str]:
        """All of it, as a new dictionary."""
        return self.shared.objects | self.own

    def get(self, key: str) -> str | None:
        """The envelope under a key, None when the endpoint does not see it."""
        return self.own.get(key) or self.shared.objects.get(key)

    def extra(self) -> dict[str, str]:
        """Objects that are not in the shared set."""
        return {k: v for k, v in self.own.items() if k not in self.shared.objects}

    def __len__(self) -> int:
        return len(self.shared.objects) + sum(k not in self.shared.objects for k in self.own)

    def hash(self) -> str:
        """identity.records.state_hash(objects)."""
        return self.shared.hash(self.own)


@dataclass(slots=True)
class Touched:
    """What a batch of changes touched. `all` means that classes are new: every view is made anew."""

    all: bool = False
    views: set[str] = field(default_factory=set)  # endpoints whose own objects or classes may be different
    instances: set[str] = field(default_factory=set)
    endpoints: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)  # bundle, policy

    def merge(self, other: Touched) -> None:
        self.all = self.all or other.all
        self.views |= other.views
        self.instances |= other.instances
        self.endpoints |= other.endpoints
        self.keys |= other.keys


@dataclass(slots=True)
class Outcome:
    """Object keys that changed, by view; views with equal changes mostly share one set. `failed` are out of step."""

    changed: dict[View, frozenset[str]] = field(default_factory=dict)
    failed: dict[View, Exception] = field(default_factory=dict)


@dataclass(slots=True)
class _Step:
    """One update: what shared sets showed before it, and the differences between old and new sets, each found once."""

    before: dict[Shared, Before] = field(default_factory=dict)
    failed: dict[Shared, Exception] = field(default_factory=dict)
    _differ: dict[tuple[Shared, Shared], frozenset[str]] = field(default_factory=dict)

    def was(self, shared: Shared, key: str) -> str | None:
        before = self.before.get(shared)
        return before[key] if before is not None and key in before else shared.objects.get(key)

    def differ(self, old: Shared, new: Shared) -> frozenset[str]:
        """Keys under which `old` before the step and `new` after it differ."""
        found = self._differ.get((old, new))
        if found is None:
            before = self.before.get(old, {})
            if old is new:
                keys = {k for k, v in before.items() if v != new.objects.get(k)}
            else:
                was = old.objects if not before else {**old.objects, **before}
                keys = {k for k in was.keys() | new.objects.keys() if was.get(k) != new.objects.get(k)}
            found = self._differ[old, new] = frozenset(keys)
        return found


class World:
    """All facts of one trust domain, indexed for scope. Setters say what a change touches; `update` then follows it."""

    def __init__(self) -> None:
        self.endpoints: dict[str, EndpointFact] = {}
        self.instances: dict[str, InstanceFact] = {}
        self.bundle: str | None = None
        self.older: set[str] = set()  # endpoints that read only what the first release did
        self.plain: Callable[[str], str] = str  # the bundle as they read it
        self.policy: str | None = None
        self.foreign: dict[str, str] = {}  # object key -> bundle of another trust domain; every endpoint has them all
        self.program: Program | None = None
        self._classes = Near(None)
        self._lines = Lines()
        self._members: dict[int, set[str]] = defaultdict(set)  # class -> instances
        self._hosts: dict[int, Counter[str]] = defaultdict(
            Counter
        )  # class -> endpoints with an instance of it
        self._holds: dict[str, set[str]] = defaultdict(
            set
        )  # endpoint -> instances it holds, held, is about to hold
        self._class_of: dict[str, int] = {}
        self._views: dict[str, WeakSet[View]] = defaultdict(WeakSet)
        self._shared: WeakValueDictionary[frozenset[int], Shared] = WeakValueDictionary()
        self._showing: dict[int, WeakSet[Shared]] = defaultdict(WeakSet)  # class -> sets that show it

    # ---- facts

    def set_bundle(self, envelope: str) -> Touched:
        self.bundle = envelope
        return Touched(keys={BUNDLE})

    def _bundle_in(self, near: frozenset[int]) -> str | None:
        return self.plain(self.bundle) if OLDER in near and self.bundle is not None else self.bundle

    def set_foreign(self, trust_domain: str, envelope: str | None) -> Touched:
        """Another trust domain's bundle; None: it is known no more."""
        key = f"federation/{trust_domain}"
        if envelope is None:
            self.foreign.pop(key, None)
        else:
            self.foreign[key] = envelope
        return Touched(keys={key})

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
        self._forget_shared()
        return Touched(all=True)

    def _forget_shared(self) -> None:
        """Views keep the sets they have until their next update."""
        self._shared = WeakValueDictionary()
        self._showing.clear()

    def set_endpoint(self, fact: EndpointFact) -> Touched:
        self.endpoints[fact.name] = fact
        # Whoever holds an instance together with it (a move) shows its record as an own object.
        beside = {e for key in self._holds.get(fact.name, ()) for e in self.instances[key].here}
        return Touched(endpoints={fact.name}, views={fact.name, *beside})

    def set_instance(self, fact: InstanceFact) -> Touched:
        old = self.instances.get(fact.key)
        if old is not None and old.subject != fact.subject:
            # Another set of labels is another class: rare, so everything is sorted anew.
            self.instances[fact.key] = fact
            for endpoint in old.here | old.former:
                self._holds[endpoint].discard(old.key)
            return self._reclass(self.program)
        known = len(self._classes)
        number = self._classes.of(fact.subject)
        out = Touched(instances={fact.key}, views={*fact.here, *fact.former})
        if old is not None:
            out.views |= old.here | old.former
            self._unindex(old)
        self.instances[fact.key] = fact
        self._class_of[fact.key] = number
        self._index(fact, number)
        if self.program is not None and fact.subject.name in self.program.ends:
            out.all = True
        if number >= known:  # a new class: whoever may talk with it may talk with more than before
            out.views |= self.audience(fact.key)
        return out

    def _index(self, fact: InstanceFact, number: int) -> None:
        self._members[number].add(fact.key)
        for endpoint in fact.here | fact.former:
            self._holds[endpoint].add(fact.key)
        if not fact.revoked:
            for endpoint in fact.here:
                self._hosts[number][endpoint] += 1

    def _unindex(self, fact: InstanceFact) -> None:
        number = self._class_of[fact.key]
        self._members[number].discard(fact.key)
        for endpoint in fact.here | fact.former:
            self._holds[endpoint].discard(fact.key)
        if not fact.revoked:
            for endpoint in fact.here:
                self._hosts[number][endpoint] -= 1
                if self._hosts[number][endpoint] <= 0:
                    del self._hosts[number][endpoint]

    def audience(self, key: str) -> set[str]:
        """Endpoints that may see an instance; empty for an unknown one."""
        fact = self.instances.get(key)
        if fact is None:
            return set()
        out = set(fact.here | fact.former)
        for near in self._classes.near(self._class_of[key]):
            out.update(self._hosts[near])
        return out

    # ---- shared sets

    def _shared_for(self, endpoint: str) -> Shared:
        mine = (self.instances[key] for key in self._holds.get(endpoint, ()))
        classes = frozenset(self._class_of[f.key] for f in mine if endpoint in f.here and not f.revoked)
        near = self._classes.union(classes)
        if endpoint in self.older:
            near |= {OLDER}
        found = self._shared.get(near)
        if found is None:
            found = Shared(near, self._lines)
            before: Before = {}
            found.put(BUNDLE, self._bundle_in(near), before)
            found.put(POLICY, self.policy, before)
            for key, envelope in self.foreign.items():
                found.put(key, envelope, before)
            for number in near:
                for key in self._members[number]:
                    self._show(found, key, before)
            ends = self.program.ends if self.program is not None else frozenset[str]()
            for key, fact in self.instances.items() if ends else ():
                # A grant ends with this workload: every host has to know whether it runs, and nothing else of it.
                if fact.subject.name in ends and fact.placement is not None:
                    found.put(f"placement/{key}", fact.placement, before)
            self._shared[near] = found
            for number in near:
                self._showing[number].add(found)
        return found

    def _show(self, shared: Shared, key: str, before: Before) -> None:
        fact = self.instances[key]
        shared.put(f"placement/{key}", fact.placement, before)
        shared.put(f"prepare/{key}", fact.prepare, before)
        was, now = shared.shown.get(key, frozenset()), fact.here
        shared.shown[key] = now
        for name in now - was:
            shared.refs[name] += 1
            self._show_endpoint(shared, name, before)
        for name in was - now:
            shared.refs[name] -= 1
            if shared.refs[name] <= 0:
                del shared.refs[name]
                self._show_endpoint(shared, name, before)

    def _show_endpoint(self, shared: Shared, name: str, before: Before) -> None:
        record = self._record(name) if shared.refs[name] > 0 else None
        shared.put(f"endpoint/{name}", record, before)

    def _record(self, name: str) -> str | None:
        fact = self.endpoints.get(name)
        return None if fact is None else fact.record

    def _own(self, endpoint: str) -> dict[str, str]:
        """The objects an endpoint sees whatever policy says."""
        fact_of_it = self.endpoints.get(endpoint)
        out = {
            f"endpoint/{endpoint}": self._record(endpoint), ENTRIES: fact_of_it.entries if fact_of_it is not None else None
        }  # fmt: skip
        if endpoint in self.older:
            out[ENTRIES] = None
        for key in self._holds[endpoint]:
            fact = self.instances[key]
            out[f"placement/{key}"] = fact.placement
            if endpoint in fact.here:  # a former holder learns that it is no longer the one, and nothing else
                out[f"prepare/{key}"] = fact.prepare
                for name in fact.here:
                    out[f"endpoint/{name}"] = self._record(name)
        return {k: v for k, v in out.items() if v is not None}

    # ---- views

    def view(self, endpoint: str) -> View:
        """The whole scope of one endpoint; `update` keeps it in step for as long as it is referenced."""
        view = View(endpoint, self._shared_for(endpoint), self._own(endpoint))
        view.shared.views.add(view)
        self._views[endpoint].add(view)
        return view

    def update(self, touched: Touched) -> Outcome:
        """Bring every view up to date. A view that cannot be is in `failed` and must be made anew."""
        step, views = _Step(), set[View]()
        if touched.all:
            self._forget_shared()
            views.update(*self._views.values())
        else:
            for shared in self._showing_any(touched):
                try:
                    step.before[shared] = self._refresh(shared, touched)
                except Exception as e:
                    step.failed[shared] = e
                    self._discard(shared)
                views.update(shared.views)
            for name in touched.views:
                views.update(self._views.get(name, ()))
        out = Outcome()
        for view in views:
            try:
                if view.shared in step.failed:
                    raise step.failed[view.shared]
                renew = touched.all or view.endpoint in touched.views
                changed = self._follow(view, step, renew=renew)
            except Exception as e:
                out.failed[view] = e
            else:
                if changed:
                    out.changed[view] = changed
        return out

    def _showing_any(self, touched: Touched) -> Iterable[Shared]:
        if touched.keys:
            return list(self._shared.values())
        numbers = {self._class_of[key] for key in touched.instances}
        for name in touched.endpoints:
            numbers |= {self._class_of[key] for key in self._holds.get(name, ())}
        return {shared for number in numbers for shared in self._showing.get(number, ())}

    def _refresh(self, shared: Shared, touched: Touched) -> Before:
        before: Before = {}
        for key in touched.keys:
            shared.put(key, {BUNDLE: self._bundle_in(shared.near), POLICY: self.policy}.get(key, self.foreign.get(key)), before)
        for name in touched.endpoints:
            if shared.refs[name] > 0:
                self._show_endpoint(shared, name, before)
        for key in touched.instances:
            if self._class_of[key] in shared.near:
                self._show(shared, key, before)
        return before

    def _discard(self, shared: Shared) -> None:
        """A set that was left half-way is used for no further view."""
        if self._shared.get(shared.near) is shared:
            del self._shared[shared.near]
        for number in shared.near:
            self._showing[number].discard(shared)

    def _follow(self, view: View, step: _Step, *, renew: bool) -> frozenset[str]:
        old, old_own = view.shared, view.own
        if renew:
            new, new_own = self._shared_for(view.endpoint), self._own(view.endpoint)
            if new is not old:
                old.views.discard(view)
                new.views.add(view)
            view.shared, view.own = new, new_own
        new, new_own = view.shared, view.own
        changed = step.differ(old, new)
        # For the few keys of its own, what the shared sets showed does not decide.
        aside = {
            key
            for key in old_own.keys() | new_own.keys()
            if ((old_own.get(key) or step.was(old, key)) != view.get(key)) != (key in changed)
        }
        return changed ^ aside if aside else changed
