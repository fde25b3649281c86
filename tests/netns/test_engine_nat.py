"""Mappings kept open through a NAT that forgets quickly, and devices with very many peers and addresses."""

from __future__ import annotations

import socket
import time
from ipaddress import ip_network
from pathlib import Path

import pytest

from tests.netns.engine_rig import (
    OURS,
    PORT,
    THEIRS,
    UAPI,
    End,
    Site,
    in_space,
    run,
    site,
    transfers,
    two_ends,
    uapi_ask,
    until,
)  # fmt: skip

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

alone = pytest.mark.parametrize("program", [OURS, THEIRS], ids=["ours", "theirs"])
FORGETS = 2  # seconds until the NAT drops an idle mapping
MASQUERADE = """
table inet nat {
  chain out { type nat hook postrouting priority 100; oifname "u1" masquerade; }
  chain in { type filter hook forward priority 0; policy drop; iifname "u0" accept; ct state established accept; }
}
"""


def behind_a_nat(s: Site, program: list[str], far_program: list[str]) -> tuple[End, End]:
    """A -- NAT -- B; only A knows an address of the other."""
    inside, middle, outside = s.space("in"), s.space("nat"), s.space("out")
    s.link(inside, middle, ("u0", "u0"))
    s.link(middle, outside, ("u1", "u0"))
    s.address(inside, "u0", "192.168.7.2/24")
    s.address(middle, "u0", "192.168.7.1/24")
    s.address(middle, "u1", "10.99.0.1/24")
    s.address(outside, "u0", "10.99.0.2/24")
    in_space(inside, "ip", "route", "add", "default", "via", "192.168.7.1")
    run("ip", "netns", "exec", middle, "nft", "-f", "-", stdin=MASQUERADE)
    for knob in ("ip_forward=1",):
        in_space(middle, "sysctl", "-qw", f"net.ipv4.{knob}")
    for name in ("udp_timeout", "udp_timeout_stream"):
        in_space(middle, "sysctl", "-qw", f"net.netfilter.nf_conntrack_{name}={FORGETS}")
    a, b = s.end(inside, 1, program), s.end(outside, 2, far_program)
    a.wg("peer", b.public, "endpoint", f"10.99.0.2:{PORT}", "allowed-ips", ",".join(b.tunnel))
    b.wg("peer", a.public, "allowed-ips", ",".join(a.tunnel))
    for end in (a, b):
        s.up(end)
    return a, b


def forgotten(b: End) -> bool:
    time.sleep(FORGETS + 1)  # silence is what is tested: any packet would renew the mapping
    return not b.pings("-c", "1", "-W", "0.5", "10.98.0.1")


def test_a_persistent_keepalive_holds_the_mapping_of_a_nat(tmp_path: Path) -> None:
    with site(tmp_path) as s:
        a, b = behind_a_nat(s, OURS, THEIRS)
        a.ping(b.tunnel[0])
        # The control: without keepalives the NAT forgets, and the outside cannot reach in.
        assert forgotten(b), "the NAT never forgets"
        a.wg("peer", b.public, "persistent-keepalive", "1")
        until(lambda: b.pings("-c", "1", "-W", "1", a.tunnel[0]), "no way in with keepalives")
        before = transfers(a)
        time.sleep(FORGETS * 2.5)  # silence is what is tested
        received, sent = transfers(a)
        assert (sent - before[1]) // 32 >= 3, "one empty packet a second"
        assert (sent - before[1]) % 32 == 0, "and nothing else"
        assert received - before[0] <= 32
        b.ping(a.tunnel[0])
        mapped = b.show("endpoints")[a.public][0]
        assert mapped.startswith("10.99.0.1:"), "seen as the NAT writes it"
        a.wg("peer", b.public, "persistent-keepalive", "off")
        assert a.show("persistent-keepalive")[b.public] == ["off"]
        assert forgotten(b), "keepalives go on"


@alone
def test_65536_addresses_of_one_peer_are_read_back(program: list[str], tmp_path: Path) -> None:
    with two_ends(program, THEIRS, tmp_path, outer=4) as (a, _):
        public = run("wg", "pubkey", stdin=run("wg", "genkey")).strip()
        v4 = [f"100.64.{n >> 8}.{n & 255}/32" for n in range(1 << 15)]
        v6 = [f"fd64::{n:x}/128" for n in range(1 << 15)]
        conf = tmp_path / "many.conf"
        conf.write_text(f"[Peer]\nPublicKey = {public}\nAllowedIPs = {', '.join(v4 + v6)}\n")
        run("wg", "addconf", a.interface, str(conf))
        shown = run("wg", "show", a.interface, "allowed-ips")
        row = next(line for line in shown.splitlines() if line.startswith(public)).split()[1:]
        assert {ip_network(x) for x in row} == {ip_network(x) for x in (*v4, *v6)}
        a.wg("peer", public, "remove")
        assert public not in run("wg", "show", a.interface, "allowed-ips")


@alone
def test_many_peers_with_many_addresses_are_read_back_whole(program: list[str], tmp_path: Path) -> None:
    with two_ends(program, OURS, tmp_path, outer=4) as (a, b):
        wanted = {}
        lines = []
        for n in range(400):
            public = f"{n:04d}" + "A" * 36 + "AAA="
            addresses = [f"100.{64 + k}.{n >> 8}.{n & 255}/32" for k in range(20)] + [f"fd64:{n:x}:{k:x}::/48" for k in range(20)]
            wanted[public] = {str(ip_network(x, strict=False)) for x in addresses}
            lines.append(f"[Peer]\nPublicKey = {public}\nEndpoint = 192.0.2.1:{n + 1}\nAllowedIPs = {', '.join(addresses)}\n")
        # fd64:N:K::/48 is one prefix whatever K: the last peer section to name it has it, once.
        conf = tmp_path / "many.conf"
        conf.write_text("\n".join(lines))
        run("wg", "addconf", a.interface, str(conf))
        shown = {key: set(rest) for key, rest in a.show("allowed-ips").items() if key != b.public}
        assert {k: len(v) for k, v in shown.items()} == {k: len(v) for k, v in wanted.items()}
        a.ping(b.tunnel[0])
        # What `wg` writes down it can set again, and it is the same.
        saved = tmp_path / "saved.conf"
        saved.write_text(run("wg", "showconf", a.interface))
        run("wg", "setconf", a.interface, str(saved))
        assert set(run("wg", "showconf", a.interface).splitlines()) == set(saved.read_text().splitlines())
        a.ping(b.tunnel[0])


def test_a_reader_that_stops_reading_holds_nobody_up(tmp_path: Path) -> None:
    """One client asks for a large report and reads nothing; others read and set meanwhile, and traffic goes on."""
    with two_ends(OURS, THEIRS, tmp_path, outer=4) as (a, b):
        public = run("wg", "pubkey", stdin=run("wg", "genkey")).strip()
        conf = tmp_path / "many.conf"
        conf.write_text(f"[Peer]\nPublicKey = {public}\nAllowedIPs = {', '.join(f'fd65::{n:x}/128' for n in range(20000))}\n")
        run("wg", "addconf", a.interface, str(conf))
        with socket.socket(socket.AF_UNIX) as lazy:
            lazy.connect(str(UAPI / f"{a.interface}.sock"))
            lazy.sendall(b"get=1\n\n")
            a.wg("peer", public, "remove")
            assert uapi_ask(a.interface, b"get=1\n\n").endswith(b"errno=0\n\n")
            a.ping(b.tunnel[0])
