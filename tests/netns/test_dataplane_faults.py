"""The data plane under faults: flushed rules, a killed agent, a killed engine, vanished namespaces, leftovers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.plane_rig import Host, Rig, echo, inside, ip, ports, until

pytestmark = pytest.mark.netns


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as built:
        yield built


def nft(ns: str, *args: str) -> str:
    done = subprocess.run(["ip", "netns", "exec", ns, "nft", *args], check=True, capture_output=True, text=True)
    return done.stdout


class Stream:
    """Sends numbered datagrams from one workload to another and remembers which arrived."""

    def __init__(self, rig: Rig, src: str, dst: str, port: int, interval: float = 0.005) -> None:
        self._send, self._receive = rig.udp(src), rig.udp(dst, port)
        self._to, self._interval = (rig.address(dst), port), interval
        self.sent = 0
        self.arrived: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._receive.settimeout(0.1)
        self._threads = [threading.Thread(target=self._sending), threading.Thread(target=self._receiving)]
        for thread in self._threads:
            thread.start()

    def _sending(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._send.sendto(str(self.sent).encode(), self._to)
            except OSError:
                pass
            self.sent += 1

    def _receiving(self) -> None:
        while True:
            try:
                number = int(self._receive.recv(100))
            except TimeoutError:
                if self._stop.is_set():
                    return
                continue
            self.arrived.append((time.monotonic(), number))

    def finish(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def since(self, moment: float) -> int:
        return sum(at > moment for at, _ in self.arrived)

    @property
    def lost(self) -> list[int]:
        seen = {number for _, number in self.arrived}
        return [n for n in range(self.sent) if n not in seen]


def without_plane(host: Host) -> None:
    """Stop the agent's part so that it cannot repair anything; what it set up stays."""
    host.kill()


@pytest.mark.parametrize("family", [4, 6])
def test_flushed_everywhere_and_nobody_to_repair_it_nothing_passes(rig: Rig, family: int) -> None:
    rig.apply(("web", "api", ports("tcp/8080")), ("web", "batch", ports("tcp/8080")))
    taps = [rig.tap("api"), rig.tap("batch")]
    with rig.server("api", 8080, family), rig.server("batch", 8080, family):
        far, near = rig.connect("web", "api", 8080, family), rig.connect("web", "batch", 8080, family)
        assert echo(far) == echo(near) == b"ping"
        for host in rig.hosts.values():
            without_plane(host)
            nft(host.ns, "flush", "ruleset")
        for tap in taps:
            list(tap.packets())
        for sock in (far, near):
            sock.settimeout(0.5)
            sock.sendall(b"after the flush")
        for src, dst in (("batch", "api"), ("web", "api"), ("web", "batch")):
            with pytest.raises(OSError):
                rig.connect(src, dst, 8080, family, timeout=0.5)
        assert [list(tap.packets()) for tap in taps] == [[], []]
    for host in rig.hosts.values():  # a new agent finds the world as it is and puts it right
        host.launch()
        host.ask("start")
    rig.apply()
    with rig.server("api", 8080, family), rig.connect("web", "api", 8080, family) as sock:
        assert echo(sock) == b"ping"


def test_the_rules_are_back_soon_after_a_flush(rig: Rig) -> None:
    rig.apply(("web", "api", ports("tcp/8080")))
    tap = rig.tap("api")
    for host in rig.hosts.values():
        nft(host.ns, "flush", "ruleset")
    for host in rig.hosts.values():
        assert until(lambda host=host: "chain verdict4" in nft(host.ns, "list", "ruleset"), timeout=5)
        assert until(lambda host=host: "firewall.restored" in host.ask("events"))
    with pytest.raises(ConnectionRefusedError):
        rig.connect("batch", "api", 8080)
    assert list(tap.packets()) == []
    with rig.server("api", 8080), rig.connect("web", "api", 8080) as sock:
        assert echo(sock) == b"ping"


def test_routes_rules_and_links_that_somebody_removed_come_back(rig: Rig) -> None:
    rig.apply(("web", "api", ports("tcp/8080")))
    host = rig.hosts["b"]
    api = next(line.split()[2] for line in shown(host, "route", "show", "table", "21000").splitlines() if "rt" in line)
    wrecks = (
        ["rule", "del", "priority", "110"], ["rule", "del", "priority", "6"], ["rule", "add", "priority", "0", "lookup", "local"],
        ["-6", "route", "flush", "table", "21001"], ["rule", "del", "iif", api], ["link", "del", api],
        ["addr", "flush", "dev", "eth0", "scope", "link"],
    )  # fmt: skip
    for wreck in wrecks:
        ip(*wreck, ns=host.ns)
        host.ask("verify")
        assert host.ask("verify") == []
        with rig.server("api", 8080), rig.connect("web", "api", 8080) as sock:
            assert echo(sock) == b"ping"
    # The rule for packets the firewall has accepted, then the gates: nothing stands before them.
    assert [line.split(":")[0] for line in shown(host, "rule").splitlines()][:2] == ["6", "10"]


