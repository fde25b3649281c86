"""The lab itself: it builds what it says, leaves nothing, and clears up only what is its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from identity.errors import BadInput, Conflict, NotFound, TimedOut
from mesh import lab_registry
from mesh.capture import Capture, send_clear
from mesh.lab import Lab
from mesh.lab_process import ProcessFailed, in_netns, run, start_time
from mesh.probe import HttpProber
from mesh.probe_pairs import Receiver, Sender


def ping(lab: Lab, node: str, address: str) -> bool:
    return run(["ping", "-c1", "-W1", address], netns=lab.netns(node), codes=(0, 1, 2)).returncode == 0


def test_two_labs_coexist_and_leave_nothing() -> None:
    before = (lab_registry.links(), lab_registry.tables())
    with Lab(["host-a", "host-b"]) as one, Lab(["host-a"], ca=False) as two:
        assert one.id != two.id
        for address in (one.nodes["host-b"].v4, one.nodes["host-b"].v6, one.nodes["ca"].v4):
            assert ping(one, "host-a", address)
        assert not ping(two, "host-a", one.nodes["host-b"].v4), "labs are apart"
        late = one.add_node("host-late")
        assert ping(one, "host-a", late.v6)
        space = one.add_workload("web")
        with pytest.raises(Conflict):
            one.add_workload("web")
        with pytest.raises(Conflict):
            one.add_node("host-a")
        with pytest.raises(BadInput):
            one.add_node("Host!")
        assert "lo" in run(["ip", "-o", "link"], netns=space).stdout
        sleeper = one.spawn(["sleep", "600"], name="sleeper", netns=space)
        orphan = run(["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], netns=space).stdout.strip()
        prefix, directory = one.entry.prefix, one.dir
    assert lab_registry.namespaces(prefix) == []
    assert not directory.exists()
    assert start_time(sleeper.pid) is None
    assert start_time(int(orphan)) is None, "what a child left in our namespace is ours to end"
    assert (lab_registry.links(), lab_registry.tables()) == before


def test_readiness_failures_and_logs() -> None:
    with Lab(["host-a"], ca=False) as lab:
        netns = lab.netns("host-a")
        service = [sys.executable, "-m", "mesh.demo_service", "--name", "x"]
        lab.spawn(service, name="x", netns=netns).wait_ready()
        taken = lab.spawn(service, name="y", netns=netns)
        with pytest.raises(ProcessFailed, match="cannot listen on port 8080"):
            taken.wait_ready()
        silent = lab.spawn(["sleep", "600"], name="z")
        with pytest.raises(TimedOut):
            silent.wait_ready(0.05)
        with pytest.raises(ProcessFailed, match="exit 3: no"):
            run(["sh", "-c", "echo no >&2; exit 3"])
        with pytest.raises(TimedOut):
            run(["sleep", "600"], timeout=0.05)
        with pytest.raises(NotFound):
            in_netns("no-such-namespace", lambda: None)
        lab.forget("x")
        lab.spawn(service, name="x", netns=netns).wait_ready()


def test_sweep_removes_what_a_killed_owner_left() -> None:
    script = (
        "from mesh.lab import Lab; import os, signal\n"
        "lab = Lab(['host-a'], ca=False).start(); p = lab.spawn(['sleep', '600'], name='s', netns=lab.netns('host-a'))\n"
        "print(lab.id, p.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    name, pid = done.stdout.split()
    entry = next(e for e in lab_registry.entries() if e.id == name)
    assert len(lab_registry.leftovers(entry)) >= 4, "positive control: there is something to remove"
    assert start_time(int(pid)) is not None
    assert Lab.sweep() == [name]
    assert lab_registry.leftovers(entry) == []
    assert start_time(int(pid)) is None


def test_sweep_spares_the_living_the_kept_and_reused_pids() -> None:
    with Lab([], ca=False) as lab:
        assert lab.id not in Lab.sweep(), "its owner lives"
        bystander = subprocess.Popen(["sleep", "600"])
        try:
            gone = lab_registry.create()
            gone.owner = (os.getpid(), 1)  # our pid, but another start time: that owner is gone
            gone.kept = True
            gone.processes = [(bystander.pid, 1)]
            gone.save()
            assert gone.id not in Lab.sweep()
            assert gone.id in Lab.sweep(kept=True)
            assert bystander.poll() is None, "a reused pid is not the process that was registered"
        finally:
            bystander.kill()
            bystander.wait()


def test_a_damaged_registry_file_still_leads_to_its_lab() -> None:
    entry = lab_registry.create()
    subprocess.run(["ip", "netns", "add", f"{entry.prefix}x"], check=True)
    entry.file.write_text("{")
    assert entry.id in Lab.sweep()
    assert lab_registry.namespaces(entry.prefix) == []


def test_keep_leaves_the_lab_until_it_is_asked_for() -> None:
    with Lab(["host-a"], ca=False, keep=True) as lab:
        process = lab.spawn(["sleep", "600"], name="s", netns=lab.netns("host-a"))
        entry = lab.entry
    assert process.running
    assert any("namespace" in x for x in lab_registry.leftovers(entry))
    assert json.loads(Path(entry.file).read_text())["kept"] is True
    lab_registry.remove(entry)
    assert lab_registry.leftovers(entry) == []
    assert process.wait() == -signal.SIGKILL


def test_the_capture_sees_what_is_in_clear_and_counts_each_frame_once() -> None:
    with Lab(["host-a", "host-b"], ca=False) as lab:
        a, b = lab.nodes["host-a"], lab.nodes["host-b"]
        with Capture(lab.switch, {"marker": b"MARKER-1", "end": b"END-1", "never": b"NEVER"}) as capture:
            for to in (b.v4, b.v6):
                send_clear(a.netns, to, b"xx MARKER-1 xx", count=3, port=7)
            send_clear(a.netns, b.v4, b"\4\0\0\0" + b"\0" * 40, count=2)
            send_clear(a.netns, b.v4, b"END-1")
            capture.wait_hit("end")
            seen = capture.take()
            assert seen.hits["marker"] >= 6
            assert seen.hits["never"] == 0
            assert seen.tunnel_frames == 2
            assert seen.dropped == 0
            with pytest.raises(TimedOut):
                capture.wait_hit("never", 0.02)
        assert capture.stop().hits["marker"] == 0, "counted once"


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_probe_pairs_count_what_arrives(transport: str, family: str) -> None:
    async with Lab(["host-a", "host-b"], ca=False) as lab:
        a, b = lab.nodes["host-a"], lab.nodes["host-b"]
        to = getattr(b, family)
        async with Receiver(transport, 7000, netns=b.netns, address=to) as receiver:  # type: ignore[arg-type]
            async with (
                Sender(transport, to, 7000, tag="good", netns=a.netns, bind=getattr(a, family)) as good,  # type: ignore[arg-type]
                Sender(transport, to, 7001, tag="bad", netns=a.netns) as bad,  # type: ignore[arg-type]
            ):
                await receiver.wait("good", 40)
                await receiver.wait_more("good", 1)
            assert good.lost(receiver.of("good", getattr(a, family))) in ([], [good.sent - 1])
            assert receiver.of("good").duplicates == 0
            assert receiver.of("bad").seqs == set()
            assert bad.errors["ECONNREFUSED"] > 0


async def test_the_prober_tells_lost_from_retried() -> None:
    async with Lab(["host-a", "host-b"], ca=False) as lab:
        a, b = lab.nodes["host-a"], lab.nodes["host-b"]
        argv = [sys.executable, "-m", "mesh.demo_service", "--name", "svc"]
        service = lab.spawn(argv, name="svc", netns=b.netns)
        service.wait_ready()
        prober = HttpProber([f"http://{b.v4}:8080/", f"http://[{b.v6}]:8080/"], netns=a.netns, window=0.3, timeout=0.1).start()
        await prober.answered(30)
        service.send(signal.SIGSTOP)
        try:
            while not prober.lost_so_far:
                await prober.progressed()
        finally:
            service.send(signal.SIGCONT)
        await prober.answered(20)
        result = await prober.stop()
        assert result.sent == result.answered + result.lost
        assert result.lost == len(result.lost_seqs) > 0
        assert result.gap_ms >= 200
        assert result.served_by == {"svc": result.answered}
