"""The evaluator beside the packets: random flows over a real data plane, and every packet that should or should not
have arrived and did not or did.

What is expected of a packet follows from `policy.evaluate.evaluate` alone: at each host on its way the verdict on the
flow it belongs to, which is the one that its first accepted packet began (tuples are fresh, so that a flow is new
unless a test wants it old), or on itself.

Nothing is taken for refused that was only lost: a batch whose permitted packets did not all arrive is sent again, and
what did not arrive at the end of a round has to be in the firewall's own count of refusals.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from identity.records import PlacementRecord, PolicyFile, PolicyRecord
from mesh import netns
from mesh.compile import Compiler, LocalFacts
from mesh.firewall_names import table_name
from mesh.plan import Plan
from mesh.snapshot import InstanceKey, Snapshot
from policy.compile import compile_policy
from policy.evaluate import evaluate, permitted
from policy.language import digest, load
from policy.ports import ANYTHING, ICMP, PORTED, SCTP, TCP, UDP, PortMap, ranges
from policy.program import Program, Subject
from tests.netns.flow_packets import Kind, Probe, craft, number_of, same
from tests.netns.flow_policies import NAMES, NOW, OTHER, Files, write
from tests.netns.plane_rig import TD, Rig, inside

BATCH = 192  # packets on the wire at once; well below every queue on the way
TRIES = 5
OPEN: Files = [("open.yaml", 'meshpolicy: 1\nsegments:\n  - {name: all, allow: [{id: all, from: "*", to: "*", on: any}]}\n')]
_PATIENT = (
    "udp_timeout", "udp_timeout_stream", "icmp_timeout", "icmpv6_timeout", "tcp_timeout_syn_sent", "gre_timeout",
    "gre_timeout_stream", "generic_timeout",
)  # fmt: skip
_SOL_PACKET, _IGNORE_OUTGOING = 263, 23  # linux/if_packet.h


class FlowRig(Rig):
    """Eight workloads on two hosts, plans compiled from policy files."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.workloads = {name: f"dp{self.tag}-w{n}" for n, name in enumerate(NAMES)}
        self.where = {name: "ab"[n % 2] for n, name in enumerate(NAMES)}
        self.epochs = dict.fromkeys(NAMES, 1)
        self.labels: dict[str, dict[str, str]] = {}
        self.compilers = {name: Compiler() for name in self.hosts}

    def placement(self, name: str, host: str, epoch: int, state: str = "active") -> PlacementRecord:
        return super().placement(name, host, epoch, state).model_copy(update={"labels": self.labels[name]})

    def compile(self, host: str, files: Files, revision: int) -> Plan:
        one = self.hosts[host]
        record = PolicyRecord(
            trust_domain=TD.name, revision=revision, digest=digest(files), author="test", issued=1,
            files=[PolicyFile(name=name, text=text) for name, text in files],
        )  # fmt: skip
        snapshot = Snapshot(
            trust_domain=TD.name, timeline="t", revision=revision, policy=record,
            placements={InstanceKey(f"{n}/0"): self.placement(n, h, 1) for n, h in self.where.items()},
            endpoints={h.name: h.record(4, self.offers) for h in self.hosts.values()},
        )  # fmt: skip
        facts = LocalFacts(one.name, one.tunnel_key, one.interface, attachments=dict(one.attachments))
        return self.compilers[host].plan(snapshot, facts, NOW)


@dataclass(frozen=True, slots=True)
class Difference:
    """A packet that arrived though the evaluator denies it (leak), did not though it allows it (blocked), or arrived
    as another one (altered).
    """

    what: str
    probe: Probe
    policy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.probe} under {self.policy}"


@dataclass
class Score:
    flows: int = 0  # first packets of flows that no host knew
    packets: int = 0
    repeats: int = 0  # packets sent again because a batch lost some
    refused: int = 0  # packets that the evaluator refuses, each time they were sent
    seen: Counter[tuple[Any, ...]] = field(default_factory=Counter)  # (kind, family, proto, remote, delivered)
    differences: list[Difference] = field(default_factory=list)


