from __future__ import annotations

import json

import pytest

from identity.errors import BadInput
from policy.imported import ImportedPolicy
from policy.importers import KINDS, run
from policy.importers.model import Imported, Untranslated
from policy.importers.report import report
from policy.ports import parse_ports
from policy.program import Action, Everything, Exists, In, Nothing, Program, Rule, Selector, Subject, Tier

WEB, DB = Exists("web"), Exists("db")
INVENTORY = (Subject("w", {"web": "1"}), Subject("d", {"db": "1"}))


def rule(
    name: str,
    ports: str,
    action: Action = Action.ALLOW,
    src: Selector = WEB,
    dst: Selector = DB,
    **more: object,
) -> Rule:
    return Rule(name, action, src, dst, parse_ports(ports), **more)  # type: ignore[arg-type]


def shadowed(*rules: Rule, order: str = "first-match") -> list[dict[str, str]]:
    tier = Tier("t", rules, order)  # type: ignore[arg-type]
    found = report(Imported(ImportedPolicy(Program((tier,)), "x"), INVENTORY))
    out: list[dict[str, str]] = found["rules"]["shadowed"]
    return out


def test_shadowed_in_order() -> None:
    assert shadowed(rule("a", "tcp/1-5"), rule("b", "tcp/6-9", Action.DENY), rule("c", "tcp/2-8")) == [
        {"rule": "c", "by": "a, b"}
    ]
    assert shadowed(rule("a", "tcp/1-5"), rule("c", "tcp/2-8")) == []
    assert shadowed(rule("a", "tcp", directions=("egress",)), rule("c", "tcp")) == []
    assert shadowed(rule("a", "tcp", concerns=WEB), rule("c", "tcp")) == []
    assert shadowed(rule("a", "tcp", src=Nothing()), rule("c", "tcp", src=Nothing())) == []


def test_shadowed_where_order_does_not_count() -> None:
    assert shadowed(rule("a", "tcp/1"), rule("b", "tcp/1", Action.DENY), order="deny-wins") == []
    assert shadowed(rule("a", "tcp", Action.DENY), rule("b", "tcp/1"), order="deny-wins") == [
        {"rule": "b", "by": "a"}
    ]


def test_report_has_counts_inactive_rules_and_gaps() -> None:
    tier = Tier(
        "t",
        (
            rule("a", "tcp/1"),
            rule("b", "tcp/1", src=In("app", frozenset({"no"}))),
            rule("c", "any", src=Everything()),
        ),
    )
    imported = Imported(
        ImportedPolicy(Program((tier,)), "nsx"),
        INVENTORY,
        [Untranslated("here", "because")],
        ids={"x": "y"},
        rules=7,
        notes=["n"],
    )
    assert report(imported) == {
        "source": "nsx", "rules": {"in": 7, "out": 3, "shadowed": [], "inactive": ["b"]}, "subjects": 2,
        "untranslated": [{"where": "here", "why": "because"}], "tests": [], "ids": {"x": "y"}, "notes": ["n"],
    }  # fmt: skip


def test_every_kind_runs_and_others_are_refused() -> None:
    files = {
        "tailscale": {"policy.hujson": "{}", "devices.json": '{"devices": []}'},
        "kubernetes": {"p.json": json.dumps({"kind": "Pod", "metadata": {"name": "p"}})},
        "nsx": {"n.json": '{"domains": []}'},
        "aws": {"g.json": '{"SecurityGroups": [{"GroupId": "sg-1"}]}'},
        "iptables": {"rules.v4": "*filter\n:INPUT DROP [0:0]\n"},
        "nftables": {
            "n.json": json.dumps(
                {
                    "nftables": [
                        {
                            "chain": {
                                "family": "ip",
                                "table": "t",
                                "name": "c",
                                "type": "filter",
                                "hook": "input",
                            }
                        }
                    ]
                }
            )
        },
        "cisco-ios": {"r.cfg": "access-list 100 permit ip any any\n"},
    }
    assert set(files) == set(KINDS)
    for kind in files:
        assert run(kind, files[kind]).policy.source == kind
    with pytest.raises(BadInput, match="cannot import 'pix'"):
        run("pix", {})