def shown(host: Host, *args: str) -> str:
    return subprocess.run(["ip", "-n", host.ns, *args], check=True, capture_output=True, text=True).stdout


def test_a_tampered_set_is_put_right(rig: Rig) -> None:
    rig.apply(("web", "api", ports("tcp/8080")))
    host = rig.hosts["b"]
    table = next(line.split()[2] for line in nft(host.ns, "list", "tables").splitlines() if "retinue" in line)
    assert until(lambda: host.ask("verify") == [])  # the table as it should be has been seen
    element = f"{rig.address('batch')} . {rig.address('api')} . tcp . 8080"
    nft(host.ns, "add", "element", "inet", table, "pair4", "{", element, "}")
    assert until(lambda: element not in nft(host.ns, "list", "set", "inet", table, "pair4"))


def own_table(host: Host) -> tuple[str, str]:
    """Its name and its handle: another handle means that it was put in place anew."""
    listed = json.loads(nft(host.ns, "-a", "-j", "list", "tables"))["nftables"]
    return next((o["table"]["name"], str(o["table"]["handle"])) for o in listed if o.get("table", {}).get("name", "").startswith("retinue"))


def test_commits_of_others_are_none_of_our_business_whenever_they_come(rig: Rig) -> None:
    host = rig.hosts["b"]
    nft(host.ns, "add", "table", "inet", "foreign")
    rig.apply(("web", "api", ports("tcp/8080")))
    before = own_table(host)
    for n in range(20):  # right after our own commit, and between two of ours
        nft(host.ns, "add", "chain", "inet", "foreign", f"x{n}")
        if n % 5 == 0:
            rig.apply(("web", "api", ports(f"tcp/{8080 + n}")))
    assert host.ask("verify") == []
    assert "firewall.restored" not in host.ask("events")
    assert own_table(host) == before


def test_a_set_tampered_with_right_after_a_change_is_put_right(rig: Rig) -> None:
    host = rig.hosts["b"]
    for n in range(3):
        rig.apply(("web", "api", ports(f"tcp/{8080 + n}")))
        element = f"{rig.address('batch')} . {rig.address('api')} . tcp . 8080"
        nft(host.ns, "add", "element", "inet", own_table(host)[0], "pair4", "{", element, "}")
        nft(host.ns, "add", "table", "inet", f"foreign{n}")
        assert until(lambda element=element: element not in nft(host.ns, "list", "set", "inet", own_table(host)[0], "pair4"))


def test_what_was_changed_while_messages_were_lost_is_put_right(rig: Rig) -> None:
    """The agent stands still, and more is committed than its socket holds; among it one element in our own table."""
    host = rig.hosts["b"]
    rig.apply(("web", "api", ports("tcp/8080")))
    assert host.ask("verify") == []
    name = own_table(host)[0]
    element = f"{rig.address('batch')} . {rig.address('api')} . tcp . 8080"
    flood = "".join(f"add chain inet flood x{n}\n" for n in range(4000))
    host.process.send_signal(signal.SIGSTOP)
    try:
        nft(host.ns, "add", "table", "inet", "flood")
        for text in (flood, f"add element inet {name} pair4 {{ {element} }}\n", "delete table inet flood\n", "add table inet flood\n"):
            subprocess.run(["ip", "netns", "exec", host.ns, "nft", "-f", "-"], check=True, input=text, text=True)
    finally:
        host.process.send_signal(signal.SIGCONT)
    assert until(lambda: element not in nft(host.ns, "list", "set", "inet", name, "pair4"))
    nft(host.ns, "add", "element", "inet", name, "pair4", "{", element, "}")  # and what comes later is known again
    assert until(lambda: element not in nft(host.ns, "list", "set", "inet", name, "pair4"))


