"""A new engine process takes over from the running one under traffic; a bad one changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.engine_rig import OURS, UAPI, End, in_space, ours_set, run, site, two_ends, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]
FLOWS = Path(__file__).with_name("handover_flows.py")
RATE = 2000


class Flow:
    """One sender and one receiver."""

    def __init__(self, kind: str, source: End, target: End, family: int, port: int, rate: float) -> None:
        address = target.tunnel[family]
        self.receiver = self._start(target, f"{kind}-receive", address, port)
        assert self.receiver.stdout is not None
        assert self.receiver.stdout.readline() == "ready\n"
        self.sender = self._start(source, f"{kind}-send", address, port, rate)

    @staticmethod
    def _start(end: End, what: str, address: str, port: int, *more: object) -> subprocess.Popen[str]:
        argv = ["ip", "netns", "exec", end.name, sys.executable, str(FLOWS), what, address, str(port), *map(str, more)]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def finish(self) -> dict:
        assert self.sender.stdin is not None
        self.sender.stdin.close()
        found: dict = {}
        for process in (self.sender, self.receiver):
            assert process.stdout is not None
            found |= {("got" if process is self.receiver and k == "digest" else k): v
                      for k, v in json.loads(process.stdout.readline()).items()}  # fmt: skip
        return found

    def close(self) -> None:
        for process in (self.sender, self.receiver):
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@contextlib.contextmanager
def traffic(a: End, b: End, family: int) -> Iterator[list[Flow]]:
    """UDP both ways and a TCP stream."""
    flows: list[Flow] = []
    try:
        flows.append(Flow("udp", a, b, family, 9001, RATE))
        flows.append(Flow("udp", b, a, family, 9002, RATE))
        flows.append(Flow("tcp", a, b, family, 9003, 500))
        yield flows
    finally:
        for flow in flows:
            flow.close()


def successor(end: End, program: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", end.name, *program, "--take-over", end.interface],
        env={**os.environ, "WG_PROCESS_FOREGROUND": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def hand_over(end: End, program: list[str] = OURS) -> None:
    """The old process ends by itself once the new one owns the tunnel."""
    new = successor(end, program)
    try:
        assert end.process.wait(20) == 0
    except BaseException:
        new.kill()
        print(new.communicate()[1])
        raise
    assert new.poll() is None
    assert new.stderr is not None
    new.stderr.close()
    end.process = new  # type: ignore[assignment]  # of text instead of bytes, which nobody reads


def check(flows: list[Flow]) -> list[dict]:
    found = [flow.finish() for flow in flows]
    for one in found[:2]:
        assert (one["sent"] - one["seen"], one["twice"]) == (0, 0), found
        assert one["reordered"] == 0, found
        assert one["sent"] > RATE, "the flow was there"
    assert found[2]["digest"] == found[2]["got"], found
    assert found[2]["bytes"] > 100_000, found
    return found


@pytest.mark.parametrize(("family", "cipher"), [(0, "aes-256-gcm"), (1, "chacha20poly1305")])
def test_twenty_hand_overs_lose_nothing(tmp_path: Path, family: int, cipher: str) -> None:
    with two_ends(OURS, OURS, tmp_path, outer=(4, 6)[family], psk=True) as (a, b):
        for end, far in ((a, b), (b, a)):
            ours_set(end, f"public_key={bytes_of(far.public)}", f"retinue_cipher={cipher}", "persistent_keepalive_interval=1")
        a.ping(b.tunnel[family])
        b.ping(a.tunnel[family])
        before = [run("wg", "show", e.interface, "dump").splitlines()[0] for e in (a, b)]
        with traffic(a, b, family) as flows:
            for n in range(20):
                time.sleep(0.1)  # the flows go on between two hand-overs
                hand_over((a, b)[n % 2])
                if n in {6, 13}:  # a new session is being made while the other end is replaced
                    ours_set((a, b)[n % 2], f"public_key={bytes_of((b, a)[n % 2].public)}", "persistent_keepalive_interval=2")
            found = check(flows)
        print(json.dumps(found))
        assert [run("wg", "show", e.interface, "dump").splitlines()[0] for e in (a, b)] == before
        for end in (a, b):
            assert (UAPI / f"{end.interface}.sock").exists()


def bytes_of(public: str) -> str:
    import base64

    return base64.b64decode(public).hex()


BAD = {
    "crashes": "s.recv(100); raise SystemExit(9)",
    "answers garbage": "s.recv(100); s.sendall(b'x' * 4096); time.sleep(0.3)",
    "says nothing": "s.recv(100); time.sleep(3)",
    "reads all, says the wrong word": "s.recv(1 << 20); s.sendall(b'yours'); time.sleep(0.3)",
    "foreign format": "assert s.makefile('rb').read() == b'errno=-93\\n\\n'",
}


def test_a_bad_successor_changes_nothing(tmp_path: Path) -> None:
    with two_ends(OURS, OURS, tmp_path, outer=4) as (a, b):
        a.ping(b.tunnel[0])
        b.ping(a.tunnel[0])
        with traffic(a, b, 0) as flows:
            for name, does in BAD.items():
                number = 2 if name == "foreign format" else 1
                path = UAPI / f"{a.interface}.sock"
                code = (f"import socket, time; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); "
                        f"s.sendall(b'retinue_take_over=1\\nformat={number}\\n\\n'); {does}")  # fmt: skip
                done = subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
                assert done.returncode == (9 if name == "crashes" else 0), name
                assert a.process.poll() is None, name
                until(lambda: run("wg", "show", a.interface, "peers"), name)
            with socket.socket(socket.AF_UNIX) as s:  # a request that is cut off
                s.connect(str(UAPI / f"{a.interface}.sock"))
                s.sendall(b"retinue_take_over=1\nfor")
            hand_over(a)  # and a good one still may
            found = check(flows)
        print(json.dumps(found))


def test_another_user_is_refused(tmp_path: Path) -> None:
    with two_ends(OURS, OURS, tmp_path, outer=4) as (a, b):
        a.ping(b.tunnel[0])
        path = UAPI / f"{a.interface}.sock"
        # Even with the file wide open, as a careless administrator may leave it.
        mode, above = path.stat().st_mode, UAPI.stat().st_mode
        try:
            path.chmod(0o666)
            UAPI.chmod(0o755)
            code = (f"import os, socket; os.setgroups([]); os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); "
                    "s.sendall(b'retinue_take_over=1\\nformat=1\\n\\n'); print(s.makefile('rb').read())")  # fmt: skip
            assert run(sys.executable, "-c", code).strip() == repr(b"errno=-13\n\n")
        finally:
            path.chmod(mode)
            UAPI.chmod(above)
        a.ping(b.tunnel[0])

DRIVER = """
import asyncio, json, os, shutil, sys
from pathlib import Path
from mesh.devices import DeviceConfig
from mesh.devices.userspace import UserspaceDevice
run, source = Path(sys.argv[1]), sys.argv[2]
program = run / "retinue-engine"
def device():
    return UserspaceDevice(DeviceConfig("rtup0", 1420, 51833, lambda: bytes([7] * 32), run, program))
