"""Audit, flow records and alerts on real packets: agents, a CA, workloads in namespaces, and a real sink."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh import netns
from mesh.lab_process import command
from tests.netns.conftest import Mesh
from tests.netns.plane_rig import until

pytestmark = pytest.mark.timeout(400)  # three dozen commands a test, on machines of any speed
PATIENCE = 60.0  # seconds for what takes one or two on an idle machine

WEB, API, BATCH, PAGE = "shop/web", "shop/api", "shop/batch", "page"


class Sink:
    """A unix-socket sink: lines of JSON. `deaf` accepts and never reads."""

    def __init__(self, path: Path) -> None:
        self.path, self.messages = path, list[dict[str, Any]]()
        self._sock: socket.socket | None = None

    def open(self) -> None:
        self.path.unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(self.path))
        self._sock.listen(16)
        threading.Thread(target=self._serve, args=(self._sock,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, sock.makefile() as lines:
                for line in lines:
                    self.messages.append(json.loads(line))

    def close(self) -> None:
        if self._sock is not None:
            self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()
            self._sock = None
            self.path.unlink(missing_ok=True)


def policy(*, audit: str = "", alert: bool = True) -> str:
    mode = f"    mode: {{audit_until: {audit}}}\n" if audit else ""
    told = "    alert: {on_deny: page, collapse: 30s}\n" if alert else ""
    return f"""meshpolicy: 1
labels: {{keys: [role]}}
guardrails:
  - deny: {{id: SEC-1, from: {{role: web}}, to: {{role: api}}, on: tcp/8082}}
segments:
  - name: shop
    members: {{role: [web, api, batch]}}
{mode}{told}    allow:
      - {{id: web-api, from: {{role: web}}, to: {{role: api}}, on: [tcp/8080, udp/9000]}}
"""


class World:
    def __init__(self, mesh: Mesh, sink: Sink) -> None:
        self.mesh, self.sink = mesh, sink
        self.spaces: dict[str, str] = {}

    def agent(self, host: str) -> None:
        """Its agent, with our sink; anew when it runs."""
        old = self.mesh.lab.processes.get(f"agent-{host}")
        if old is not None:
            old.kill()
        self.mesh.lab.start_agent(host, args=["--alert", f"{PAGE}=unix:{self.sink.path}"])

    def flows(self, host: str, *args: str) -> list[dict[str, Any]]:
        return list(self.mesh.lab.retinue(host, "flows", *args)["flows"])

    def recorded(self, host: str, **wanted: Any) -> dict[str, Any]:
        """The sum of the records that fit, once there is one."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [f for f in self.flows(host) if all(f.get(k) == v for k, v in wanted.items())]
            return bool(found)

        assert until(look, PATIENCE), (wanted, self.flows(host))
        return {**found[-1], "count": sum(f.get("count", 1) for f in found), "bytes": sum(f["bytes"] for f in found)}

    def tcp(self, src: str, dst: str, port: int, family: int = 0) -> str:
        """``open``, ``refused`` or ``silent``."""

        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if family else socket.AF_INET)
            sock.settimeout(2)
            return sock

        with netns.inside(self.spaces[src], make) as sock:
            try:
                sock.connect((self.mesh.addresses[dst][family], port))
            except ConnectionRefusedError:
                return "refused"
            except TimeoutError:
                return "silent"
            return "open"

    def becomes(self, state: str, src: str, dst: str, port: int, family: int = 0) -> bool:
        """Does a connection end so before our patience does?"""
        return until(lambda: self.tcp(src, dst, port, family) == state, PATIENCE)

    def alerts(self, count: int, patience: float = PATIENCE) -> list[dict[str, Any]]:
        """What arrived at the sink, once it is so many."""
        until(lambda: len(self.sink.messages) >= count, patience)
        return list(self.sink.messages)


