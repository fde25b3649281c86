"""Rows about the network between the hosts, and about being stopped in one's tracks."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from mesh.lab_process import in_netns, ip_batch
from tests.chaos.impair import Profile
from tests.chaos.registry import Run, row
from tests.chaos.stage import Stage, cpu, rss, worst


@row("N1", "A bad network (seeded)", "delay 20+-5 ms, loss 2 % in bursts, 1 % doubled, 2 % reordered: no loss beyond the network's, 0 doubled deliveries, moves succeed", fast=True)
async def bad_network(stage: Stage, run: Run) -> None:
    profile = Profile(delay_ms=20, jitter_ms=5, loss=0.02, burst=2, duplicate=0.01, reorder=0.02)
    doubled = stage.duplicates()
    stage.impair("host-b", profile, run.seed)
    try:
        await stage.flowing("web-api", "web-tcp")
        begin, end = await stage.run_for(run.lasts(5))
        udp, tcp = worst(stage.tallies(begin, end, "web-api")), worst(stage.tallies(begin, end, "web-tcp"))
        moved = await stage.move("host-c")
        moved_back = await stage.move("host-b")
        run.note(udp_sent=udp["sent"], udp_lost=udp["lost"], udp_delay_ms=udp["delay_ms"], tcp_lost=tcp["lost"],
                 doubled=stage.duplicates() - doubled, move_released_ms=moved["released_ms"])  # fmt: skip
        run.check("UDP loses what the network loses", 0.002 <= udp["lost"] / max(1, udp["sent"]) <= 0.06)
        run.check("TCP loses nothing", tcp["lost"] == 0)
        run.check("0 doubled deliveries: the tunnel's replay window", stage.duplicates() == doubled)
        run.check("moves succeed over it", not moved["waiting_for"] and not moved_back["waiting_for"])
    finally:
        run.note(bridge=await stage.whole("host-b"))


@row("F10", "Suspend", "SIGSTOP of agent and engine: rekey <= 5 s after, nothing expired is used")
async def suspend(stage: Stage, run: Run) -> None:
    seconds = run.lasts(20)
    pids = [stage.agent("host-b").pid, stage.engine_pid("host-b")]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    began = time.time()
    await stage.flowing("web-api")
    run.note(stopped_s=seconds, back_s=max(f.gap_from(began) for f in stage.permitted("web-api")))
    run.check("back within 5 s", run.figures["back_s"] <= 5)
    # An open connection goes on when its sender tries again: the kernel's own timer, which has doubled up to two minutes.
    run.note(open_connections_back_s=await stage.flowing("web-tcp", timeout=150))
    if seconds < 600:
        run.caveat(f"stopped for {seconds:g} s, not 10 min (ARGS=\"--seconds 600\"); jumps of the boot clock are not made")


@row("F16", "Half-open peer", "one direction dropped: noticed <= 20 s (new handshakes on the wire), no queue growth, back at once when it heals", fast=True)
async def half_open(stage: Stage, run: Run) -> None:
    pid = stage.engine_pid("host-a")
    before = rss(pid)
    netns = stage.lab.nodes["host-b"].netns
    stage.cut("host-b", "out", only="meta l4proto udp")
    await asyncio.sleep(0.2)
    stage.sh(netns, f"nft '{COUNT}'")
    began = time.time()
    try:
        noticed = None
        while noticed is None and time.time() - began < 22:
            await asyncio.sleep(0.1)
            if await asyncio.to_thread(initiations, stage):
                noticed = time.time() - began
        run.note(noticed_s=noticed if noticed is not None else float("inf"), rss_growth_kib=(rss(pid) - before) // 1024)
        run.check("noticed within 20 s", noticed is not None and noticed <= 20)
        run.check("no memory taken for what cannot be sent", rss(pid) - before < 4 << 20)
    finally:
        stage.heal("host-b")
        stage.sh(netns, "nft delete table netdev count")
    healed = time.time()
    await stage.flowing("web-api", "web-tcp")
    run.note(back_s=max(f.gap_from(healed) for f in stage.permitted("web-api")))
    run.check("back within 6 s of the healing (retry 5 s)", run.figures["back_s"] <= 6)


COUNT = "table netdev count { chain in { type filter hook ingress device eth0 priority -1; meta l4proto udp @th,64,32 0x01000000 counter; }; }"


def initiations(stage: Stage) -> int:
    """Handshake initiations that have reached host-b's link since the counter was put there."""
    listed = stage.sh(stage.lab.nodes["host-b"].netns, "nft list chain netdev count in")
    return int(listed.split("packets ")[1].split()[0])