def test_foreign_rules_are_left_alone_and_may_change_at_any_time(rig: Rig) -> None:
    ns = rig.hosts["a"].ns
    nft(ns, "add", "table", "inet", "foreign")
    nft(ns, "add", "chain", "inet", "foreign", "c", "{ type filter hook prerouting priority -200; }")
    nft(ns, "add", "rule", "inet", "foreign", "c", "meta", "mark", "set", "0x40")
    nft(ns, "add", "chain", "inet", "foreign", "late", "{ type filter hook postrouting priority 0; }")
    nft(ns, "add", "rule", "inet", "foreign", "late", "meta", "mark", "&", "0x40", "==", "0x40", "counter")
    before = nft(ns, "-s", "list", "table", "inet", "foreign")
    rig.apply(("web", "api", ports("tcp/8080")))
    with rig.server("api", 8080), rig.connect("web", "api", 8080) as sock:
        assert echo(sock) == b"ping"
        for n in range(5):
            nft(ns, "add", "chain", "inet", "foreign", f"x{n}")
        assert echo(sock) == b"ping"
        nft(ns, "delete", "chain", "inet", "foreign", "x0")
    for n in range(1, 5):
        nft(ns, "delete", "chain", "inet", "foreign", f"x{n}")
    rig.apply(("batch", "api", ports("tcp/8080")))
    assert nft(ns, "-s", "list", "table", "inet", "foreign") == before
    counted = json.loads(nft(ns, "-j", "list", "chain", "inet", "foreign", "late"))
    packets = next(e["counter"]["packets"] for o in counted["nftables"] if "rule" in o for e in o["rule"]["expr"] if "counter" in e)
    assert packets > 0  # the foreign mark came through our own marking


def test_kill_9_of_the_agent_and_its_restart_lose_nothing(rig: Rig) -> None:
    rig.apply(("web", "api", ports("udp/9000")))
    tap = rig.tap("batch")
    stream = Stream(rig, "web", "api", 9000)
    assert until(lambda: len(stream.arrived) > 20)
    host = rig.hosts["a"]
    pid = json.loads(next((host.dir / "run").glob("engine-*.json")).read_text())["pid"]
    for _ in range(3):
        host.kill()
        seen = len(stream.arrived)
        assert until(lambda seen=seen: len(stream.arrived) > seen + 20)
        host.launch()
        host.ask("start")
        host.apply(rig.plan("a"))
        with pytest.raises(ConnectionRefusedError):
            rig.connect("web", "batch", 8080)
    seen = len(stream.arrived)
    assert until(lambda: len(stream.arrived) > seen + 20)
    stream.finish()
    assert stream.lost == []
    assert not [p for p in tap.packets() if p[23] == 17]
    assert json.loads(next((host.dir / "run").glob("engine-*.json")).read_text())["pid"] == pid


def test_a_killed_engine_is_replaced_and_configured_again(rig: Rig) -> None:
    rig.apply(("web", "api", ports("tcp/8080", "udp/9000")))
    host = rig.hosts["a"]
    pid_file = next((host.dir / "run").glob("engine-*.json"))
    first = json.loads(pid_file.read_text())["pid"]
    os.kill(first, signal.SIGKILL)
    assert until(lambda: "device.restarted" in host.ask("events"), timeout=15)
    assert json.loads(pid_file.read_text())["pid"] != first

    def talks() -> bool:
        try:
            with rig.server("api", 8080), rig.connect("web", "api", 8080, timeout=2) as sock:
                return echo(sock) == b"ping"
        except OSError:
            return False

    assert until(talks, timeout=20)
    with pytest.raises(ConnectionRefusedError):
        rig.connect("batch", "api", 8080)


def test_a_vanished_namespace_is_noticed_and_a_new_one_of_that_name_served(rig: Rig) -> None:
    rig.apply(("batch", "api", ports("tcp/8080")), ("web", "api", ports("tcp/8080")))
    ns, host = rig.workloads["web"], rig.hosts["a"]
    ip("netns", "del", ns)
    assert until(lambda: "netns.gone web/0" in host.ask("events"))
    assert "web/0" in host.apply(rig.plan("a"))["failed"]
    ip("netns", "add", ns)
    rig.attach("web", "a")
    assert host.apply(rig.plan("a"))["failed"] == {}
    with rig.server("api", 8080):
        for name in ("web", "batch"):
            with rig.connect(name, "api", 8080) as sock:
                assert echo(sock) == b"ping"
    del host.attachments["web/0"]
    host.apply(rig.plan("a"))
    links = subprocess.run(["ip", "-n", ns, "-o", "link"], check=True, capture_output=True, text=True).stdout
    assert "rtn0" not in links


