"""Counters and noted flows read over netlink, against what nft lists of the same table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.netns

TABLE = """
table inet t {
    counter a { packets 5 bytes 10
    }
    counter b { packets 7000000000 bytes 99
    }
    quota q { over 100 mbytes
    }
    set denied4 { type ipv4_addr . ipv4_addr . inet_proto . inet_service
        flags timeout,dynamic
        counter
        timeout 5m
    }
    set denied6 { type ipv6_addr . ipv6_addr . inet_proto . inet_service
        flags timeout,dynamic
        counter
        timeout 5m
    }
    set many4 { type ipv4_addr . ipv4_addr . inet_proto . inet_service
    }
    set other { type ipv4_addr
        elements = { 10.0.0.1 }
    }
    chain c { type filter hook output priority 0
        meta l4proto { tcp, udp } update @denied4 { ip saddr . ip daddr . meta l4proto . th dport }
        meta l4proto { tcp, udp } update @denied6 { ip6 saddr . ip6 daddr . meta l4proto . th dport }
    }
}
"""
READ = """
import json, sys
from mesh import nft_counts
sets = {n: [(e.src, e.dst, e.proto, e.port, e.packets) for e in nft_counts.elements("t", n)] for n in json.loads(sys.argv[1])}
print(json.dumps([nft_counts.counters("t"), nft_counts.counters("none"), sets]))
"""


@pytest.fixture
def space() -> Iterator[str]:
    name = "rtntest-counts"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def inside(space: str, *command: str, text: str | None = None) -> str:
    return subprocess.run(["ip", "netns", "exec", space, *command], check=True, capture_output=True, text=True, input=text).stdout


def test_they_are_what_nft_lists(space: str) -> None:
    inside(space, "ip", "link", "set", "lo", "up")
    many = {f"10.{n >> 8}.{n & 255}.1 . 10.0.0.2 . {('tcp', 'udp')[n % 2]} . {n}" for n in range(1, 3000)}
    inside(space, "nft", "-f", "-", text=TABLE + f"add element inet t many4 {{ {', '.join(sorted(many))} }}\n")
    send = "import socket, sys\nfor f, to in ((2, '127.0.0.1'), (10, '::1')):\n for p, n in ((9, 3), (65535, 1)):\n  for _ in range(n): socket.socket(f, 2).sendto(b'x', (to, p))"
    inside(space, sys.executable, "-c", send)
    names = ["denied4", "denied6", "many4", "other", "none"]
    counters, none, sets = json.loads(inside(space, sys.executable, "-c", READ, json.dumps(names)))
    assert counters == {"a": 5, "b": 7_000_000_000}
    assert none == {}
    assert sorted(map(tuple, sets["denied4"])) == [("127.0.0.1", "127.0.0.1", 17, 9, 3), ("127.0.0.1", "127.0.0.1", 17, 65535, 1)]
    assert sorted(map(tuple, sets["denied6"])) == [("::1", "::1", 17, 9, 3), ("::1", "::1", 17, 65535, 1)]
    listed = json.loads(inside(space, "nft", "-j", "list", "set", "inet", "t", "denied4"))["nftables"][1]["set"]["elem"]
    assert sorted((*e["elem"]["val"]["concat"][:2], e["elem"]["counter"]["packets"]) for e in listed) == sorted(
        (src, dst, packets) for src, dst, _, _, packets in sets["denied4"]
    )
    number = {"tcp": 6, "udp": 17}
    assert {(s, d, p, port) for s, d, p, port, _ in sets["many4"]} == {
        (src, dst, number[proto], int(port)) for src, dst, proto, port in (one.split(" . ") for one in many)
    }
    assert len(sets["many4"]) == len(many), "a dump of several messages"
    assert sets["other"] == sets["none"] == []


def test_without_privilege_it_is_refused(space: str) -> None:
    code = "import os\nfrom mesh import nft_counts\nfrom identity.errors import NoPrivilege\nos.setuid(65534)\ntry: nft_counts.counters('t')\nexcept NoPrivilege as e: print(e.code)"
    assert inside(space, sys.executable, "-c", code).strip() == "firewall.privilege"