@row("F17", "Renumbering and roaming", "the address changes every 5 s: <= 1 probe lost a change on each flow", fast=True)
async def roaming(stage: Stage, run: Run) -> None:
    node = stage.lab.nodes["host-b"]
    changes = 2 if run.seconds is None else 10
    lost: list[int] = []
    home = node.v4
    stage.sh(node.netns, "sysctl -qw net.ipv4.conf.all.promote_secondaries=1 net.ipv4.conf.eth0.promote_secondaries=1")
    spare = [f"198.51.100.{230 + n}" for n in range(changes)]
    try:
        for fresh in spare:
            began = time.time()
            ip_batch([f"addr add {fresh}/24 dev eth0", f"addr del {home}/24 dev eth0"], netns=node.netns)
            home = fresh
            await asyncio.sleep(2.5 if run.seconds is None else 5)
            end = time.time() - 0.4
            lost.append(max(t.lost for t in stage.tallies(began, end, "web-api", "api-b")))
    finally:
        ip_batch([f"addr add {node.v4}/24 dev eth0", f"addr del {home}/24 dev eth0"], netns=node.netns)
    run.note(changes=changes, lost_per_change=lost)
    run.check("at most 1 probe lost a change on every flow", max(lost) <= 1)


@row("F18", "MTU black hole", "packets > 1300 B vanish without a word: TCP goodput back <= 10 s, 0 stalls")
async def black_hole(stage: Stage, run: Run) -> None:
    stage.impair("host-b", Profile(mtu=1300), run.seed)
    total = [0]
    space_b, space_a = stage.spaces["api", "host-b"], stage.spaces["web", "host-a"]
    listener = in_netns(space_b, lambda: socket.create_server((stage.mesh.addresses["api"][0], 8080)))
    stop = threading.Event()

    def sink() -> None:
        listener.settimeout(15)
        try:
            taken, _ = listener.accept()
        except OSError:
            return
        taken.settimeout(0.5)
        with taken:
            while not stop.is_set():
                try:
                    total[0] += len(taken.recv(1 << 16))
                except TimeoutError:
                    continue
                except OSError:
                    return

    def source() -> None:
        sock = in_netns(space_a, socket.socket)
        sock.settimeout(15)
        with sock:
            try:
                sock.connect((stage.mesh.addresses["api"][0], 8080))
                while not stop.is_set():
                    sock.send(b"x" * 65536)
            except OSError:
                return

    threads = [threading.Thread(target=f, daemon=True) for f in (sink, source)]
    for t in threads:
        t.start()
    began = time.monotonic()
    back = None
    while time.monotonic() - began < 15 and back is None:
        await asyncio.sleep(0.25)
        if total[0] > 1 << 20:
            back = time.monotonic() - began
    stop.set()
    listener.close()
    for t in threads:
        await asyncio.to_thread(t.join, 16)
    run.note(goodput_back_s=back if back is not None else float("inf"), bytes=total[0], bridge=await stage.whole("host-b"))
    run.check("1 MiB through within 10 s", back is not None and back <= 10)


@row("F27", "Flood of denied packets", "agent CPU <= 25 % of a core, log <= 1 MB/s, losses counted")
async def flood(stage: Stage, run: Run) -> None:
    space = stage.spaces["batch", "host-a"]
    code = ("import socket,time,sys\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\nend=time.time()+float(sys.argv[2])\nn=0\n"
            "while time.time()<end:\n  for p in range(2000):\n    s.sendto(b'x'*16,(sys.argv[1],1024+p))\n  n+=2000\nprint(n)\n")  # fmt: skip
    agent = stage.agent("host-a")
    seconds = run.lasts(5)
    used, size = cpu(agent.pid), agent.err.stat().st_size
    process = await asyncio.create_subprocess_exec(
        "nsenter", f"--net=/run/netns/{space}", "--", sys.executable, "-c", code, stage.mesh.addresses["api"][0], str(seconds), stdout=subprocess.PIPE
    )
    began = time.time()
    out, _ = await process.communicate()
    spent = time.time() - began
    run.note(denied_pps=int(int(out) / spent), agent_cpu_percent=100 * (cpu(agent.pid) - used) / spent,
             log_bytes_per_s=int((agent.err.stat().st_size - size) / spent), **worst(stage.tallies(began, time.time() - 0.3, "web-api")))  # fmt: skip
    status = await stage.lab.aretinue("host-a", "status")
    run.check("agent CPU 25 %", run.figures["agent_cpu_percent"] <= 25)
    run.check("log 1 MB/s", run.figures["log_bytes_per_s"] <= 1_000_000)
    run.check("the agent answers", status["ready"])
    if run.figures["denied_pps"] < 50_000:
        run.caveat(f"{run.figures['denied_pps']} packets/s, which is what one Python sender on a shared machine makes, not 50,000")


@row("F19", "Replayed, doubled and forged packets on the live path", "0 doubled deliveries with every frame doubled and reordered", fast=True)
async def doubled(stage: Stage, run: Run) -> None:
    """The 10^5 malformed datagrams and the replay of captures are attack tests (row F19a)."""
    before = stage.duplicates()
    stage.impair("host-b", Profile(delay_ms=3, duplicate=1.0, reorder=0.2), run.seed)
    try:
        await stage.flowing("web-api")
        begin, end = await stage.run_for(run.lasts(3))
        run.note(**worst(stage.tallies(begin, end, "web-api")), doubled=stage.duplicates() - before)
        run.check("0 delivered twice", stage.duplicates() == before)
        run.check("0 lost by the reordering", run.figures["lost"] == 0)
    finally:
        run.note(bridge=await stage.whole("host-b"))
