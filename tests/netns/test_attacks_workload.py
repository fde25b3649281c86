"""A hostile workload: root in its own network namespace, and a local user of the host who is nobody."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.lab_process import run
from tests.netns import attack_tools as at
from tests.netns.attack_tools import MARKER, Box, Tap, as_nobody, emit, until

pytestmark = [pytest.mark.timeout(120)]

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    members: {role: [web, api, batch]}
    mode: enforce
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: [tcp/8080, udp/9000, icmp]}
"""
SECRET = b"PRIVATE KEY"


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Any:
    """web and batch (hostile) on host-a, api on host-b."""
    made = make_mesh("host-a", "host-b")
    made.spaces = {}
    for name, host in (("web", "host-a"), ("batch", "host-a"), ("api", "host-b")):
        made.add(name, host)
        made.spaces[name] = made.place(name, host)
    made.apply(POLICY)
    made.token = None
    return made


@pytest.fixture(params=[False, True], ids=["v4", "v6"])
def v6(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextlib.contextmanager
def quiet(mesh: Any, v6: bool) -> Iterator[None]:
    """Nothing with the marker comes out anywhere meanwhile; afterwards web's own packet arrives the same way."""
    api, web = mesh.addresses["api"][v6], mesh.addresses["web"][v6]
    with contextlib.ExitStack() as stack:
        taps = {
            name: stack.enter_context(contextlib.closing(Tap(space, device, outgoing=out)))
            for name, space, device, out in (
                ("api", mesh.spaces["api"], "rtn0", False), ("web", mesh.spaces["web"], "rtn0", False),
                ("host-a eth0", mesh.lab.nodes["host-a"].netns, "eth0", True), ("host-a tunnel", mesh.lab.nodes["host-a"].netns, "rtn0", True),
                ("host-a lo", mesh.lab.nodes["host-a"].netns, "lo", False),
            )
        }  # fmt: skip
        boxes = [stack.enter_context(contextlib.closing(Box(mesh.lab.nodes["host-a"].netns, p, v6=v6))) for p in (9000, 53, 8080)]
        yield
        frames: list[bytes] = []
        mac = at.gateway_mac(mesh.spaces["web"])

        def arrived() -> bool:
            emit(mesh.spaces["web"], "rtn0", [at.udp(web, api, 1, 9000, b"HONEST")], mac=mac)
            frames.extend(taps["api"].frames())
            return any(b"HONEST" in x for x in frames)

        assert until(arrived), "positive control"
        assert [x for x in frames if MARKER in x] == []
        assert {n: t.count() for n, t in taps.items()} == dict.fromkeys(taps, 0)
        assert [d for box in boxes for d in box.got()] == []


def send_as(space: str, source: str, to: str, port: int, v6: bool, *, mark: int = 0) -> None:
    with contextlib.closing(at.sock_in(space, socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("I", mark))
        with contextlib.suppress(OSError):
            sock.bind((source, 0))
            for _ in range(3):
                sock.sendto(MARKER, (to, port))


def test_another_address_does_not_help(mesh: Any, v6: bool) -> None:
    """batch takes web's address, and others, on its own device and speaks to everything from them."""
    space, addresses = mesh.spaces["batch"], mesh.addresses
    a = mesh.lab.nodes["host-a"]
    wanted = [addresses["web"][v6], addresses["api"][v6], *([a.v6, "fe80::1", "fd00::9"] if v6 else [a.v4, "169.254.82.9", "10.9.9.9"])]
    targets = [addresses["api"][v6], addresses["web"][v6], *([a.v6, "fe80::1%rtn0", "ff02::1"] if v6 else [a.v4, "169.254.82.1", "224.0.0.1"])]
    with quiet(mesh, v6):
        for source in wanted:
            run(["ip", "addr", "add", f"{source}/{128 if v6 else 32}", "dev", "rtn0", *(["nodad"] if v6 else [])], netns=space)
            try:
                for to in targets:
                    for port in (9000, 53, 8080):
                        send_as(space, source, to, port, v6)
            finally:
                run(["ip", "addr", "del", f"{source}/{128 if v6 else 32}", "dev", "rtn0"], netns=space)


def test_its_own_marks_and_its_own_tunnels_do_not_leave_the_namespace(mesh: Any, v6: bool) -> None:
    """Every bit of the mark, an own table with accept, VLAN, GRE and IPIP to the host side: packets are judged all the same."""
    space, own, api = mesh.spaces["batch"], mesh.addresses["batch"][v6], mesh.addresses["api"][v6]
    subprocess.run(["ip", "netns", "exec", space, "nft", "-f", "-"], check=True, input=(
        b"table inet retinue { chain o { type filter hook output priority 300; meta mark set 0xffffffff; accept; }; }"))  # fmt: skip
    mac = at.gateway_mac(space)
    with quiet(mesh, v6):
        for bit in (0xFFFFFFFF, *(1 << n for n in range(32))):
            send_as(space, own, api, 9000, v6, mark=bit)
        inner = at.udp(mesh.addresses["web"][v6], api, 1, 9000)
        host = mesh.lab.nodes["host-a"].v6 if v6 else "169.254.82.1"
        for to in (host, api):
            packets = [at.ip(own, to, 41 if v6 else 4, inner), at.ip(own, to, 47, b"\0\0" + (b"\x86\xdd" if v6 else b"\x08\0") + inner)]
            packets += [at.udp(own, to, 4789, 4789, b"\x08" + bytes(7) + bytes(12) + b"\x08\0" + inner)]
            emit(space, "rtn0", packets, mac=mac, count=3)
        # VLAN tags, other EtherTypes, broadcasts
        with contextlib.closing(at.sock_in(space, socket.AF_PACKET, socket.SOCK_RAW)) as raw:
            raw.bind(("rtn0", 0))
            kind = b"\x86\xdd" if v6 else b"\x08\0"
            for to in (mac, b"\xff" * 6, b"\x33\x33\0\0\0\1", b"\1\0\x5e\0\0\1"):
                for tag in (b"\x81\0\0\5" + kind, b"\x88\xa8\0\5\x81\0\0\6" + kind, b"\x88\x47\0\0\1\xff", b"\x88\xcc", b"\x88\x48", kind):
                    raw.send(to + b"\2" + bytes(5) + tag + (inner if tag != kind or to != mac else b"\0"))
    run(["nft", "delete", "table", "inet", "retinue"], netns=space)


def test_arp_and_neighbour_lies_change_nothing(mesh: Any) -> None:
    """A35 on the veth: claims to be web, the gateway, everybody; router advertisements."""
    space, host = mesh.spaces["batch"], mesh.lab.nodes["host-a"].netns
    before = run(["ip", "neigh"], netns=host).stdout.splitlines()
    evil = b"\2\6\6\6\6\6"
    with contextlib.closing(at.sock_in(space, socket.AF_PACKET, socket.SOCK_RAW)) as raw:
        raw.bind(("rtn0", 0))
        claims = [mesh.addresses[n][0] for n in ("web", "api", "batch")] + ["169.254.82.1", mesh.lab.nodes["host-b"].v4]
        claims += [f"100.99.{n // 250}.{n % 250 + 1}" for n in range(1500)]  # enough to overflow a neighbour table
        for claim in claims:
            for operation in (1, 2):
                for target in (claim, "169.254.82.1"):
                    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, operation) + evil + at.ip_address(claim).packed + b"\xff" * 6 + at.ip_address(target).packed
                    raw.send(b"\xff" * 6 + evil + b"\x08\6" + body)
        for claim in (mesh.addresses["web"][1], "fe80::1", *(f"fe80::{n:x}" for n in range(1000, 1400))):
            option = b"\1\1" + evil
            for target, kind in (("ff02::1", 136), ("fe80::1", 135), ("ff02::2", 133), ("ff02::1", 134)):
                packet = at.icmp(claim, target, (0, kind), 0, b"\x60\0\0\0" if kind == 136 else b"\x40\x80\xff\xff", at.ip_address(claim).packed + option)
                packet = packet[:7] + b"\xff" + packet[8:]
                raw.send(b"\x33\x33\0\0\0\1" + evil + b"\x86\xdd" + packet)
    after = run(["ip", "neigh"], netns=host).stdout.splitlines()
    assert not any("02:06:06:06:06:06" in line for line in after)
    assert len(after) <= len(before) + 4
    assert "fe80::1000" not in run(["ip", "-6", "route"], netns=host).stdout
    with quiet(mesh, False):
        pass


async def test_ports_of_the_host_are_closed(mesh: Any) -> None:
    """A42: from its namespace, through its device, neither the host's listeners nor the underlay's are reached."""
    space, lab = mesh.spaces["web"], mesh.lab
    run(["ip", "route", "replace", "default", "via", "169.254.82.1", "dev", "rtn0", "onlink"], netns=space)
    run(["ip", "-6", "route", "replace", "default", "via", "fe80::1", "dev", "rtn0"], netns=space)
    listeners = []
    try:
        for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            sock = at.sock_in(lab.nodes["host-a"].netns, family, socket.SOCK_STREAM)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, 2222))
            sock.listen(64)
            listeners.append(sock)
        a, b, ca = (lab.nodes[n] for n in ("host-a", "host-b", "ca"))
        for to, port in [(x, p) for n in (a, b, ca) for x in (n.v4, n.v6) for p in (2222, 8443)] + [("169.254.82.1", 2222), ("fe80::1%rtn0", 2222)]:
            sock = at.sock_in(space, socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_STREAM)
            with contextlib.closing(sock):
                sock.settimeout(0.2)
                with pytest.raises(OSError):
                    sock.connect(socket.getaddrinfo(to, port, type=socket.SOCK_STREAM)[0][4] if "%" not in to else (to.partition("%")[0], port, 0, 2))
        for sock in listeners:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.accept()
        with contextlib.closing(at.sock_in(a.netns, socket.AF_INET, socket.SOCK_STREAM)) as control:
            control.connect((a.v4, 2222))  # positive control: it listens
    finally:
        for sock in listeners:
            sock.close()
        run(["ip", "route", "del", "default"], netns=space)
        run(["ip", "-6", "route", "del", "default"], netns=space)