def test_clean_leaves_nothing(rig: Rig) -> None:
    host = rig.hosts["a"]
    rig.apply(("web", "api", ports("tcp/8080")))
    host.ask("clean")

    assert nft(host.ns, "list", "ruleset") == ""
    for family in ("-4", "-6"):
        rules = [line.split(":")[0] for line in shown(host, family, "rule").splitlines()]
        assert rules == (["0", "32766", "32767"] if family == "-4" else ["0", "32766"])
        assert "proto 82" not in shown(host, family, "route", "show", "table", "all")
    assert [line.split(":")[1].strip().split("@")[0] for line in shown(host, "-o", "link").splitlines()] == ["lo", "eth0"]
    assert not list((host.dir / "run").glob("*.json"))
    host.process.stdin.close()
    host.process.wait(5)
    host._close()
    # And leftovers of a killed agent are collected by the next one.
    host.launch()
    host.ask("start")
    rig.apply()
    host.kill()
    host.launch()
    host.ask("start")
    del host.attachments["batch/0"]
    host.apply(rig.plan("a"))
    assert sum("rt" in line.split(":")[1][:3] for line in shown(host, "-o", "link").splitlines()) == 1


def test_an_address_of_ours_that_arrives_elsewhere_is_dropped_and_neighbours_are_not(rig: Rig) -> None:
    """A28: the overlay range may be in use around us; only what is ours is filtered."""
    a, b = rig.hosts.values()
    rig.apply(("web", "api", ports("tcp/8080", "udp/9000")))
    ip("addr", "add", "100.64.200.1/24", "dev", "eth0", ns=a.ns)
    ip("addr", "add", "100.64.200.2/24", "dev", "eth0", ns=b.ns)
    subprocess.run(["ip", "netns", "exec", a.ns, "ping", "-c1", "-W2", "100.64.200.2"], check=True, capture_output=True)
    tap = rig.tap("api")
    # A machine on the underlay of b sends straight to the workload's address.
    ip("route", "add", f"{rig.address('api')}/32", "via", b.underlay[0], "dev", "eth0", "table", "main", ns=a.ns)
    ip("rule", "add", "to", rig.address("api"), "priority", "5", "lookup", "main", ns=a.ns)

    def bare() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, 36, 0x0200_0000)  # SO_MARK: forging our mark does not help either
        sock.bind((a.underlay[0], 0))
        return sock

    without_plane(a)  # it would put its rules back at once
    nft(a.ns, "flush", "ruleset")
    with inside(a.ns, bare) as sock:
        for _ in range(3):
            sock.sendto(b"bypass", (rig.address("api"), 9000))
    assert until(lambda: b.ask("counters")["verdicts"]["outside"] >= 1)
    assert list(tap.packets()) == []


def test_on_an_older_kernel_nothing_else_starts_to_forward(rig: Rig) -> None:
    host = rig.hosts["b"]
    host.finish()

    def setting(name: str) -> str:
        return inside(host.ns, lambda: Path(f"/proc/sys/net/ipv6/conf/{name}").read_text().strip())

    host.launch("--old-kernel")
    host.ask("start")
    rig.apply(("web", "api", ports("tcp/8080")))
    with rig.server("api", 8080, 6), rig.connect("web", "api", 8080, 6) as sock:
        assert echo(sock) == b"ping"
    assert (setting("all/forwarding"), setting("eth0/forwarding")) == ("1", "0")
    # A second network behind the host, which did not route before.
    other = rig.namespace("other")
    ip("link", "add", "eth1", "netns", host.ns, "type", "veth", "peer", "name", "eth0", "netns", other)
    for ns, device, address in ((host.ns, "eth1", "fd88::1/64"), (other, "eth0", "fd88::2/64")):
        ip("addr", "add", address, "dev", device, "nodad", ns=ns)
        ip("link", "set", device, "up", ns=ns)
    ip("-6", "route", "add", "default", "via", "fd88::1", ns=other)
    ip("-6", "route", "add", "fd88::/64", "via", host.underlay[1], ns=rig.hosts["a"].ns)

    def reaches(target: str) -> bool:
        argv = ["ip", "netns", "exec", other, "ping", "-c1", "-W1", target]
        return subprocess.run(argv, check=False, capture_output=True).returncode == 0

    assert until(lambda: reaches("fd88::1"))
    assert not reaches(rig.hosts["a"].underlay[1])
    host.kill()
    nft(host.ns, "flush", "ruleset")
    assert reaches(rig.hosts["a"].underlay[1])  # positive control: it is our rule that held it back
    host.launch("--old-kernel")
    host.ask("start")
    assert not reaches(rig.hosts["a"].underlay[1])
    host.ask("clean")
    assert setting("all/forwarding") == "0"