@pytest.fixture(scope="module")
def world(make_mesh: Callable[..., Mesh], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    mesh = make_mesh("a", "b")
    sink = Sink(tmp_path_factory.mktemp("sink") / "s")
    sink.open()
    one = World(mesh, sink)
    for host in ("a", "b"):
        one.agent(host)
    for name, host in ((WEB, "a"), (BATCH, "a"), (API, "b")):
        mesh.add(name, host)
    mesh.apply(policy())
    for name, host in ((WEB, "a"), (BATCH, "a"), (API, "b")):
        one.spaces[name] = mesh.place(name, host)
    for port in (8080, 8081, 8082):
        mesh.serve(one.spaces[API], API, port=port)
    assert one.becomes("open", WEB, API, 8080)
    yield one
    sink.close()


@pytest.fixture
def quiet(world: World) -> World:
    """No message of an earlier test."""
    world.sink.messages.clear()
    return world


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_an_allowed_flow_is_recorded_at_both_ends_with_its_rule_and_processes(world: World, family: int) -> None:
    assert world.becomes("open", WEB, API, 8080, family)
    there = world.recorded("b", src=WEB, dst=API, port=8080, verdict="allow")
    assert (there["by"], there["src_instance"], there["dst_instance"], there["host"]) == ("web-api", 0, 0, "b")
    assert there["first"] <= there["time"]
    assert "src_process" not in there  # that end is elsewhere

    def server() -> dict[str, Any]:
        return dict(world.recorded("b", src=WEB, dst=API, port=8080, verdict="allow")["dst_process"])

    assert until(lambda: server()["executable"] != "unknown", PATIENCE)
    assert "python" in server()["executable"]
    assert server()["uid"] == 0
    assert world.recorded("a", src=WEB, dst=API, port=8080, verdict="allow")["by"] == "web-api"
    assert until(lambda: world.recorded("b", src=WEB, dst=API, port=8080)["bytes"] > 0, PATIENCE)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_one_refused_attempt_is_one_record_and_one_alert(quiet: World, family: int) -> None:
    port = 7001 + family
    assert quiet.tcp(BATCH, API, port, family) == "refused"
    (alert,) = quiet.alerts(1)
    assert {k: alert[k] for k in ("kind", "segment", "sink", "src", "dst", "proto", "port", "by", "host", "count", "update")} == {
        "kind": "denied", "segment": "shop", "sink": PAGE, "src": BATCH, "dst": API, "proto": "tcp", "port": port,
        "by": "default", "host": "a", "count": 1, "update": False,
    }  # fmt: skip
    assert alert["first"] <= alert["last"] <= time.time()
    one = quiet.recorded("a", src=BATCH, dst=API, port=port, verdict="deny")
    assert (one["by"], one["count"]) == ("default", 1)
    assert one["src_process"]["executable"] == "unknown"  # it is gone, and that is said
    quiet.mesh.lab.processes["agent-a"].kill()  # so that the next test has a new incident
    quiet.agent("a")


def test_a_guardrail_is_named(quiet: World) -> None:
    assert quiet.tcp(WEB, API, 8082) == "refused"
    (alert,) = quiet.alerts(1)
    assert alert["by"] == "guardrail:SEC-1"


def test_a_scan_of_a_thousand_ports_is_one_incident(quiet: World) -> None:
    quiet.agent("a")  # no incident of before is open

    def scan() -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            for port in range(20_000, 21_000):
                sock.sendto(b"x", (quiet.mesh.addresses[API][0], port))

    netns.inside(quiet.spaces[BATCH], scan)
    (alert,) = quiet.alerts(1)
    assert (alert["src"], alert["dst"], alert["count"]) == (BATCH, API, 1000)
    assert len(alert["flows"]) == 32
    assert alert["more_flows"] == 968
    assert until(lambda: len({f["port"] for f in quiet.flows("a", "--denied") if f["proto"] == "udp"}) == 1000, PATIENCE)
    assert len(quiet.sink.messages) == 1


def test_an_alert_survives_its_sink_and_its_agent(quiet: World) -> None:
    quiet.sink.close()
    quiet.agent("a")
    try:
        assert quiet.tcp(BATCH, API, 7100) == "refused"
        spool = quiet.mesh.lab.nodes["a"].state_dir / "alerts" / PAGE
        assert until(lambda: any(spool.glob("*.json")), PATIENCE)
        assert all(p.stat().st_mode & 0o777 == 0o600 for p in spool.iterdir())
        quiet.agent("a")  # kill -9, and a new one
    finally:
        quiet.sink.open()
    (alert,) = quiet.alerts(1)
    assert (alert["src"], alert["port"]) == (BATCH, 7100)
    assert until(lambda: not any(spool.glob("*.json")), PATIENCE)
    assert len(quiet.sink.messages) == 1


def test_audit_forwards_and_records_and_ends_by_itself(quiet: World) -> None:
    world = quiet
    world.mesh.apply(policy(audit=_date(time.time() + 600)))
    for family in (0, 1):
        assert world.becomes("open", BATCH, API, 8081, family)
        assert world.tcp(WEB, API, 8082, family) == "refused"  # a guardrail enforces all the same
    for host in ("a", "b"):
        one = world.recorded(host, src=BATCH, dst=API, port=8081, verdict="audit")
        assert one["by"] == "default"
    said = world.mesh.lab.retinue("a", "explain", BATCH, API, "8081")
    assert (said["verdict"], said["audited"], said["would_deny"]) == ("allow", True, "default")
    assert said["reason"].startswith("audit of segment shop until")
    end = int(time.time()) + 10
    world.mesh.apply(policy(audit=_date(end)))
    world.mesh.lab.processes["retinue-ca"].kill()  # its end needs nobody
    try:
        for family in (0, 1):
            assert world.becomes("refused", BATCH, API, 8081, family)
        assert time.time() >= end
        assert world.tcp(WEB, API, 8080) == "open"
    finally:
        world.mesh.lab.start_ca(init=False)


def _date(at: float) -> str:
    return time.strftime('"%Y-%m-%dT%H:%M:%SZ"', time.gmtime(at))


JOB = "shop/job"


def test_a_grant_ends_with_its_workload_everywhere(world: World) -> None:
    """web may talk with api on another port anyway, so that the hosts themselves must know that the job has ended."""
    world.mesh.add(JOB, "a")
    world.mesh.apply(policy() + "grants:\n  - {id: INC-7, from: {role: web}, to: {role: api}, on: tcp/8081, until: {workload_ends: shop/job}}\n")
    held = []
    for family in (0, 1):
        assert world.becomes("open", WEB, API, 8081, family)
        held.append(_stream(world, family))
    assert all(_answers(sock) for sock in held)
    world.mesh.lab.ca("workload", "revoke", JOB)
    for family, sock in enumerate(held):
        assert world.becomes("refused", WEB, API, 8081, family)
        assert world.tcp(WEB, API, 8080, family) == "open"
        assert not _answers(sock)
        sock.close()

    def told() -> list[dict[str, Any]]:
        lines = world.mesh.lab.ca("audit", "list")
        return [e for e in (lines if isinstance(lines, list) else lines.get("entries", [])) if e.get("action") == "grant.expired"]

    assert until(lambda: bool(told()), PATIENCE)
    (entry,) = told()
    assert entry["subject"] == "INC-7"
    assert "the end of the workload shop/job" in json.dumps(entry)


def _stream(world: World, family: int) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if family else socket.AF_INET)
        sock.settimeout(1)
        return sock

    sock = netns.inside(world.spaces[WEB], make)
    sock.connect((world.mesh.addresses[API][family], 8081))
    return sock


