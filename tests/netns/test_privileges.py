"""The agent without root: one capability of its own, and the broker that enters namespaces for it.

    host-a: web (own namespace), the agent runs as user 64999 with CAP_NET_ADMIN only, the broker as root
    host-b: api, an agent as root
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from identity.errors import RetinueError
from identity.wire.broker import Configure, Side
from mesh import netns
from mesh.broker import Brokered
from mesh.lab import Lab
from mesh.lab_process import ProcessFailed, command, run
from tests.netns.conftest import Mesh

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]

USER = 64999
NET_ADMIN, DAC_READ_SEARCH = 12, 2  # linux/capability.h
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    members: {role: [web, api]}
    mode: enforce
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: [tcp/8080]}
"""


def hidden() -> bool:
    """Is the code or the interpreter below a directory that only root may pass (/root)? Reading it takes one more."""
    places = (Path(__file__).resolve(), Path(sys.executable).resolve())
    return any(not d.stat().st_mode & stat.S_IXOTH for place in places for d in place.parents)


def unprivileged() -> list[str]:
    caps = "-all,+net_admin" + (",+dac_read_search" if hidden() else "")
    return [
        "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs",
        f"--inh-caps={caps}", f"--ambient-caps={caps}", f"--bounding-set={caps}", "--",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[Mesh]:
    with Lab(["host-a", "host-b"]) as lab:
        mesh = Mesh(lab)
        lab.start_ca()
        for host in ("host-a", "host-b"):
            lab.enroll(host)
        node = lab.nodes["host-a"]
        for directory in (lab.dir.parent, lab.dir, lab.dir / "nodes", node.dir, lab.dir / "notify"):
            directory.chmod(0o711)
        (lab.dir / "notify").chmod(0o733)
        for path in (node.run_dir, node.state_dir, *node.state_dir.rglob("*")):
            os.chown(path, USER, USER)
        broker = lab.spawn(
            [*command("retinue-broker"), "--user", str(USER), "--socket", str(node.dir / "broker.sock")],
            name="broker-host-a", netns=node.netns,
        )  # fmt: skip
        broker.wait_ready()
        tun = node.dir / "tun"  # everybody's, as udev makes it: here it may be root's
        os.mknod(tun, stat.S_IFCHR | 0o666, os.makedev(10, 200))
        tun.chmod(0o666)
        device = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/net/tun && exec "$@"', str(tun)]
        agent = lab.spawn(
            [*device, *unprivileged(), *command("retinue-agent"), "--state-dir", str(node.state_dir), "--run-dir", str(node.run_dir),
             "--broker", str(node.dir / "broker.sock"), "--device", "userspace"],
            name="agent-host-a", netns=node.netns, env=node.env,
        )  # fmt: skip
        os.chmod(lab.dir / "notify" / "agent-host-a", 0o622)
        agent.wait_ready(30)
        lab.start_agent("host-b")
        mesh.apply(POLICY)
        for name, host in (("web", "host-a"), ("api", "host-b")):
            mesh.add(name, host)
        mesh.spaces = {"web": mesh.place("web", "host-a"), "api": mesh.place("api", "host-b")}  # type: ignore[attr-defined]
        mesh.serve(mesh.spaces["api"], "api")  # type: ignore[attr-defined]
        yield mesh


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}


def _family(world: Mesh) -> list[int]:
    """The agent of host-a and its engine."""
    agent = world.lab.processes["agent-host-a"].pid
    engine = json.loads((world.lab.nodes["host-a"].run_dir / "engine-rtn0.json").read_text())["pid"]
    return [agent, engine]


async def test_permitted_traffic_flows_and_the_rest_does_not(world: Mesh) -> None:
    for family in (0, 1):
        assert (await world.get(world.spaces["web"], world.url("api", family))).status == 200  # type: ignore[attr-defined]
        refused = await world.get(world.spaces["web"], world.url("api", family, port=8081))  # type: ignore[attr-defined]
        assert refused.status is None


