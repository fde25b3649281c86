"""The systemd units: how much they expose, and that everything works under their restrictions.

There is no service manager in a test, so tests/netns/confined.py carries the directives out.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mesh.lab import Lab
from mesh.lab_process import ProcessFailed, base_env, command, inside, run
from tests.netns.confined import UNITS, unit
from tests.netns.conftest import Mesh
from tests.netns.test_privileges import POLICY, hidden

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]

CA_USER, USER = 64998, 64999
EXPOSURE = {"retinue-agent": 1.9, "retinue-ca": 1.2, "retinue-broker": 2.2, "retinue-gateway": 1.4}


def test_every_unit_is_held_to_a_figure() -> None:
    assert {p.stem for p in UNITS.glob("*.service")} == EXPOSURE.keys()


@pytest.mark.parametrize(("name", "most"), EXPOSURE.items())
def test_exposure(name: str, most: float) -> None:
    done = run(["systemd-analyze", "security", "--offline=yes", str(UNITS / f"{name}.service")])
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) <= most


def test_the_units_are_well_formed(tmp_path: Path) -> None:
    """systemd-analyze verify says nothing, but for programs that are not installed under /usr/bin here."""
    for path in UNITS.glob("*.service"):
        shutil.copy(path, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, tmp_path.glob("*.service"))], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "is not executable" not in line and "retinue" in line]
    assert said == []


def confined(name: str, user: int, writable: Sequence[Path], argv: Sequence[str]) -> list[str]:
    script = Path(__file__).with_name("confined.py")
    return [sys.executable, str(script), name, str(user), ":".join(map(str, writable)), "--", *argv]


EXTRA = {"CONFINED_EXTRA": ",+dac_read_search"} if hidden() else {}


@pytest.fixture(scope="module")
def world() -> Iterator[Mesh]:
    with Lab(["host-a", "host-b"]) as lab:
        mesh = Mesh(lab)
        for directory in (lab.dir.parent, lab.dir, lab.dir / "nodes", *(n.dir for n in lab.nodes.values())):
            directory.chmod(0o711)
        (lab.dir / "notify").chmod(0o733)
        lab.ca("init", "--dir", str(lab.ca_dir), "--trust-domain", lab.trust_domain)
        own(lab.ca_dir, CA_USER)
        start(lab, "ca", "retinue-ca", CA_USER, [lab.ca_dir],
              [*command("retinue-ca"), "serve", "--dir", str(lab.ca_dir), "--listen", "0.0.0.0:8443"])  # fmt: skip
        for host in ("host-a", "host-b"):
            lab.enroll(host)
        node = lab.nodes["host-a"]
        brokers = node.dir / "broker"
        brokers.mkdir(mode=0o755)
        start(lab, "host-a", "retinue-broker", 0, [brokers],
              [*command("retinue-broker"), "--user", str(USER), "--socket", str(brokers / "broker.sock")])  # fmt: skip
        for path in (node.run_dir, node.state_dir):
            own(path, USER)
        start(lab, "host-a", "retinue-agent", USER, [node.state_dir, node.run_dir],
              [*command("retinue-agent"), "--state-dir", str(node.state_dir), "--run-dir", str(node.run_dir),
               "--broker", str(brokers / "broker.sock"), "--device", "userspace"], as_name="agent-host-a")  # fmt: skip
        lab.start_agent("host-b")
        mesh.apply(POLICY)
        spaces = {}
        for name, host in (("web", "host-a"), ("api", "host-b")):
            mesh.add(name, host)
            spaces[name] = mesh.place(name, host)
        mesh.serve(spaces["api"], "api")
        mesh.web = spaces["web"]  # type: ignore[attr-defined]
        yield mesh


def own(path: Path, user: int) -> None:
    for each in (path, *path.rglob("*")):
        os.chown(each, user, user, follow_symlinks=False)


def start(
    lab: Lab, node: str, name: str, user: int, writable: Sequence[Path], argv: Sequence[str], as_name: str | None = None
) -> None:
    here = lab.nodes[node]
    process = lab.spawn(
        confined(name, user, writable, argv), name=as_name or f"{name}-{node}", netns=here.netns, env={**here.env, **EXTRA}
    )
    os.chmod(lab.dir / "notify" / (as_name or f"{name}-{node}"), 0o622)
    process.wait_ready(40)


async def test_the_mesh_works_under_the_units(world: Mesh) -> None:
    for family in (0, 1):
        assert (await world.get(world.web, world.url("api", family))).status == 200  # type: ignore[attr-defined]
        assert (await world.get(world.web, world.url("api", family, port=8081))).status is None  # type: ignore[attr-defined]


async def test_a_move_works_under_the_units(world: Mesh) -> None:
    """The control plane writes, signs and publishes; the agent takes a namespace up and gives one away."""
    lab = world.lab
    away = lab.add_workload("web-elsewhere")
    lab.retinue("host-b", "attach", "web", "--netns", away)
    lab.ca("workload", "move", "web", "--to", "host-b", "--wait", "10")
    assert (await world.get(away, world.url("api", 0))).status == 200
    lab.ca("workload", "move", "web", "--to", "host-a", "--wait", "10")
    assert (await world.get(world.web, world.url("api", 1))).status == 200  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("process", "name"),
    [("retinue-ca-ca", "retinue-ca"), ("agent-host-a", "retinue-agent"), ("retinue-broker-host-a", "retinue-broker")],
)
def test_the_restrictions_are_in_force(world: Mesh, process: str, name: str) -> None:
    """Not of the launcher: of the very processes that served the tests above."""
    pid = world.lab.processes[process].pid
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    kept = len(unit(name)["CapabilityBoundingSet"][0].split()) + (1 if EXTRA else 0)
    assert int(status["CapBnd"], 16).bit_count() == kept
    root = next(line for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines() if line.split()[4] == "/")
    assert "ro" in root.split()[5].split(",")


ATTEMPTS = {
    "write": ("open('/etc/retinue-was-here', 'w')", {13, 30}),
    "ptrace": ("call(101, 0, 0, 0, 0)", {1}),
    "bpf": ("call(321, 0, 0, 0)", {1}),
    "keyctl": ("call(250, 0, -1, 0)", {1}),
    "mount": ("mount()", {1}),
    "unshare-user": ("call(272, 0x10000000)", {1}),
    "packet-socket": ("import socket; socket.socket(17, 3, 0)", {1, 97}),
    "executable-memory": ("import mmap; mmap.mmap(-1, 4096, prot=7)", {13, 1}),
    "kexec": ("call(320, -1, -1, 0, 0, 0)", {1}),
    "settime": ("import time; time.clock_settime(0, 0)", {1}),
}
PRELUDE = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    if libc.syscall(*(ctypes.c_long(w) for w in words)) == -1:
        raise OSError(ctypes.get_errno(), 'refused')
def mount():
    if libc.mount(b'none', b'/mnt', b'tmpfs', 0, None) != 0:
        raise OSError(ctypes.get_errno(), 'refused')
try:
    exec(sys.argv[1])
except OSError as e:
    print('refused', e.errno)
else:
    print('done 0')
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the syscall numbers of these attempts are x86-64's")
@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("name", ["retinue-ca", "retinue-agent", "retinue-gateway"])
def test_what_a_taken_over_daemon_cannot_do(name: str, attempt: str, tmp_path: Path) -> None:
    code, refused = ATTEMPTS[attempt]
    for directory in (tmp_path, *list(tmp_path.parents)[:3]):
        directory.chmod(stat.S_IMODE(directory.stat().st_mode) | 0o011)
    state = tmp_path / "state"
    state.mkdir()
    done = subprocess.run(
        inside(None, confined(name, USER, [state], [sys.executable, "-c", PRELUDE, code])), capture_output=True, text=True,
        env=base_env(EXTRA), timeout=60, check=True,
    )  # fmt: skip
    said, number = done.stdout.split()
    assert (said, int(number) in refused) == ("refused", True), done.stdout


def test_an_unrestricted_process_could_do_it() -> None:
    """Positive control: as root and unconfined, the attempts that change nothing lasting are let through."""
    for attempt in ("ptrace", "unshare-user", "executable-memory", "packet-socket"):
        done = run([sys.executable, "-c", PRELUDE, ATTEMPTS[attempt][0]])
        assert done.stdout.split() == ["done", "0"], attempt


def test_the_launcher_itself_refuses_an_unknown_unit() -> None:
    with pytest.raises(ProcessFailed):
        run([sys.executable, str(Path(__file__).with_name("confined.py")), "retinue-none", "0", "/tmp", "--", "true"])
