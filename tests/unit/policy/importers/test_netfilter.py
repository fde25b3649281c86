from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from policy.importers.model import Imported, SourceRefused
from policy.importers.netfilter.iptables import import_iptables
from policy.importers.netfilter.nft import import_nft

Parts = Callable[[Imported, str, str], dict[str, str]]


def ipt(
    *rules: str,
    input: str = "DROP",
    output: str = "ACCEPT",
    forward: str = "",
    chains: str = "",
    name: str = "rules.v4",
) -> Imported:
    heads = [
        f":INPUT {input} [0:0]",
        f":OUTPUT {output} [0:0]",
        *([f":FORWARD {forward} [0:0]"] if forward else []),
        *(f":{c} - [0:0]" for c in chains.split()),
    ]
    return import_iptables({name: "\n".join(["# made by hand", "*filter", *heads, *rules, "COMMIT"])})


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ([], {}),
        (["-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT"], {"0.0.0.0/0": "tcp/22"}),
        (["[1:2] -A INPUT -s 10.0.0.0/8 -p udp -m multiport --dports 53,100:102 -m comment --comment \"a b\" -j ACCEPT"], {"10.0.0.0/8": "udp/53,100-102"}),
        (["-A INPUT -s 10.1.0.0/255.255.0.0 -j DROP", "-A INPUT -s 10.0.0.0/15 -j ACCEPT"], {"10.0.0.0/16": "any"}),
        (["-A INPUT ! -s 128.0.0.0/1 -p icmp -j ACCEPT"], {"0.0.0.0/1": "icmp"}),
        (["-A INPUT ! -p tcp -j ACCEPT"], {"0.0.0.0/0": "any but tcp"}),
        (["-A INPUT -p tcp ! --dport 1024:65535 -j ACCEPT"], {"0.0.0.0/0": "tcp/1-1023"}),
        (["-A INPUT -m iprange --src-range 10.0.0.1-10.0.0.3 -p all -j ACCEPT"], {"10.0.0.1-10.0.0.3": "any"}),
        (["-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A INPUT -i lo -j ACCEPT"], {}),
        (["-A INPUT -p tcp -m state --state NEW -m tcp --dport 1 -j ACCEPT"], {"0.0.0.0/0": "tcp/1"}),
        (["-A INPUT -p tcp ! --syn -j ACCEPT"], {}),
        (["-A INPUT -p tcp --syn --dport 7 -j ACCEPT"], {"0.0.0.0/0": "tcp/7"}),
        (["-A INPUT -j LOG --log-prefix \"x \"", "-A INPUT -p tcp --dport 1 -j REJECT --reject-with tcp-reset", "-A INPUT -p tcp --dport 1:2 -j ACCEPT"], {"0.0.0.0/0": "tcp/2"}),
        # chains: falling off the end goes on behind the jump, a return too, a goto does not come back
        (["-A INPUT -p tcp -j ONE", "-A INPUT -p tcp --dport 3 -j ACCEPT", "-A ONE -p tcp --dport 1 -j ACCEPT", "-A ONE -p tcp --dport 3 -j RETURN", "-A ONE -p tcp --dport 2:3 -j ACCEPT"],
         {"0.0.0.0/0": "tcp/1-3"}),
        (["-A INPUT -p tcp -g ONE", "-A INPUT -j ACCEPT", "-A ONE -p tcp --dport 1 -j ACCEPT"], {"0.0.0.0/0": "any but tcp/2-65535"}),
        (["-A INPUT -j ONE", "-A INPUT -p tcp --dport 9 -j ACCEPT", "-A ONE -j TWO", "-A ONE -p tcp --dport 8 -j ACCEPT", "-A TWO -p tcp --dport 9 -j RETURN", "-A TWO -p tcp --dport 7 -j ACCEPT"],
         {"0.0.0.0/0": "tcp/7-9"}),
        (["-A INPUT -j RETURN", "-A INPUT -j ACCEPT"], {}),
    ],
)  # fmt: skip
def test_iptables_input(parts: Parts, rules: list[str], wanted: dict[str, str]) -> None:
    imported = ipt(*rules, chains="ONE TWO")
    assert parts(imported, "external", "host") == wanted
    assert imported.untranslated == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("-m limit --limit 3/min", "--limit 3/min"),
        ("-p tcp --sport 1", "--sport 1"),
        ("-p icmp --icmp-type 8", "--icmp-type 8"),
        ("-m set --match-set x src", "--match-set x src"),
    ],
)
def test_what_a_match_cannot_say_never_widens_access(parts: Parts, option: str, said: str) -> None:
    accept = ipt(f"-A INPUT {option} -j ACCEPT")
    assert parts(accept, "external", "host") == {}
    assert said in accept.untranslated[0].why
    drop = ipt(
        f"-A INPUT {option} -j DROP", "-A INPUT -p tcp --dport 5 -j ACCEPT", "-A INPUT -p icmp -j ACCEPT"
    )
    assert parts(drop, "external", "host") != ipt(
        "-A INPUT -p tcp --dport 5 -j ACCEPT", "-A INPUT -p icmp -j ACCEPT"
    )
    assert len(drop.untranslated) == 1
    jump = ipt(
        f"-A INPUT {option} -j ONE",
        "-A INPUT -p udp -j ACCEPT",
        "-A ONE -p udp --dport 1 -j DROP",
        "-A ONE -p tcp -j ACCEPT",
        "-A ONE -j TWO",
        "-A TWO -p udp --dport 2 -j DROP",
        chains="ONE TWO",
    )
    assert "tcp" not in str(parts(jump, "external", "host"))
    back = ipt(
        "-A INPUT -j ONE", f"-A ONE {option} -j RETURN", "-A ONE -p udp --dport 1 -j ACCEPT", chains="ONE TWO"
    )
    assert parts(back, "external", "host") == (
        {} if said.startswith(("--limit", "--match-set")) else {"0.0.0.0/0": "udp/1"}
    )


