"""Ceilings, processes and forgotten connections on real packets, without a control plane: plans of policy files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from identity.records import PolicyFile, PolicyRecord
from mesh.compile import Compiler, LocalFacts
from mesh.firewall_names import table_name
from mesh.netfilter import listing
from mesh.plan import Plan
from mesh.snapshot import InstanceKey, Snapshot
from tests.netns.plane_rig import TD, Rig, echo, inside, until

HEAD = "meshpolicy: 1\nsegments:\n  - name: s\n    allow:\n"


class PolicyRig(Rig):
    """Plans compiled from a policy file."""

    def put(self, *rules: str) -> dict[str, Plan]:
        text = HEAD + "".join(f"      - {{{rule}}}\n" for rule in rules)
        record = PolicyRecord(trust_domain=TD.name, revision=1, digest="d", files=[PolicyFile(name="p.yaml", text=text)], author="t", issued=1)
        plans = {}
        for name, host in self.hosts.items():
            snapshot = Snapshot(
                trust_domain=TD.name, timeline="t", revision=1, policy=record,
                placements={InstanceKey(f"{n}/0"): self.placement(n, h, self.epochs[n]) for n, h in self.where.items()},
                endpoints={h.name: h.record(4, self.offers) for h in self.hosts.values()},
            )  # fmt: skip
            facts = LocalFacts(host.name, host.tunnel_key, host.interface, attachments=dict(host.attachments))
            plans[name] = Compiler().plan(snapshot, facts, int(time.time()))
            assert not host.apply(plans[name])["failed"]
        return plans


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyRig]:
    with PolicyRig(tmp_path_factory.mktemp("bounds")) as one:
        yield one


WEB_API = "from: {workload: web}, to: {workload: api}"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("dst", ["api", "batch"], ids=["another host", "the same host"])
def test_a_ceiling_holds(rig: PolicyRig, family: int, dst: str) -> None:
    rig.put(f"id: r, from: {{workload: web}}, to: {{workload: {dst}}}, on: [udp/7000, tcp/7002], max_rate: 1Mbit",
            f"id: free, from: {{workload: web}}, to: {{workload: {dst}}}, on: udp/7001")  # fmt: skip
    sender = rig.udp("web", family=family)
    got = {}
    for port in (7000, 7001):
        receiver = rig.udp(dst, port, family)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        target = (rig.address(dst, family), port)
        sender.sendto(b"warm", target)
        assert receiver.recv(100) == b"warm"
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < 2.0:
            sender.sendto(b"x" * 1000, target)
        received = 0
        receiver.settimeout(0.5)
        try:
            while data := receiver.recv(2000):
                received += len(data) + (28 if family == 4 else 48)
        except TimeoutError:
            pass
        got[port] = received / passed
    # A second's worth and the burst may go at once; then so much a second.
    assert got[7000] < (125_000 * (2.0 + 1.0) + 131_072) / 2.0 * 1.1
    assert got[7000] > 60_000
    assert got[7001] > 1.5 * got[7000]


def test_a_ceiling_changes_and_goes_without_a_new_table(rig: PolicyRig) -> None:
    rig.put(f"id: r, {WEB_API}, on: tcp/7000, max_rate: 8Mbit")
    with rig.server("api", 7000):
        sock = rig.connect("web", "api", 7000)
        assert echo(sock) == b"ping"
        table = _table(rig)
        for rule in (f"id: r, {WEB_API}, on: tcp/7000, max_rate: 16Mbit", f"id: r, {WEB_API}, on: tcp/7000",
                     f"id: r, {WEB_API}, on: tcp/7000, max_rate: 4Mbit"):  # fmt: skip
            rig.put(rule)
            assert echo(sock) == b"ping"
            assert rig.hosts["a"].ask("verify") == []
            assert _table(rig) == table


def _table(rig: PolicyRig) -> int:
    """The handle of host a's table: another one when it was put anew."""
    name = table_name(rig.hosts["a"].interface)
    listed = subprocess.run(["ip", "netns", "exec", rig.hosts["a"].ns, "nft", "-j", "list", "tables"], check=True, capture_output=True)
    (handle,) = [e["table"]["handle"] for e in json.loads(listed.stdout)["nftables"] if e.get("table", {}).get("name") == name]
    return int(handle)


