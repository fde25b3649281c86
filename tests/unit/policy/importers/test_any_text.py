"""Configurations that are not what they claim to be: any text, and good ones with a piece cut out, doubled or exchanged."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.importers import KINDS, run
from policy.importers.model import SourceRefused

GOOD = {
    "iptables": "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n:web - [0:0]\n"
    "-A INPUT -p tcp -m tcp --dport 22 -j web\n-A web -s 10.0.0.0/8 ! -i eth0 -p tcp -m multiport --dports 1,2:3 -j ACCEPT\n"
    "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n",
    "cisco-ios": "hostname r1\nobject-group network web\n host 10.0.0.1\n 10.1.0.0 255.255.0.0\n"
    "ip access-list extended edge\n 10 permit tcp any host 10.0.0.1 eq 443 established\n 20 deny ip 10.0.0.0 0.255.255.255 any log\n"
    "access-list 101 permit udp any range 1 9 any gt 1023\ninterface Gi0/0\n ip address 10.0.0.2 255.255.255.0\n ip access-group edge in\n",
    "nftables": '{"nftables": [{"table": {"family": "inet", "name": "f"}}, {"chain": {"family": "inet", "table": "f", "name": "input",'
    ' "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}}, {"rule": {"family": "inet", "table": "f", "chain": "input", "expr":'
    ' [{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": {"range": [1, 9]}}}, {"accept": null}]}}]}',
}
NAMES = {"nftables": "rules.json", "aws": "a.json", "nsx": "n.json", "tailscale": "policy.hujson", "kubernetes": "a.yaml"}


def imports(kind: str, text: str) -> None:
    """Imported or refused with a reason; anything else is raised."""
    with contextlib.suppress(SourceRefused):
        run(kind, {NAMES.get(kind, "rules.txt"): text})


@pytest.mark.parametrize("kind", GOOD)
def test_the_good_ones_are_imported(kind: str) -> None:
    assert run(kind, {NAMES.get(kind, "rules.txt"): GOOD[kind]}).rules


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.text(max_size=200) | st.integers(1, 3000).map(lambda n: "[" * n))
def test_any_text(kind: str, text: str) -> None:
    imports(kind, text)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_damaged_texts(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(GOOD)))
    words = GOOD[kind].replace("\n", " \n ").split(" ")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(words) - 1))
        new = data.draw(st.sampled_from([[], [words[at]] * 2, ["-1"], ["99999999999"], ["!"], ["any"], ["10.0.0.300"], ["::/0"], ["\n"], ['"'], ["\u0661"]])
                        | st.sampled_from(words).map(lambda w: [w]) | st.text(max_size=6).map(lambda w: [w]))  # fmt: skip
        words[at : at + 1] = new or ([""] if len(words) == 1 else [])
    imports(kind, " ".join(words))