async def test_a_flood_of_new_flows_does_not_stop_another_workload(mesh: Any) -> None:
    """batch opens 60,000 flows that are all refused; the list of refusals is bounded and web goes on."""
    space, own, api = mesh.spaces["batch"], mesh.addresses["batch"][0], mesh.addresses["api"][0]
    service = mesh.serve(mesh.spaces["api"], "api")
    await mesh.answered(mesh.spaces["web"], mesh.url("api", 0))
    mac = at.gateway_mac(space)
    emit(space, "rtn0", (at.udp(own, api, 1024 + n % 60000, 1 + n % 65000) for n in range(60_000)), mac=mac)
    answer = await mesh.answered(mesh.spaces["web"], mesh.url("api", 0), patience=5)
    assert answer.served_by == "api"
    listed = json.loads(run(["nft", "-j", "list", "set", "inet", "retinue", "denied4"], netns=mesh.lab.nodes["host-a"].netns).stdout)
    held = next(o["set"] for o in listed["nftables"] if "set" in o)
    assert 1000 < len(held.get("elem", [])) <= 4096
    mesh.lab.processes.pop(service.name).stop()
    # The agent still answers and tells about it.
    assert mesh.lab.retinue("host-a", "status")["ready"]


async def test_a_device_that_is_deleted_or_stolen_comes_back_closed(mesh: Any) -> None:
    """The workload deletes its device, puts decoys in its place, moves it away: it stays what it is and nobody else suffers."""
    space, host = mesh.spaces["batch"], mesh.lab.nodes["host-a"].netns
    mac = json.loads(run(["ip", "-j", "link", "show", "rtn0"], netns=space).stdout)[0]["address"]
    other = mesh.lab.add_workload("hideout")
    for wreck in (
        [["link", "del", "rtn0"]],
        [["link", "del", "rtn0"], ["link", "add", "rtn0", "type", "bridge"], ["link", "set", "rtn0", "up"]],
        [["link", "set", "rtn0", "down"], ["link", "set", "rtn0", "name", "mine"]],
        [["link", "set", "rtn0", "netns", other]],
    ):  # fmt: skip
        for words in wreck:
            subprocess.run(["ip", "-n", space, *words], check=False, capture_output=True)
        with quiet(mesh, False):
            for device in ("rtn0", "mine"):
                with contextlib.suppress(OSError):
                    emit(space, device, [at.udp(mesh.addresses["batch"][0], mesh.addresses["api"][0], 1, 9000)], mac=b"\2\0\0\0\0\1")
            with contextlib.suppress(OSError):
                emit(other, "rtn0", [at.udp(mesh.addresses["web"][0], mesh.addresses["api"][0], 1, 9000)], mac=b"\2\0\0\0\0\1")
        for leftover in ("rtn0", "mine"):
            if subprocess.run(["ip", "-n", space, "-d", "link", "show", leftover], capture_output=True, text=True).stdout.count("bridge") or leftover == "mine":
                subprocess.run(["ip", "-n", space, "link", "del", leftover], check=False, capture_output=True)
        subprocess.run(["ip", "-n", other, "link", "del", "rtn0"], check=False, capture_output=True)

        def back() -> bool:
            found = subprocess.run(["ip", "-n", space, "addr", "show", "rtn0"], capture_output=True, text=True)
            return found.returncode == 0 and mac in found.stdout and mesh.addresses["batch"][0] in found.stdout

        assert until(back, 15.0), f"after {wreck} the agent puts the device back"
    links = json.loads(run(["ip", "-j", "link"], netns=host).stdout)
    assert sum(x["ifname"].startswith("rt") and x["ifname"] != "rtn0" for x in links) == 2