def test_output_forward_and_interfaces(parts: Parts) -> None:
    imported = ipt(
        "-A OUTPUT -d 10.0.0.0/8 -p tcp -j ACCEPT",
        "-A FORWARD -i eth0 -o wg+ -s 10.0.0.0/8 -j ACCEPT",
        "-A FORWARD ! -i eth0 -d 1.1.1.1 -j ACCEPT",
        output="DROP",
        forward="DROP",
    )
    names = [s.name for s in imported.inventory]
    assert names == ["host", "external (eth0)", "external (other)", "routed (eth0)", "routed (other)"]
    assert parts(imported, "host", "external (eth0)") == {"10.0.0.0/8": "tcp"}
    assert parts(imported, "external (eth0)", "routed (other)") == {}
    assert parts(imported, "external (other)", "routed (eth0)") == {"1.1.1.1": "any"}
    assert parts(imported, "external (eth0)", "external (other)") == {}
    assert parts(imported, "host", "routed (eth0)") == {}


def test_two_families_and_other_tables(parts: Parts) -> None:
    v4 = "*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n*filter\n:INPUT DROP [0:0]\n-A INPUT -p tcp --dport 1 -j ACCEPT\nCOMMIT"
    v6 = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -s fd00::/8 -j DROP\nCOMMIT"
    imported = import_iptables({"rules.v4": v4, "rules.v6": v6})
    assert parts(imported, "external", "host") == {
        "0.0.0.0/0": "tcp/1",
        "::-fcff:ffff:ffff:ffff:ffff:ffff:ffff:ffff": "any",
        "fe00::/7": "any",
    }
    assert "table nat" in imported.untranslated[0].why


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["-A NOPE -j ACCEPT"], 'no chain "NOPE"'),
        (["-A"], 'no chain ""'),
        (["-A INPUT -j NOPE"], '"NOPE"'),
        (["-A INPUT -p tcp --dport x -j ACCEPT"], "not a port"),
        (["-A INPUT --dport 1 -j ACCEPT"], "ports need a protocol"),
        (["-A INPUT -s 10.0.0.0/99 -j ACCEPT"], "10.0.0.0/99"),
        (['-A INPUT -m comment --comment "open -j ACCEPT'], "quotation"),
        (["what is this"], "not a line"),
        (["-A INPUT -j ONE", "-A ONE -j TWO", "-A TWO -j ONE"], "loop"),
        (["-A INPUT -m x --odd 1 -j ONE", "-A ONE -j TWO", "-A TWO -j ONE"], "loop"),
    ],
)
def test_iptables_refusals(rules: list[str], words: str) -> None:
    with pytest.raises(SourceRefused, match=words):
        ipt(*rules, chains="ONE TWO")
    with pytest.raises(SourceRefused, match="no filter table"):
        import_iptables({"x": "# nothing"})
    with pytest.raises(SourceRefused, match="policy of INPUT"):
        ipt(input="-")