class Wire:
    """One packet socket at the device of a workload: sends as it and sees what reaches it, below its own stack."""

    def __init__(self, ns: str, device: str = "rtn0") -> None:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            sock.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
            sock.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
            sock.bind((device, 0x0003))
            sock.setblocking(False)
            return sock

        self.sock = inside(ns, make)
        link = json.loads(_run("ip", "-j", "-n", ns, "link", "show", "dev", device))[0]["address"]
        near = json.loads(_run("ip", "-j", "-n", ns, "neigh", "show", "nud", "permanent"))[0]["lladdr"]
        head = bytes.fromhex((near + link).replace(":", ""))
        self.heads = {4: head + b"\x08\x00", 6: head + b"\x86\xdd"}

    def send(self, family: int, packet: bytes) -> None:
        self.sock.send(self.heads[family] + packet)

    def frames(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:
                yield self.sock.recv(4096)


class Differential:
    """Keeps what conntrack remembers of earlier rounds, so rounds may follow each other on one rig."""

    def __init__(self, rig: FlowRig, seed: str) -> None:
        self.rig, self.seed = rig, seed
        self.rng = random.Random(seed)
        self.score = Score()
        self.tries = TRIES
        self.round = 0
        self.programs: dict[str, Program] = {}
        self.subjects: dict[str, Subject] = {}
        self.policy = ""
        self.begun: dict[str, dict[tuple[object, ...], Probe]] = {name: {} for name in rig.hosts}
        self.wires: dict[str, Wire] = {}
        self.sent: dict[int, tuple[Probe, bytes, bool]] = {}
        self.arrived: set[int] = set()
        self._numbers = 0
        self._used: set[tuple[object, ...]] = set()
        self._verdicts: dict[tuple[object, ...], bool] = {}
        self._permitted: dict[tuple[str, str], PortMap] = {}
        self._address = {(n, f): rig.address(n, f) for n in NAMES for f in (4, 6)}
        self._poll = select.poll()
        for host in rig.hosts.values():
            inside(host.ns, _patient)

    # ---- policies

    def publish(self, number: int, *, open_host: str | None = None) -> dict[str, Plan]:
        """Put random policy `number` in force; on `open_host` one that allows everything."""
        files, _, labels = write(f"{self.seed}/{number}")
        name = f"policy {self.seed}/{number}" + (f", {open_host} open" if open_host else "")
        each = {host: OPEN if host == open_host else files for host in self.rig.hosts}
        return self.put(each, labels, name)

    def put(self, each: dict[str, Files], labels: dict[str, dict[str, str]], name: str) -> dict[str, Plan]:
        """Put the policy of each host in force; returns the plans."""
        self.rig.labels, self.policy = labels, name
        self.programs = {host: compile_policy(load(text), NOW) for host, text in each.items()}
        self.subjects = {n: Subject(n, labels[n], f"spiffe://{TD}/wl/{n}") for n in NAMES}
        self._verdicts.clear()
        self._permitted.clear()
        self.round += 1
        plans = {host: self.rig.compile(host, text, self.round) for host, text in each.items()}
        self.enforce(plans)
        for host, known in self.begun.items():  # what may not go on is forgotten
            self.begun[host] = {key: first for key, first in known.items() if self.allowed(host, first)}
        return plans

    def enforce(self, plans: dict[str, Plan]) -> None:
        """Hand plans to the hosts."""
        for host, plan in plans.items():
            assert not self.rig.hosts[host].apply(plan)["failed"]
        if not self.wires:
            for name in NAMES:
                ns = self.rig.workloads[name]
                # The probes are nobody's: without this the stack would answer them, with resets that end the flow.
                _run("ip", "netns", "exec", ns, "nft", "add table inet quiet; add chain inet quiet in "
                     "{ type filter hook prerouting priority raw; policy drop; }")  # fmt: skip
                self.wires[name] = wire = Wire(ns)
                self.rig.closing.callback(wire.sock.close)
                self._poll.register(wire.sock, select.POLLIN)

    # ---- what is expected

    def allowed(self, host: str, probe: Probe) -> bool:
        """The evaluator's verdict on the flow that this packet would begin, by the policy of one host."""
        key = (host, probe.src, probe.dst, probe.proto, probe.port)
        if (known := self._verdicts.get(key)) is None:
            program, one, other = self.programs[host], self.subjects[probe.src], self.subjects[probe.dst]
            known = self._verdicts[key] = evaluate(program, one, other, probe.proto, probe.port).allowed
        return known

    def permitted(self, src: str, dst: str) -> PortMap:
        """What the pair may do; says where to look, never what is expected."""
        if (known := self._permitted.get((src, dst))) is None:
            one, other = self.subjects[src], self.subjects[dst]
            known = ANYTHING
            for program in self.programs.values():
                known = known & permitted(program, one, other)
            self._permitted[src, dst] = known
        return known

    def path(self, probe: Probe) -> tuple[str, ...]:
        first, last = self.rig.where[probe.src], self.rig.where[probe.dst]
        return (first,) if first == last else (first, last)

    def expected(self, probe: Probe) -> bool:
        """Does the packet arrive? Notes what the hosts remember of it."""
        key = probe.conversation
        for host in self.path(probe):
            first = self.begun[host].get(key)
            if first is None and not probe.may_begin:
                return False
            if not self.allowed(host, first or probe):
                return False
            self.begun[host].setdefault(key, probe)
        return True

    # ---- flows

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def fresh(self, src: str, dst: str, family: int, proto: int, dport: int, kind: Kind = "start") -> Probe:
        """A packet of a flow that no host knows yet (protocols without ports have one conversation a pair)."""
        while True:
            sport = self.rng.randrange(1, 65536) if proto in PORTED or proto == ICMP else 0
            probe = Probe(self.number(), src, dst, family, proto, sport, dport, kind, self.rng.random() < 0.05)
            if probe.conversation not in self._used or not sport:
                self._used.add(probe.conversation)
                return probe

    def random_flow(self, edges: dict[int, list[int]]) -> Probe:
        """Half of the flows near what the pair may do, the others near the edges of any rule."""
        rng = self.rng
        src, dst = rng.sample(NAMES, 2)
        family = rng.choice((4, 6))
        proto = rng.choices((TCP, UDP, ICMP, SCTP, 0), (42, 28, 10, 12, 8))[0]
        if proto == 0:
            return self.fresh(src, dst, family, rng.choice(OTHER), 0)
        if proto == ICMP:
            return self.fresh(src, dst, family, ICMP, 1 if family == 4 and rng.random() < 0.2 else 0)
        port = rng.choice(edges[proto]) if rng.random() < 0.8 else rng.randrange(65536)
        if rng.random() < 0.5 and (runs := list(ranges(self.permitted(src, dst).bits(proto)))):
            first, last = rng.choice(runs)
            port = rng.choice((first - 1, first, last, min(65535, last + 1), rng.randint(first, last)))
        kind: Kind = "middle" if proto == TCP and rng.random() < 0.15 else "start"
        return self.fresh(src, dst, family, proto, port, kind)

    def edges(self) -> dict[int, list[int]]:
        """First and last ports of all rules in force and their neighbours, by protocol; 0, 1 and the last port too."""
        out: dict[int, list[int]] = {}
        for proto in (TCP, UDP, SCTP):
            found = {0, 1, 65535}
            for program in self.programs.values():
                for tier in program.tiers:
                    for rule in tier.rules:
                        for first, last in ranges(rule.ports.bits(proto)):
                            found |= {first - 1, first, last, min(65535, last + 1)}
            out[proto] = sorted(found)
        return out

    def answer(self, probe: Probe, kind: Kind = "reply") -> Probe:
        """What the destination would answer."""
        ports = (probe.dport, probe.sport) if probe.proto in PORTED else (probe.sport, probe.dport)
        return Probe(self.number(), probe.dst, probe.src, probe.family, probe.proto, *ports, kind,
                     answers=probe.number, answers_middle=probe.kind == "middle")  # fmt: skip

    def flows(self, count: int, *, among: Sequence[Probe] = ()) -> list[Probe]:
        """One round of `count` new flows (and `among`): the originals, answers to those that passed, and packets in
        the form of answers to those that did not and to some that were never sent. Returns what passed.
        """
        edges = self.edges()
        started = [*among, *(self.random_flow(edges) for _ in range(count - len(among)))]
        self.score.flows += sum(all(p.conversation not in begun for begun in self.begun.values()) for p in started)
        passed = self.run(started)
        self.run([self.answer(p) for p in passed])
        known = {p.number for p in passed}
        strays = [self.answer(p, "stray") for p in started if p.number not in known]
        for _ in range(count // 5):
            model = self.random_flow(edges)  # never sent
            strays.append(self.answer(model, "stray"))
        self.run(strays)
        return passed

    def again(self, passed: Iterable[Probe]) -> None:
        """Packets of flows that passed before, in both directions: a verdict may be another by now."""
        old = [p for p in passed if p.proto == UDP]
        self.run([replace(p, number=self.number()) for p in old])
        self.settle()  # an answer that may begin a flow must not overtake a refused packet: that would be its answer then
        self.run([self.answer(p) for p in old])

    # ---- packets

    def run(self, probes: Sequence[Probe]) -> list[Probe]:
        """Send packets and compare; returns those that were expected to arrive."""
        out = []
        for start in range(0, len(probes), BATCH):
            # One conversation only once in a batch: its packets must not overtake each other.
            rest = list(probes[start : start + BATCH])
            while rest:
                batch: dict[tuple[object, ...], Probe] = {}
                later = []
                for probe in rest:
                    if batch.setdefault(probe.conversation, probe) is not probe:
                        later.append(probe)
                out += self._batch(list(batch.values()))
                rest = later
        return out

    def _batch(self, probes: Sequence[Probe]) -> list[Probe]:
        wanted = []
        for probe in probes:
            arrives = self.expected(probe)
            packet = craft(probe, self._address[probe.src, probe.family], self._address[probe.dst, probe.family])
            self.sent[probe.number] = (probe, packet, arrives)
            if arrives:
                wanted.append(probe)
        for attempt in range(self.tries):
            for probe in probes:
                self.wires[probe.src].send(probe.family, self.sent[probe.number][1])
                self.score.refused += not self.sent[probe.number][2]
            self.score.repeats += len(probes) if attempt else 0
            missing = {p.number for p in wanted} - self.arrived
            deadline = time.monotonic() + 0.25 * 2**attempt
            while missing and (left := deadline - time.monotonic()) > 0:
                self._receive(left)
                missing -= self.arrived
            if not missing:
                break
        for number in missing:
            self.score.differences.append(Difference("blocked", self.sent[number][0], self.policy))
        self.score.packets += len(probes)
        for probe in probes:
            remote = len(self.path(probe)) > 1
            proto = probe.proto if probe.proto in {TCP, UDP, ICMP, SCTP} else 0
            self.score.seen[probe.kind, probe.family, proto, remote, self.sent[probe.number][2]] += 1
        return wanted

    def _receive(self, timeout: float) -> None:
        self._poll.poll(1000 * timeout)
        for name, wire in self.wires.items():
            for frame in wire.frames():
                number = number_of(frame)
                if number is None:
                    continue
                probe, packet, arrives = self.sent[number]
                if number not in self.arrived:
                    self.arrived.add(number)
                    if not arrives:
                        self.score.differences.append(Difference("leak", probe, self.policy))
                if probe.dst != name or not same(packet, frame[14:]):
                    self.score.differences.append(Difference("altered", probe, self.policy))

    def settle(self) -> None:
        """Wait out what may still be on its way."""
        until = time.monotonic() + 0.1
        while (left := until - time.monotonic()) > 0:
            self._receive(left)

    def refusals(self) -> Counter[str]:
        """What the firewalls of all hosts have counted."""
        out: Counter[str] = Counter()
        for host in self.rig.hosts.values():
            listed = _run("ip", "netns", "exec", host.ns, "nft", "-j", "list", "counters")
            counters = [e["counter"] for e in json.loads(listed)["nftables"] if "counter" in e]
            out.update({c["name"]: c["packets"] for c in counters if c["table"] == table_name(host.interface)})
        return out


def coverage(score: Score) -> list[tuple[Any, ...]]:
    """The combinations of kind, family, protocol, place and outcome that a run has not met; all of them can happen."""
    out = []
    for family in (4, 6):
        for proto in (TCP, UDP, ICMP, SCTP, 0):
            for remote in (False, True):
                cases = [("start", True), ("start", False), ("reply", True), ("stray", False)]
                cases += [("middle", True), ("middle", False)] if proto == TCP else []
                cases += [("stray", True)] if proto in {TCP, UDP} else []
                out += [c for kind, arrives in cases if not score.seen[c := (kind, family, proto, remote, arrives)]]
    return out


def _patient() -> None:
    # A flow must not be forgotten when a busy machine takes long over a round.
    for name in _PATIENT:
        netns.sysctl(f"netfilter/nf_conntrack_{name}", "3600")


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