def test_the_agent_and_its_engine_have_one_capability_and_no_root(world: Mesh) -> None:
    allowed = 1 << NET_ADMIN | (1 << DAC_READ_SEARCH if hidden() else 0)
    for pid in _family(world):
        found = _status(pid)
        assert found["Uid"].split() == [str(USER)] * 4
        assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == allowed
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def test_the_agent_alone_could_not_enter_a_namespace(world: Mesh) -> None:
    """Positive control: with the same privileges and without the broker it is refused."""
    space = netns.path_of(world.spaces["web"])  # type: ignore[attr-defined]
    enter = [*unprivileged(), "nsenter", f"--net={space}", "true"]
    with pytest.raises(ProcessFailed, match="not permitted"):
        run(enter)


async def test_a_killed_agent_comes_back_without_root(world: Mesh) -> None:
    lab, node = world.lab, world.lab.nodes["host-a"]
    before = _family(world)[1]
    argv = lab.processes["agent-host-a"].argv
    lab.processes["agent-host-a"].send(signal.SIGKILL)
    lab.processes["agent-host-a"].wait()
    agent = lab.spawn(argv, name="agent-host-a", netns=node.netns, env=node.env)
    os.chmod(lab.dir / "notify" / "agent-host-a", 0o622)
    agent.wait_ready(30)
    assert _family(world)[1] == before  # the same engine
    assert (await world.get(world.spaces["web"], world.url("api", 0))).status == 200  # type: ignore[attr-defined]


def test_the_broker_answers_nobody_else(world: Mesh) -> None:
    path = world.lab.nodes["host-a"].dir / "broker.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_uid == USER
    path.chmod(0o666)
    try:
        ask = (
            "import contextlib, socket, sys\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "s.connect(sys.argv[1])\n"
            "with contextlib.suppress(ConnectionError):\n"
            "    s.send(b'{\"op\":\"open\",\"place\":\"/proc/1/ns/net\"}')\n"
            "    print(socket.recv_fds(s, 4096, 1)[:2])\n"
        )
        done = run(["setpriv", "--reuid=65534", "--clear-groups", "--", "/usr/bin/python3", "-c", ask, str(path)])
        assert done.stdout.strip() in {"", "(b'', [])"}
    finally:
        path.chmod(0o600)


@pytest.mark.parametrize("place", ["/dev/null", "/etc/shadow", "/proc/1/mem", "/proc/1/ns/mnt", "/dev/kmsg", "../../etc/passwd", "/proc/1/root"])
def test_the_broker_opens_network_namespaces_only(world: Mesh, place: str) -> None:
    with pytest.raises(RetinueError) as e:
        os.close(Brokered(world.lab.nodes["host-a"].dir / "broker.sock").open(Path(place)))
    assert e.value.code in {"netns.kind", "netns.name", "netns.unknown"}


@pytest.mark.parametrize(
    "packet", [b"", b"x", b"[]", b"{}", b'{"op":"exec","place":"x"}', b'{"op":"open","place":7}', b'{"op":"open","place":"x","y":1}', b"x" * 40_000]
)
def test_the_broker_refuses_what_it_does_not_know(world: Mesh, packet: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(str(world.lab.nodes["host-a"].dir / "broker.sock"))
        s.send(packet)
        data, fds, _, _ = socket.recv_fds(s, 65536, 4)
    assert not fds
    assert packet == b"" or json.loads(data)["error"]["code"] == "broker.request"


def test_the_broker_leaves_the_hosts_own_namespace_alone(world: Mesh) -> None:
    node = world.lab.nodes["host-a"]
    side = Side(
        netns=node.netns, addresses=["100.64.9.9"], gateway_mac="02:00:00:00:00:01", mtu=1420, overlay4="100.64.0.0/10",
        overlay6="fd00::/48",
    )  # fmt: skip
    packet = Configure(side=side, add=True).model_dump_json().encode()
    ask = "import socket,sys; s=socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); s.send(sys.stdin.buffer.read()); print(s.recv(4096).decode())"
    done = run(["/usr/bin/python3", "-c", ask, str(node.dir / "broker.sock")], netns=node.netns, stdin=packet.decode())
    assert json.loads(done.stdout)["error"]["code"] == "netns.own"
    assert "100.64.9.9" not in run(["ip", "address"], netns=node.netns).stdout


def test_a_gone_broker_is_said_and_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RetinueError) as e:
        Brokered(tmp_path / "none.sock").mac("web")
    assert e.value.code == "broker.gone"