def replace(text):
    new = run / "new"
    new.write_text(text)
    new.chmod(0o755)
    new.replace(program)  # as a package does: the running program keeps its file
GOOD = f'#!/bin/sh\\nexec {source} "$@"\\n'
async def main():
    said = {}
    replace(GOOD)
    first = device()
    said["adopted"] = [await first.start()]
    pids = [first.running.pid]
    await first.stop(clean=False)
    same = device()  # an agent that starts again with the same engine
    said["adopted"].append(await same.start())
    pids.append(same.running.pid)
    await same.stop(clean=False)
    replace('#!/bin/sh\\n[ "$1" = --version ] && echo retinue-engine 9.9 && exit\\necho cannot >&2; exit 3\\n')
    bad = device()
    said["adopted"].append(await bad.start())
    pids.append(bad.running.pid)
    said["held_back"] = bad.held_back
    await bad.stop(clean=False)
    replace(GOOD + "# another build\\n")
    good = device()
    said["adopted"].append(await good.start())
    pids.append(good.running.pid)
    said["cleared"] = good.held_back
    said["key"] = (await good.read()).public_key is not None
    said["record"] = json.loads((run / "engine-rtup0.json").read_text())["pid"] == pids[-1]
    await good.stop(clean=True)
    print(json.dumps(said | {"same": [pid == pids[0] for pid in pids]}))
asyncio.run(main())
"""


def test_an_agent_that_starts_anew_upgrades_the_engine_or_says_why_not(tmp_path: Path) -> None:
    with site(tmp_path) as s:
        space = s.space("u")
        said = json.loads(in_space(space, sys.executable, "-c", DRIVER, str(tmp_path), OURS[0]))
    assert said["adopted"] == [False, True, True, True]
    assert said["same"] == [True, True, True, False], said
    assert "cannot" in said["held_back"]
    assert (said["cleared"], said["key"], said["record"]) == (None, True, True)