# ---- a local user


def peek(path: Path) -> None:
    """Read what a path holds. Raises OSError."""
    if path.is_dir():
        os.listdir(path)
    elif path.is_socket():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
    else:
        with path.open("rb") as f:
            f.read(1)


def test_nobody_reaches_no_socket_and_no_file(mesh: Any) -> None:
    """A40: the agent's, the engine's and the CA's sockets, their directories, everything in them."""
    lab = mesh.lab
    a, ca = lab.nodes["host-a"], lab.nodes["ca"]
    lab.dir.chmod(0o711)  # in production the way there is open: /run and /var/lib
    (lab.dir / "nodes").chmod(0o711)
    for node in (a, ca):
        node.dir.chmod(0o711)
    try:
        sockets = [a.run_dir / "agent.sock", a.run_dir / "rtn0.sock", ca.state_dir / "admin.sock"]
        files = [p for d in (a.state_dir, a.run_dir, ca.state_dir) for p in (d, *d.rglob("*"))]
        assert len(files) > 20
        assert all(p.exists() for p in sockets), "positive control: they are there"
        for path in (*sockets, *files):
            assert as_nobody(lambda path=path: peek(path)) == "PermissionError", path
        # Not even when an operator opened the directories: each thing is closed by itself, but for public certificates.
        for node in (a.run_dir, a.state_dir, ca.state_dir):
            node.chmod(0o755)
        for path in (*sockets, *(p for p in files if not p.is_dir() and p.suffix != ".pem" and p.name != "workload.sock")):
            assert as_nobody(lambda path=path: peek(path)) == "PermissionError", path
            assert path.stat().st_mode & 0o077 == 0, path
    finally:
        for node in (a.run_dir, a.state_dir, ca.state_dir, lab.dir, lab.dir / "nodes", a.dir, ca.dir):
            node.chmod(0o700)


