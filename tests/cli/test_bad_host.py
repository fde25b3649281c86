"""What a host that is not fit gets: privilege, ports, damaged files. Real programs in a lab; nothing is left or changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.lab import Lab, Node
from mesh.lab_process import base_env, command, inside, run

pytestmark = pytest.mark.netns
HOLD = "import socket, sys, time; s = socket.socket(socket.AF_INET6, socket.{kind}); s.bind(('::', {port})); {more}; print('held', flush=True); time.sleep(600)"
WITHOUT = {
    "CAP_NET_ADMIN": ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"],
    "root": ["setpriv", "--reuid=65534", "--clear-groups", "--"],
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(["host-a"], trust_domain="bad.test") as made:
        made.start_ca()
        made.enroll("host-a")
        yield made


@pytest.fixture
def host(lab: Lab) -> Node:
    return lab.nodes["host-a"]


def call(host: Node, *argv: str, before: list[str] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    words = [*(before or []), *command(argv[0]), *argv[1:]]
    return run(words, netns=host.netns, env=base_env(host.env | env), codes=range(256))


def refused(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    assert "Traceback" not in done.stderr
    line = next(x for x in done.stderr.splitlines() if x.startswith("error["))
    assert any(x.startswith("hint: ") for x in done.stderr.splitlines()), done.stderr
    return done.returncode, line[len("error[") : line.index("]")]


def traces(host: Node) -> tuple[str, ...]:
    """What a start could leave: links, tables, rules of routing, programs in the namespace."""
    texts = [run(words, netns=host.netns).stdout for words in
             (["ip", "-o", "link"], ["nft", "list", "tables"], ["ip", "rule"], ["ip", "-6", "rule"])]  # fmt: skip
    inode = os.stat(f"/run/netns/{host.netns}").st_ino
    engines = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _runs_engine(p, inode)]
    return (*texts, str(engines))


def _runs_engine(process: Path, inode: int) -> bool:
    try:
        return (process / "ns/net").stat().st_ino == inode and b"retinue-engine" in (process / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.fixture
def readable() -> Callable[[str], None]:
    """Skip what another user does when the checkout lies where no other user may look, as below /root."""

    def check(lacking: str) -> None:
        probe = subprocess.run([*WITHOUT[lacking], *command("retinue"), "--version"], capture_output=True, check=False)
        if probe.returncode:
            pytest.skip("another user cannot read this checkout")

    return check


@pytest.mark.parametrize(("lacking", "argv", "code"), [
    ("CAP_NET_ADMIN", ("retinue-agent",), "firewall.privilege"),
    ("CAP_NET_ADMIN", ("retinue", "demo"), "demo.preflight"),
    ("root", ("retinue-agent",), "state.privilege"),
    ("root", ("retinue", "demo"), "demo.preflight"),
    ("root", ("retinue", "status"), "agent.privilege"),
    ("root", ("retinue", "run", "--as", "web", "--", "true"), "run.namespace"),
])  # fmt: skip
def test_a_missing_privilege(
    lab: Lab, host: Node, readable: Callable[[str], None], lacking: str, argv: tuple[str, ...], code: str
) -> None:
    readable(lacking)
    before = traces(host)
    assert refused(call(host, *argv, before=WITHOUT[lacking])) == (4, code)
    assert traces(host) == before


@pytest.mark.parametrize("lacking", [*WITHOUT])
def test_the_engine_without_privilege(host: Node, readable: Callable[[str], None], lacking: str) -> None:
    readable(lacking)
    done = call(host, "retinue-engine", "-f", "badx0", before=WITHOUT[lacking], WG_UAPI_DIR=str(host.run_dir))
    assert done.returncode == 4, done
    assert "hint: " in done.stderr


def test_the_demo_without_a_tun_device() -> None:
    script = 'mount -t tmpfs none /dev/net && exec "$@"'
    done = run(["unshare", "-m", "sh", "-c", script, "sh", *command("retinue"), "demo", "--json"], codes=range(256))
    error = json.loads(done.stderr)["error"]
    assert (done.returncode, done.stdout, error["code"]) == (4, "", "demo.preflight")
    assert "/dev/net/tun" in error["message"]
    assert "modprobe tun" in error["hint"]


@pytest.fixture
def hold(lab: Lab, host: Node) -> Callable[[str, int], None]:
    """Take a port in the host's namespace."""

    def take(kind: str, port: int) -> None:
        more = "s.listen()" if kind == "SOCK_STREAM" else "pass"
        argv = inside(host.netns, [sys.executable, "-c", HOLD.format(kind=kind, port=port, more=more)])
        holders.append(subprocess.Popen(argv, stdout=subprocess.PIPE))
        assert holders[-1].stdout is not None
        assert holders[-1].stdout.readline() == b"held\n"

    holders: list[subprocess.Popen[bytes]] = []
    yield take
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_a_taken_tunnel_port(lab: Lab, host: Node, hold: Callable[[str, int], None]) -> None:
    before = traces(host)
    hold("SOCK_DGRAM", 51820)
    assert refused(call(host, "retinue-agent")) == (1, "device.port_taken")
    assert traces(host) == before