def nft(*items: dict[str, Any], policy: str = "drop", hook: str = "input", family: str = "inet") -> Imported:
    table = {"family": family, "table": "t"}
    chain = {"chain": {**table, "name": "base", "type": "filter", "hook": hook, "prio": 0, "policy": policy}}
    return import_nft({"n.json": json.dumps({"nftables": [{"metainfo": {}}, chain, *items]})})


def rule(*expr: dict[str, Any], chain: str = "base", **more: Any) -> dict[str, Any]:
    return {"rule": {"family": "inet", "table": "t", "chain": chain, "handle": 1, "expr": list(expr), **more}}


def match(left: dict[str, Any], right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def payload(protocol: str, field: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": field}}


def meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


ACCEPT: dict[str, Any] = {"accept": None}
DROP: dict[str, Any] = {"drop": None}
SUB = {"chain": {"family": "inet", "table": "t", "name": "sub"}}
SET = {
    "set": {
        "family": "inet",
        "table": "t",
        "name": "good",
        "elem": ["10.0.0.1", {"prefix": {"addr": "10.1.0.0", "len": 16}}, {"elem": {"val": "10.2.0.1"}}],
    }
}
PORT = payload("tcp", "dport")


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        ([rule(match(PORT, 22), {"counter": {}}, ACCEPT)], {"0.0.0.0/0": "tcp/22", "::/0": "tcp/22"}),
        ([rule(match(PORT, {"set": [80, {"range": [90, 95]}]}), match(payload("ip", "saddr"), "@good"), ACCEPT), SET],
         {"10.0.0.1": "tcp/80,90-95", "10.1.0.0/16": "tcp/80,90-95", "10.2.0.1": "tcp/80,90-95"}),
        ([rule(match(payload("ip6", "saddr"), {"prefix": {"addr": "fd00::", "len": 8}}), match(meta("l4proto"), {"set": ["tcp", "udp"]}), ACCEPT)], {"fd00::/8": "tcp udp"}),
        ([rule(match(payload("ip", "saddr"), {"range": ["10.0.0.0", "10.0.0.7"]}, "!="), ACCEPT)], {"0.0.0.0-9.255.255.255": "any", "10.0.0.8-255.255.255.255": "any"}),
        ([rule(match(PORT, 22, "!="), ACCEPT)], {"0.0.0.0/0": "tcp/1-21,23-65535", "::/0": "tcp/1-21,23-65535"}),
        ([rule(match(payload("th", "dport"), 53), match(meta("nfproto"), "ipv4"), ACCEPT)], {"0.0.0.0/0": "tcp/53 udp/53 sctp/53"}),
        ([rule(match(payload("ip", "protocol"), "icmp"), ACCEPT)], {"0.0.0.0/0": "icmp"}),
        ([rule(match({"ct": {"key": "state"}}, ["established", "related"], "in"), ACCEPT), rule(match(meta("iifname"), "lo"), ACCEPT)], {}),
        ([rule(match({"ct": {"key": "state"}}, "new", "in"), match(PORT, 1), {"reject": {}}), rule(match(PORT, {"range": [1, 2]}), ACCEPT)], {"0.0.0.0/0": "tcp/2", "::/0": "tcp/2"}),
        ([SUB, rule({"jump": {"target": "sub"}}), rule(match(PORT, 5), ACCEPT), rule(match(PORT, 5), {"return": None}, chain="sub"), rule(match(PORT, {"range": [5, 6]}), DROP, chain="sub"),
          rule(match(PORT, {"range": [6, 7]}), ACCEPT, chain="sub")], {"0.0.0.0/0": "tcp/5,7", "::/0": "tcp/5,7"}),
        ([SUB, rule({"vmap": {"key": PORT, "data": {"set": [[22, {"accept": None}], [23, {"goto": {"target": "sub"}}]]}}}), rule(match(PORT, 23), ACCEPT, chain="sub")],
         {"0.0.0.0/0": "tcp/22-23", "::/0": "tcp/22-23"}),
        ([{"map": {"family": "inet", "table": "t", "name": "m", "elem": [[1, {"accept": None}]]}}, rule({"vmap": {"key": PORT, "data": "@m"}})], {"0.0.0.0/0": "tcp/1", "::/0": "tcp/1"}),
    ],
)  # fmt: skip
def test_nft_input(parts: Parts, items: list[dict[str, Any]], wanted: dict[str, str]) -> None:
    imported = nft(*items)
    assert parts(imported, "external", "host") == wanted
    assert imported.untranslated == []