def test_processes_keep_their_secrets(mesh: Any) -> None:
    """No core dumps, not readable by others, and no key, token or its parts in arguments, environment or logs (A43)."""
    lab = mesh.lab
    engine = json.loads(next(lab.nodes["host-a"].run_dir.glob("engine-*.json")).read_text())["pid"]
    pids = {"ca": lab.processes["retinue-ca"].pid, "agent": lab.processes["agent-host-a"].pid, "engine": engine}
    canaries = set()
    for path in (*lab.nodes["host-a"].state_dir.rglob("*"), *lab.ca_dir.rglob("*")):
        if path.suffix == ".key":
            lines = [x for x in path.read_bytes().splitlines() if x and b"-----" not in x]
            canaries |= {x for x in lines if len(x) > 30}
    # PEM of 48 bytes begins alike for all keys of one kind; the rest of the line is the secret.
    canaries = {x[-24:] for x in canaries}
    assert len(canaries) >= 6, "positive control: keys are known"
    made = lab.ca("token", "create", "--host", "host-later")
    canaries.add(made["token"].split(".")[2].encode())
    for name, pid in pids.items():
        proc = Path(f"/proc/{pid}")
        limits = {line[:26].strip(): line[26:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
        assert limits["Max core file size"] == ["0", "0"], name
        for what in ("environ", "mem", "maps", "fd"):
            assert as_nobody(lambda proc=proc, what=what: peek(proc / what)) == "PermissionError", (name, what)
        told = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
        assert [c for c in canaries if c in told] == [], name
    texts = b"".join(p.read_bytes() for p in (lab.dir / "logs").iterdir())
    assert b"enrolled" in texts, "positive control: there are logs"
    assert [c for c in canaries if c in texts] == []
    database = (lab.ca_dir / "ca.db").read_bytes() + b"".join(p.read_bytes() for p in lab.ca_dir.glob("ca.db-wal"))
    assert [c for c in canaries if c in database] == []
    assert SECRET not in database