def test_a_second_agent(lab: Lab, host: Node) -> None:
    lab.start_agent("host-a")
    try:
        before = traces(host)
        assert refused(call(host, "retinue-agent")) == (1, "agent.running")
        assert traces(host) == before
        assert call(host, "retinue", "status", "--check").returncode == 0
        assert refused(call(host, "retinue", "attach", "web", "--netns", "nowhere")) == (1, "netns.unknown")
        assert refused(call(host, "retinue", "svid", "fetch", "nobody")) == (1, "svid.unknown")
        assert refused(call(host, "retinue", "explain", "nobody", "nobody", "80")) == (1, "explain.not_here")
        assert refused(call(host, "retinue", "run", "--as", "nobody", "--wait", "0.1", "--", "true")) == (5, "attach.timeout")
        assert refused(call(host, "retinue", "attach", "../x", "--host")) == (2, "name.workload")
    finally:
        assert call(host, "retinue", "down").returncode == 0


@pytest.mark.parametrize(("file", "code"), [
    ("endpoint.json", "state.endpoint"), ("tls.key", "state.key"), ("tunnel.key", "state.key"), ("enroll.key", "state.key"),
    ("bundle", "state.altered"), ("record", "state.altered"), ("chain.pem", "state.altered"), ("epochs.json", "state.epochs"),
])  # fmt: skip
def test_a_truncated_state_file(lab: Lab, host: Node, file: str, code: str) -> None:
    _with_file(host, file, lambda data: data[: len(data) // 2], {(78, code)})


@pytest.mark.parametrize("file", ["endpoint.json", "tls.key", "tunnel.key", "enroll.key", "bundle", "record", "chain.pem", "epochs.json"])
def test_an_altered_state_file(lab: Lab, host: Node, file: str) -> None:
    """One character in the middle is another one."""

    def alter(data: bytes) -> bytes:
        at = next(i for i in range(len(data) // 2, len(data)) if chr(data[i]).isalnum())
        return data[:at] + (b"7" if data[at : at + 1] != b"7" else b"5") + data[at + 1 :]

    _with_file(host, file, alter, {(78, f"state.{c}") for c in ("altered", "key", "foreign", "endpoint", "epochs")})


def _with_file(host: Node, file: str, change: Callable[[bytes], bytes], allowed: set[tuple[int, str]]) -> None:
    path = host.state_dir / file
    missing = not path.exists()
    if missing:  # epochs.json comes with the first start
        path.write_text('{"version": 1, "epochs": {"web/0": 3}}')
        path.chmod(0o600)
    good, before = path.read_bytes(), traces(host)
    bad = change(good)
    assert bad != good
    path.write_bytes(bad)
    try:
        assert refused(call(host, "retinue-agent")) in allowed
        assert path.read_bytes() == bad, "evidence is not overwritten"
        assert traces(host) == before
    finally:
        path.write_bytes(good)
        if missing:
            path.unlink()
