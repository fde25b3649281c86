"""The registry against a model of dictionaries: whatever happens in whatever order, one holder, growing epochs, no reuse."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from ca.store import Store
from identity.errors import Conflict, NotFound, Refused, RetinueError

HOSTS = st.sampled_from(["a", "b", "c"])
NAMES = st.sampled_from(["web", "api"])


class Machine(RuleBasedStateMachine):
    """`hosts`: name -> tunnel key of the living; `seats`: (name, instance) -> [state, holder, epoch, top, target]."""

    make_bench = None  # set by the test: a fixture's factory
    tokens = Bundle("tokens")
    moves = Bundle("moves")

    def __init__(self) -> None:
        super().__init__()
        self._dir = tempfile.TemporaryDirectory()
        self.bench = type(self).make_bench(Store.create(Path(self._dir.name) / "ca.db", "reg.test"))
        self.hosts: dict[str, str] = {}
        self.ever: set[str] = set()
        self.spent: set[str] = set()
        self.seats: dict[tuple[str, int], dict] = {}
        self.overlays: dict[int, tuple[str, int]] = {}
        self.signed: dict[
            tuple[str, int, int, str], str
        ] = {}  # (.., epoch, kind) -> the one record that may have it

    def teardown(self) -> None:
        self.bench.store.close()
        self._dir.cleanup()

    def fails(self, call, *kinds) -> None:
        try:
            call()
        except kinds:
            return
        raise AssertionError("this had to be refused")

    @initialize()
    def one_host(self) -> None:
        row = self.bench.enrol("a")
        self.hosts["a"] = row.tunnel_key
        self.ever.add("a")

    # ---- tokens and hosts

    @rule(target=tokens, host=HOSTS, replace=st.booleans())
    def make_token(self, host, replace):
        if host in self.hosts and not replace:
            self.fails(lambda: self.bench.token(host), Conflict)
            return ("none", host, False)
        return (self.bench.token(host, replace=replace), host, replace)

    @rule(token=tokens)
    def use_token(self, token):
        token_id, host, replace = token
        if token_id in self.spent or token_id == "none" or (host in self.hosts and not replace):
            self.fails(lambda: self.bench.use(token_id), RetinueError)
            return
        row = self.bench.use(token_id)
        self.spent.add(token_id)
        self.ever.add(host)
        self.hosts[host] = row.tunnel_key
        for seat in self.seats.values():
            if seat["holder"] == host:
                seat["top"] += 1
                seat.update(state="active", epoch=seat["top"], target=None)

    @rule(host=HOSTS)
    def revoke_host(self, host):
        if host not in self.ever:
            self.fails(lambda: self.bench.registry.revoke(host, self.bench.now, "t"), NotFound)
            return
        self.bench.registry.revoke(host, self.bench.now, "t")
        self.hosts.pop(host, None)
        for seat in self.seats.values():
            if seat["holder"] == host:
                seat["top"] += 1
                seat.update(state="unplaced", holder=None, epoch=seat["top"], target=None)
            elif seat["target"] == host:
                seat.update(state="active" if seat["holder"] else "unplaced", target=None)

    # ---- instances

    @rule(name=NAMES, host=st.none() | HOSTS, replica=st.booleans())
    def add(self, name, host, replica):
        known = [i for n, i in self.seats if n == name]
        if (known and not replica) or (host is not None and host not in self.hosts):
            self.fails(lambda: self.bench.add(name, host, replica=replica), Conflict, NotFound, Refused)
            return
        row = self.bench.add(name, host, replica=replica)
        placed = 1 if host else 0
        key = (name, max(known, default=-1) + 1)
        assert (row.name, row.instance) == key
        assert row.overlay not in self.overlays
        self.overlays[row.overlay] = key
        self.seats[key] = {
            "state": "active" if host else "unplaced",
            "holder": host,
            "epoch": placed,
            "top": placed,
            "target": None,
        }

    @rule(name=NAMES, instance=st.integers(0, 3))
    def revoke(self, name, instance):
        seat = self.seats.get((name, instance))
        if seat is None:
            self.fails(lambda: self.bench.placements.revoke(name, instance, self.bench.now, "t"), NotFound)
            return
        self.bench.placements.revoke(name, instance, self.bench.now, "t")
        if seat["state"] != "revoked":
            if seat["holder"]:
                seat["top"] += 1
                seat["epoch"] = seat["top"]
            seat.update(state="revoked", holder=None, target=None)

    # ---- moves

    @rule(target=moves, name=NAMES, instance=st.integers(0, 2), to=HOSTS)
    def prepare(self, name, instance, to):
        seat = self.seats.get((name, instance))

        def call():
            return self.bench.placements.prepare(name, instance, to, self.bench.now, "t")

        if (
            seat is None
            or to not in self.hosts
            or seat["state"] in {"moving", "revoked"}
            or seat["holder"] == to
        ):
            self.fails(call, NotFound, Refused, Conflict)
            return None
        move = call()
        seat["top"] += 1
        seat.update(state="moving", target=to)
        return (move, dict(seat))

    @rule(move=moves, commit=st.booleans())
    def finish(self, move, commit):
        if move is None:
            return
        prepared, then = move
        key = (prepared.instance.name, prepared.instance.instance)
        seat = self.seats[key]

        def call():
            if commit:
                return self.bench.placements.commit(prepared, self.bench.now, "t")
            return self.bench.placements.abort(prepared, self.bench.now, "t", "test")

        if seat != then:
            self.fails(call, Conflict, Refused)
            return
        call()
        if commit:
            seat.update(state="active", holder=seat["target"], epoch=seat["top"], target=None)
        else:
            seat.update(state="active" if seat["holder"] else "unplaced", target=None)

    @rule(move=consumes(moves))
    def forget(self, move):
        """A mover that died: its move stays open."""

    @rule()
    def restart(self):
        self.bench.placements.abort_left(self.bench.now)
        for seat in self.seats.values():
            if seat["state"] == "moving":
                seat.update(state="active" if seat["holder"] else "unplaced", target=None)

    # ---- what must hold

    @invariant()
    def the_store_says_the_same(self):
        rows = {(r.name, r.instance): r for r in self.bench.placements.all()}
        assert {
            k: {
                "state": r.state,
                "holder": r.endpoint,
                "epoch": r.epoch,
                "top": r.epoch_top,
                "target": r.target,
            }
            for k, r in rows.items()
        } == self.seats
        assert {
            h.name: h.tunnel_key for h in self.bench.registry.all() if h.state == "enrolled"
        } == self.hosts

    @invariant()
    def records_say_what_the_rows_say(self):
        for row in self.bench.placements.all():
            for kind, envelope in (("active", row.placement), ("prepare", row.prepare)):
                if envelope is None:
                    continue
                record = self.bench.placement(envelope)
                slot = (row.name, row.instance, record.epoch, kind)
                assert self.signed.setdefault(slot, envelope) == envelope  # no epoch is signed twice
                assert record.epoch <= row.epoch_top
            if row.placement is not None:
                record = self.bench.placement(row.placement)
                held = row.endpoint is not None
                assert record.epoch == row.epoch
                assert record.state == ("active" if held else "revoked")
                if held:
                    assert record.endpoint == row.endpoint
                    assert record.tunnel_key == self.hosts[row.endpoint]
                assert self.overlays[row.overlay] == (row.name, row.instance)


def test_registry_machine(make_desk) -> None:
    Machine.make_bench = staticmethod(make_desk)
    Machine.TestCase.settings = settings(
        max_examples=25, stateful_step_count=30, deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    Machine.TestCase().runTest()