def _answers(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        return bool(sock.recv(4096))
    except OSError:
        return False


def test_a_flow_that_fell_silent_is_ended_and_told_by_its_rule(quiet: World) -> None:
    world = quiet
    slow = "      - {id: slow, from: {role: web}, to: {role: api}, on: tcp/8081, idle_timeout: 2s}\n"
    world.mesh.apply(policy() + slow)
    held = []
    for family in (0, 1):
        assert world.becomes("open", WEB, API, 8081, family)
        held.append(_stream(world, family))
    ends = [f" . {sock.getsockname()[1]} . " for sock in held]

    def live() -> str:
        listed = [["nft", "-n", "list", "set", "inet", "retinue", f"live{family}"] for family in (4, 6)]
        return "".join(netns.inside(world.mesh.lab.nodes["a"].netns, lambda w=words: subprocess.check_output(w, text=True)) for words in listed)

    assert until(lambda: not any(end in live() for end in ends), PATIENCE)
    for sock in held:
        assert not _answers(sock)
        sock.close()
    wanted = {"src": WEB, "dst": API, "port": 8081, "verdict": "deny", "by": "idle:slow"}
    assert until(lambda: world.recorded("a", **wanted)["count"] >= 2, PATIENCE)
    assert world.becomes("open", WEB, API, 8081)
    said = world.mesh.lab.retinue("a", "trace", WEB, API, "8081", codes=(0, 1))
    steps = {s["step"]: s["text"] for s in said["halves"][0]["steps"]}
    assert "; ended after 2 s of silence by slow" in steps["policy"]
    assert "deny by idle:slow" in steps["records"]
    assert not [m for m in world.sink.messages if str(m.get("by")).startswith("idle")]  # nobody attempted anything


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_a_trace_names_each_step_on_both_hosts(world: World, tmp_path: Path, family: int) -> None:
    lab = world.mesh.lab
    world.mesh.apply(policy())
    assert world.becomes("open", WEB, API, 8080, family)
    here = lab.retinue("a", "trace", WEB, API, "8080", codes=(0, 1))
    assert here["result"] == "unknown"  # half of it is not known, and said so
    assert here["missing"] == ["the destination's host has not been asked: run `retinue trace` there, with -o json, and give the file with --far"]
    (tmp_path / "there.json").write_text(json.dumps(lab.retinue("b", "trace", WEB, API, "8080")))
    both = lab.retinue("a", "trace", WEB, API, "8080", "--far", str(tmp_path / "there.json"))
    assert (both["result"], both["missing"], [h["host"] for h in both["halves"]]) == ("ok", [], ["a", "b"])
    steps = {(h["host"], s["step"]): s for h in both["halves"] for s in h["steps"]}
    assert "rule web-api" in steps["a", "policy"]["text"]
    assert steps["b", "firewall"]["text"] == "IPv4: set pair4, IPv6: set pair6"
    assert steps["a", "tunnel"]["text"].startswith("direct to b at ")
    assert "allow by web-api" in steps["b", "records"]["text"]
    refused = lab.retinue("a", "trace", BATCH, API, "8080", codes=(1,))
    assert refused["result"] == "no"
    failing = {s["step"] for s in refused["halves"][0]["steps"] if s["result"] == "no"}
    assert {"policy", "firewall"} <= failing
    nobody = lab.retinue("a", "trace", "shop/nobody", API, "8080", codes=(0, 1))
    assert nobody["halves"][0]["steps"][0]["result"] == "unknown"


@pytest.mark.parametrize("text", ["{", "[]", '{"halves": [{"steps": [{"step": 1}]}]}', '{"host": 5, "steps": [], "roles": [], "hosts": []}'])
def test_a_forged_half_is_refused(world: World, tmp_path: Path, text: str) -> None:
    (tmp_path / "far").write_text(text)
    answer = world.mesh.lab.retinue("a", "trace", WEB, API, "8080", "--far", str(tmp_path / "far"), codes=(2,))
    assert answer is None or answer["error"]["code"] == "trace.file"


async def test_follow_shows_a_refusal_as_it_happens(world: World) -> None:
    lab = world.mesh.lab
    agent = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", lab.nodes["a"].netns, *command("retinue"), "flows", "--denied", "--follow",
        "--run-dir", str(lab.nodes["a"].run_dir), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert agent.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while True:
                await asyncio.to_thread(world.tcp, BATCH, API, 7200)
                with_port = asyncio.create_task(agent.stdout.readline())
                done, _ = await asyncio.wait({with_port}, timeout=3)
                if done and json.loads(with_port.result())["port"] == 7200:
                    break
                with_port.cancel()
    finally:
        agent.kill()
        await agent.wait()


def test_a_flood_of_refused_packets_is_counted_and_hides_nobody(quiet: World) -> None:
    stop = threading.Event()
    sent = 0

    def flood() -> None:
        nonlocal sent
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            port = 1
            while not stop.is_set():
                port = port % 65_000 + 1
                try:
                    sock.sendto(b"x", (quiet.mesh.addresses[API][0], port))
                    sent += 1
                except OSError:
                    pass

    thread = threading.Thread(target=lambda: netns.inside(quiet.spaces[BATCH], flood))
    thread.start()
    try:
        assert until(lambda: sent > 50_000, PATIENCE)
        assert quiet.tcp(WEB, API, 7300) == "refused"
        assert quiet.tcp(WEB, API, 8080) == "open"
        quiet.recorded("a", src=WEB, dst=API, port=7300, verdict="deny")
        found = quiet.mesh.lab.retinue("a", "status")
        assert found["ready"]
    finally:
        stop.set()
        thread.join()
    answer = quiet.mesh.lab.retinue("a", "flows", "--denied")
    assert sum(answer["losses"].values()) > 0  # what could not be recorded is said
    assert len(quiet.sink.messages) <= 3