@pytest.fixture
def host_rig(rig: PolicyRig) -> Iterator[PolicyRig]:
    """web is host a itself."""
    before = dict(rig.hosts["a"].attachments)
    rig.attach("web", "a", "")
    yield rig
    rig.hosts["a"].attachments.clear()
    rig.hosts["a"].attachments.update(before)


def _as(uid: int, work: Callable[[], bool]) -> bool:
    """Do it in a child with another user: its sockets belong to that user."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setuid(uid)
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


def _reach(rig: Rig, uid: int, port: int, family: int) -> bool:
    address = rig.address("api", family)
    source = rig.address("web", family)

    def connect() -> bool:
        with socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6) as sock:
            sock.settimeout(1.5)
            try:
                sock.bind((source, 0))
                sock.connect((address, port))
            except OSError:
                return False
            return echo(sock) == b"ping"

    return inside(rig.hosts["a"].ns, lambda: _as(uid, connect))


@pytest.mark.parametrize("family", [4, 6])
def test_only_the_named_user_gets_through(host_rig: PolicyRig, family: int) -> None:
    rig = host_rig
    rig.put('id: r, from: {workload: web, process: "uid:7001"}, to: {workload: api}, on: tcp/7000',
            'id: q, from: {workload: web, process: "uid:7002"}, to: {workload: api}, on: tcp/7000-7100',
            f"id: f, {WEB_API}, on: tcp/6999")  # fmt: skip
    with rig.server("api", 7000, family), rig.server("api", 7001, family), rig.server("api", 6999, family):
        assert until(lambda: _reach(rig, 7001, 7000, family), 15)
        got = {(uid, port): _reach(rig, uid, port, family) for uid in (0, 7001, 7002, 7003) for port in (6999, 7000, 7001)}
    assert {flow for flow, through in got.items() if through} == {
        *((uid, 6999) for uid in (0, 7001, 7002, 7003)), (7001, 7000), (7002, 7000), (7002, 7001),
    }  # fmt: skip


def test_a_namespace_cannot_name_a_process_and_gets_nothing(rig: PolicyRig) -> None:
    plans = rig.put('id: r, from: {workload: web, process: "uid:0"}, to: {workload: api}, on: tcp/7000', f"id: f, {WEB_API}, on: tcp/6999")
    assert [n.code for n in plans["a"].notes] == ["plan.process"]
    with rig.server("api", 7000), rig.server("api", 6999):
        assert echo(rig.connect("web", "api", 6999)) == b"ping"
        with pytest.raises(ConnectionRefusedError):
            rig.connect("web", "api", 7000)


@pytest.mark.parametrize("family", [4, 6])
def test_what_may_not_go_on_is_forgotten_and_blocks_nobody(rig: PolicyRig, family: int) -> None:
    """The same two ports in both directions: a forgotten permission must not leave a tracked flow in the way."""
    both = "id: back, from: {workload: api}, to: {workload: web}, on: udp/7050"
    rig.put(f"id: r, {WEB_API}, on: udp/7050", both)
    web, api = rig.udp("web", 7050, family), rig.udp("api", 7050, family)
    web.sendto(b"one", (rig.address("api", family), 7050))
    assert api.recv(100) == b"one"
    rig.put(both)  # the first direction is over
    for name in ("a", "b"):
        left = [t.flow for t in inside(rig.hosts[name].ns, listing) if t.flow.dport == 7050 and t.flow.family == family]
        assert left == []
    web.sendto(b"two", (rig.address("api", family), 7050))
    api.settimeout(0.3)
    with pytest.raises(OSError):  # timed out, or told that it is prohibited
        api.recv(100)
    api.settimeout(2)
    api.sendto(b"three", (rig.address("web", family), 7050))
    assert _next(web) == b"three"


def _next(sock: socket.socket) -> bytes:
    for _ in range(3):
        try:
            return sock.recv(100)
        except OSError as e:  # an ICMP error of an earlier packet
            error = e
    raise error
