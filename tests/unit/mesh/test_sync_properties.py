"""Whatever arrives, in whatever order: nothing unsigned is in force, epochs never go back, and honesty heals."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from identity.records import state_hash
from identity.wire import feed
from mesh.sync import Accepted, FrameRefused

NOW = 2_000_000_000.0
NAMES = ("web", "api", "db")
HOSTS = ("host-a", "host-b", "host-c")

placements = st.tuples(st.sampled_from(NAMES), st.sampled_from(HOSTS), st.integers(1, 4))
changes = st.fixed_dictionaries(
    {
        "put": st.lists(placements, max_size=2),
        "remove": st.lists(
            st.sampled_from([f"placement/{n}/0" for n in NAMES] + ["policy", "bundle"]), max_size=1
        ),
        "policy": st.none() | st.integers(0, 3),
        "step": st.integers(-1, 3),
        "from": st.integers(-1, 1),
        "beat": st.integers(-2, 3),
        "kind": st.sampled_from(["delta", "delta", "delta", "snapshot", "beat"]),
        "timeline": st.sampled_from(["t1", "t1", "t1", "t2"]),
        "damage": st.sampled_from(["", "", "", "hash", "signature", "cut", "swap"]),
        "replay": st.none() | st.integers(0, 20),
    }
)


class Sender:
    """A sender that may do anything but forge: it holds signed records and mixes them as told."""

    def __init__(self, ca) -> None:
        self.ca = ca
        self.cache: dict[object, str] = {}
        self.objects = {
            "bundle": ca.trust.envelope,
            "policy": self.of("policy", 1),
            "endpoint/host-a": self.of("endpoint", "host-a"),
        }
        self.sent: list[bytes] = []
        self.revision, self.time = 1, int(NOW)

    def of(self, kind: str, *what) -> str:
        if (kind, *what) not in self.cache:
            match kind:
                case "policy":
                    made = self.ca.policy(what[0])
                case "endpoint":
                    made = self.ca.endpoint(what[0])
                case "placement":
                    name, host, epoch = what
                    made = self.ca.placement(name, host, epoch, index=NAMES.index(name) + 1)
                case _:
                    made = self.ca.heartbeat(revision=what[1], time=what[2], timeline=what[0])
            self.cache[(kind, *what)] = made
        return self.cache[(kind, *what)]

    def frame(self, c: dict) -> bytes:
        if c["replay"] is not None and c["replay"] < len(self.sent):
            return self.sent[c["replay"]]
        before = self.revision
        self.revision = max(0, self.revision + c["step"])
        self.time += c["beat"]
        upserts = {f"placement/{n}/0": self.of("placement", n, h, e) for n, h, e in c["put"]}
        if c["policy"] is not None:
            upserts["policy"] = self.of("policy", c["policy"])
        if c["damage"] == "signature":
            upserts = {k: v[:-4] + ("AAAA" if v[-4:] != "AAAA" else "BBBB") for k, v in upserts.items()}
        elif c["damage"] == "swap" and len(upserts) > 1:
            upserts = dict(zip(upserts, reversed(upserts.values()), strict=True))
        removes = [k for k in c["remove"] if k not in upserts]
        self.objects = {k: v for k, v in self.objects.items() if k not in removes} | upserts
        heartbeat = self.of("heartbeat", c["timeline"], self.revision, self.time)
        stated = "0" * 64 if c["damage"] == "hash" else state_hash(self.objects)
        match c["kind"]:
            case "beat":
                made = feed.Beat(heartbeat=heartbeat)
            case "snapshot":
                made = feed.Snapshot(
                    timeline=c["timeline"], revision=self.revision, objects=self.objects, hash=stated, heartbeat=heartbeat
                )  # fmt: skip
            case _:
                made = feed.Delta(
                    timeline=c["timeline"], from_revision=before + c["from"], revision=self.revision, upserts=upserts,
                    removes=removes, hash=stated, heartbeat=heartbeat,
                )  # fmt: skip
        line = made.model_dump_json().encode()
        line = line[: len(line) // 2] if c["damage"] == "cut" else line
        self.sent.append(line)
        return line

    def honest(self) -> bytes:
        """A complete snapshot, newer than everything sent."""
        self.revision, self.time = self.revision + 1000, self.time + 1000
        objects = {
            "bundle": self.ca.trust.envelope, "policy": self.of("policy", 9), "endpoint/host-a": self.of("endpoint", "host-a"),
        } | {f"placement/{n}/0": self.of("placement", n, "host-b", 9) for n in NAMES}  # fmt: skip
        beat = self.of("heartbeat", "t9", self.revision, self.time)
        made = feed.Snapshot(
            timeline="t9", revision=self.revision, objects=objects, hash=state_hash(objects), heartbeat=beat
        )
        self.objects = objects
        return made.model_dump_json().encode()


@given(st.lists(changes, max_size=25), st.booleans())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_never_widens_never_forgets_and_heals(ca, script, restart):
    sender = Sender(ca)
    machine = ca.machine()
    epochs: dict[str, int] = {}
    policy = 0
    for number, change in enumerate(script):
        before, position = machine.objects, machine.position
        events = machine.receive(sender.frame(change), wall=NOW, mono=float(number))
        if any(isinstance(e, FrameRefused) for e in events):
            assert machine.objects == before
            assert machine.position == position
        if not any(isinstance(e, Accepted) for e in events):
            assert machine.objects == before
        for held in machine.objects.values():
            assert held in sender.cache.values() or held == ca.trust.envelope
        for key, mark in machine.marks.items():
            assert mark.number >= epochs.get(key, 0)
            epochs[key] = mark.number
        for key, placement in machine.view(float(number)).snapshot.placements.items():
            assert placement.epoch == epochs[key]
        if machine.policy_mark is not None:
            assert machine.policy_mark.number >= policy
            policy = machine.policy_mark.number
        if position and machine.position and machine.position.timeline == position.timeline:
            assert machine.position.revision >= position.revision
    assert epochs.keys() == machine.marks.keys()
    if restart and machine.position and machine.heartbeat:
        fresh = ca.machine(marks=machine.marks, policy_mark=machine.policy_mark)
        fresh.restore(
            machine.objects,
            machine.position,
            machine.proof.envelope,
            machine.heartbeat.envelope,
            heard=machine.heard, wall=NOW, mono=99.0, stored_hash=machine.received_hash,
        )  # fmt: skip
        assert fresh.objects == machine.objects
        assert fresh.marks == machine.marks
        machine = fresh
    machine.receive(sender.honest(), wall=NOW + 2000, mono=100.0)
    assert machine.objects == sender.objects
    assert machine.refused == {}


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_never_raises_and_never_changes(ca, line):
    machine = ca.machine()
    machine.receive(ca.snapshot(), wall=NOW, mono=0.0)
    before = machine.objects
    assert machine.receive(line, wall=NOW, mono=1.0)
    assert machine.objects == before


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_never_puts_anything_new_in_force(ca, data):
    """Positive control: the untouched line is accepted and does change the state."""
    ca = ca.copy()
    machine = ca.machine()
    machine.receive(ca.snapshot(), wall=NOW, mono=0.0)
    before = machine.objects
    wanted = ca.placement("web", "host-b", 2)
    line = bytearray(ca.delta({"placement/web/0": wanted}))
    where = data.draw(st.integers(0, len(line) - 1))
    line[where] ^= 1 << data.draw(st.integers(0, 7))
    machine.receive(bytes(line), wall=NOW, mono=1.0)
    assert set(machine.objects.values()) <= {*before.values(), wanted}
    control = ca.machine()
    control.receive(ca.snapshot(), wall=NOW, mono=0.0)
    assert control.objects["placement/web/0"] == wanted