def test_a_drop_in_any_base_chain_is_final(parts: Parts) -> None:
    second = {
        "chain": {
            "family": "inet",
            "table": "t",
            "name": "late",
            "type": "filter",
            "hook": "input",
            "prio": 10,
            "policy": "accept",
        }
    }
    imported = nft(
        second, rule(match(PORT, {"range": [1, 3]}), ACCEPT), rule(match(PORT, 2), DROP, chain="late")
    )
    assert parts(imported, "external", "host") == {"0.0.0.0/0": "tcp/1,3", "::/0": "tcp/1,3"}
    assert set(parts(imported, "host", "external").values()) == {"any"}


def test_nft_forward_with_interfaces(parts: Parts) -> None:
    imported = nft(
        rule(match(meta("iifname"), "a"), match(meta("oifname"), "b", "!="), ACCEPT), hook="forward"
    )
    assert set(parts(imported, "external (a)", "routed (a)").values()) == {"any"}
    assert parts(imported, "external (a)", "routed (b)") == {}
    assert parts(imported, "external (b)", "routed (a)") == {}


def test_nft_gaps_are_said(parts: Parts) -> None:
    others = [
        {"chain": {"family": "bridge", "table": "b", "name": "c"}},
        {
            "chain": {
                "family": "inet",
                "table": "t",
                "name": "nat",
                "type": "nat",
                "hook": "output",
                "prio": 0,
            }
        },
        {"rule": {"family": "bridge", "table": "b", "chain": "c", "expr": []}},
    ]
    partial = [
        {"limit": {}},
        match({"meta": {"key": "mark"}}, 1),
        match(payload("tcp", "sport"), 1),
        match(payload("icmp", "type"), "echo-request"),
        match(PORT, 1, "<"),
        match(payload("ether", "saddr"), "x"),
    ]
    for one in partial:
        imported = nft(*others, rule(one, ACCEPT))
        assert parts(imported, "external", "host") == {}
        assert len(imported.untranslated) == 3


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "{"}, "not valid JSON"),
        ({"a": "[]"}, "list under"),
        ({"a": '{"nftables": []}'}, "no filter chain"),
        ({"a": "{}", "b": "{}"}, "one file"),
    ],
)
def test_nft_refusals(files: dict[str, str], words: str) -> None:
    with pytest.raises(SourceRefused, match=words):
        import_nft(files)
    with pytest.raises(SourceRefused, match="no set @x"):
        nft(rule(match(payload("ip", "saddr"), "@x"), ACCEPT))
    with pytest.raises(SourceRefused, match="cannot be read"):
        nft(rule(match(PORT, "http"), ACCEPT))
