from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from policy.importers.model import Imported, SourceRefused
from policy.importers.tailscale import import_tailscale

Table = Callable[[Imported], dict[tuple[str, str], str]]
Parts = Callable[[Imported, str, str], dict[str, str]]

USUAL = "icmp tcp udp"


def device(name: str, number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": str(number),
        "hostname": name,
        "name": f"{name}.net",
        "addresses": [f"100.64.0.{number}", f"fd7a:115c:a1e0::{number:x}"],
        **more,
    }


DEVICES = [
    device("ann-laptop", 1, user="ann@a.example"),
    device("ann-phone", 2, user="ann@a.example"),
    device("bob-laptop", 3, user="bob@b.example"),
    device("web", 4, tags=["tag:web"]),
    device("db", 5, tags=["tag:db"]),
    device("gate", 6, tags=["tag:gate"], enabledRoutes=["10.1.0.0/16", "fd00:1::/64"]),
    device("exit", 7, tags=["tag:exit", "tag:gate"], enabledRoutes=["0.0.0.0/0", "::/0"]),
]
BASE: dict[str, Any] = {
    "groups": {"group:ops": ["ann@a.example"], "group:none": [], "group:all": ["group:ops", "bob@b.example"]},
    "hosts": {"dbhost": "100.64.0.5", "office": "10.1.2.0/24", "nobody": "100.64.9.9"},
    "ipsets": {
        "ipset:lab": ["10.1.0.0/16", "remove 10.1.9.0/24", "add host:dbhost"],
        "ipset:more": ["ipset:lab", "add 10.2.0.0/16"],
    },
    "tagOwners": {
        "tag:web": ["group:ops"],
        "tag:db": ["ann@a.example"],
        "tag:gate": [],
        "tag:exit": ["tag:gate"],
    },
    "postures": {"posture:new": ["node:os == 'linux'"]},
}


def load(devices: list[dict[str, Any]] | None = None, **policy: Any) -> Imported:
    text = json.dumps({**BASE, **policy}, indent=1)
    return import_tailscale(
        {"policy.hujson": text, "devices.json": json.dumps({"devices": devices or DEVICES})}
    )


def acl(src: list[str], dst: list[str], **more: Any) -> dict[str, Any]:
    return {"acls": [{"action": "accept", "src": src, "dst": dst, **more}]}


def grant(src: list[str], dst: list[str], ip: list[str], **more: Any) -> dict[str, Any]:
    return {"grants": [{"src": src, "dst": dst, "ip": ip, **more}]}


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (acl(["tag:web"], ["tag:db:5432"]), {("web", "db"): "icmp tcp/5432 udp/5432"}),
        (acl(["tag:web"], ["tag:db:80,443,8000-8010"], proto="tcp"), {("web", "db"): "tcp/80,443,8000-8010"}),
        (acl(["tag:web"], ["tag:db:*"], proto="sctp"), {("web", "db"): "sctp"}),
        (acl(["tag:web"], ["tag:db:*"], proto="58"), {("web", "db"): "icmp"}),
        (acl(["tag:web"], ["tag:db:*"], proto="gre"), {("web", "db"): "47"}),
        (acl(["bob@b.example"], ["ann@a.example:22"], proto="tcp"), {("bob-laptop", "ann-laptop"): "tcp/22", ("bob-laptop", "ann-phone"): "tcp/22"}),
        (acl(["group:none"], ["*:*"]), {}),
        (acl([], ["*:*"]), {}),
        (acl(["group:all"], ["tag:db:1"], proto="udp"), {(n, "db"): "udp/1" for n in ("ann-laptop", "ann-phone", "bob-laptop")}),
        (acl(["user:*@b.example"], ["dbhost:1"], proto="udp"), {("bob-laptop", "db"): "udp/1"}),
        (acl(["autogroup:tagged"], ["autogroup:member:1"], proto="udp"),
         {(a, b): "udp/1" for a in ("web", "db", "gate", "exit") for b in ("ann-laptop", "ann-phone", "bob-laptop")}),
        (acl(["100.64.0.0/30"], ["dbhost:1"], proto="udp"), {(n, "db"): "udp/1" for n in ("ann-laptop", "ann-phone", "bob-laptop")}),
        # one family on each side: an IPv4 literal never reaches an IPv6 one
        (acl(["100.64.0.4"], ["[fd7a:115c:a1e0::5]:1"]), {}),
        (acl(["fd7a:115c:a1e0::4"], ["fd7a:115c:a1e0::5:1"], proto="tcp"), {("web", "db"): "tcp/1"}),
        (acl(["100.64.0.4", "fd7a:115c:a1e0::3"], ["100.64.0.5:1"], proto="tcp"), {("web", "db"): "tcp/1"}),
        (acl(["ipset:more"], ["tag:web:1"], proto="tcp"), {("db", "web"): "tcp/1"}),
        (grant(["tag:web"], ["tag:db"], ["tcp:5432", "udp:53-54", "icmp:*"]), {("web", "db"): "icmp tcp/5432 udp/53-54"}),
        (grant(["tag:web"], ["tag:db"], ["443", "6:22"]), {("web", "db"): "icmp tcp/22,443 udp/443"}),
        (grant(["tag:web"], [], ["*"]), {}),
        ({"grants": [{"src": ["*"], "dst": ["*"], "app": {"a.example/cap": [{}]}}]}, {}),
        ({"grants": []}, {}),
        ({"acls": []}, {}),
        # older and differently written keys
        ({"ACLs": [{"Action": "accept", "Users": ["tag:web"], "Ports": ["tag:db:1"], "Proto": "TCP"}]}, {("web", "db"): "tcp/1"}),
    ],
)  # fmt: skip
def test_truth_table(table: Table, policy: dict[str, Any], wanted: dict[tuple[str, str], str]) -> None:
    assert table(load(**policy)) == wanted


@pytest.mark.parametrize("policy", [{}, {"acls": None}, acl(["*"], ["*:*"])])
def test_without_rules_everything_is_allowed_but_sctp(
    table: Table, parts: Parts, policy: dict[str, Any]
) -> None:
    imported = load(**policy)
    found = table(imported)
    assert len(found) == len(DEVICES) * (len(DEVICES) - 1)
    assert set(found.values()) == {USUAL}
    assert parts(imported, "web", "gate (subnets)") == {"10.1.0.0/16": USUAL, "fd00:1::/64": USUAL}
    assert set(parts(imported, "gate (subnets)", "web").values()) == {USUAL}


def test_self_joins_each_user_with_own_devices(table: Table) -> None:
    pair = {("ann-laptop", "ann-phone"): "tcp/22", ("ann-phone", "ann-laptop"): "tcp/22"}
    for src in (["*"], ["autogroup:member"], ["group:all"], ["ann@a.example"], ["user:*@a.example"]):
        assert table(load(**acl(src, ["autogroup:self:22"], proto="tcp"))) == pair
    assert table(load(**acl(["bob@b.example"], ["autogroup:self:22"]))) == {}


def test_subnets_are_reached_through_the_gateway_only(table: Table, parts: Parts) -> None:
    imported = load(**acl(["tag:web"], ["10.1.2.0/24:443", "fd00:1::/65:22"], proto="tcp"))
    assert table(imported) == {}
    assert parts(imported, "web", "gate (subnets)") == {"10.1.2.0/24": "tcp/443", "fd00:1::/65": "tcp/22"}
    assert parts(imported, "db", "gate (subnets)") == {}
    back = load(**acl(["office"], ["tag:web:80"], proto="tcp"))
    assert parts(back, "gate (subnets)", "web") == {"10.1.2.0/24": "tcp/80"}
    assert table(back) == {}
    assert imported.ids == {"gate (subnets)": "gate", "exit (internet)": "exit"}


def test_a_tag_stands_for_the_gateway_not_for_what_is_behind(table: Table, parts: Parts) -> None:
    imported = load(**acl(["tag:web"], ["tag:gate:1"], proto="tcp"))
    assert table(imported) == {("web", "gate"): "tcp/1", ("web", "exit"): "tcp/1"}
    assert parts(imported, "web", "gate (subnets)") == {}


def test_internet_is_what_exit_nodes_carry(parts: Parts) -> None:
    imported = load(**acl(["ann@a.example"], ["autogroup:internet:443"], proto="tcp"))
    found = parts(imported, "ann-laptop", "exit (internet)")
    assert len(found) == 7
    assert set(found.values()) == {"tcp/443"}
    assert "2000::/3" in found
    assert not any(r.startswith(("10.", "192.168")) for r in found)
    assert parts(imported, "ann-laptop", "gate (subnets)") == {}


def test_via_narrows_to_gateways_with_the_tag(table: Table, parts: Parts) -> None:
    imported = load(**grant(["tag:web"], ["office", "tag:db"], ["tcp:1"], via=["tag:gate"]))
    assert table(imported) == {}
    assert parts(imported, "web", "gate (subnets)") == {"10.1.2.0/24": "tcp/1"}
    none = load(**grant(["tag:web"], ["office"], ["tcp:1"], via=["tag:exit", "tag:web"]))
    assert parts(none, "web", "gate (subnets)") == {}
    every = load(**grant(["tag:web"], ["*"], ["tcp:1"], via=["tag:gate"]))
    assert table(every) == {}
    assert set(parts(every, "web", "gate (subnets)").values()) == {"tcp/1"}
    net = load(**grant(["tag:web"], ["autogroup:internet"], ["tcp:1"], via=["tag:exit"]))
    assert set(parts(net, "web", "exit (internet)").values()) == {"tcp/1"}


def test_what_is_dropped_is_said_and_gives_no_access(table: Table) -> None:
    dropped = [
        grant(["tag:web"], ["tag:db"], ["*"], srcPosture=["posture:new"]),
        acl(["autogroup:admin"], ["tag:db:*"]),
        acl(["group:synced@a.example"], ["tag:db:*"]),
        acl(["tag:web"], ["svc:shop:443"]),
        {**acl(["tag:web"], ["tag:db:*"]), "defaultSrcPosture": ["posture:new"]},
    ]
    for policy in dropped:
        imported = load(**policy)
        assert table(imported) == {}
        assert len(imported.untranslated) == 1


def test_shared_and_danger_all(table: Table) -> None:
    devices = [*DEVICES, device("guest", 8, user="eve@x.example", isExternal=True)]
    assert table(load(devices, **acl(["autogroup:shared"], ["tag:web:1"], proto="tcp"))) == {
        ("guest", "web"): "tcp/1"
    }
    assert len(table(load(**acl(["autogroup:danger-all"], ["tag:web:1"])))) == len(DEVICES) - 1


@pytest.mark.parametrize(
    ("policy", "culprit"),
    [
        (acl(["autogroup:self"], ["tag:db:1"]), '"autogroup:self" not valid on the src side'),
        (acl(["autogroup:internet"], ["tag:db:1"]), '"autogroup:internet" not valid on the src side'),
        (acl(["tag:web"], ["autogroup:danger-all:1"]), "not valid on the dst side"),
        (acl(["autogroup:what"], ["tag:db:1"]), 'unknown autogroup "autogroup:what"'),
        (acl(["tag:web"], ["autogroup:self:1"]), "autogroup:self can only be used with"),
        (grant(["*"], ["autogroup:self"], ["*"]), "autogroup:self can only be used with"),
        (acl(["*"], ["tag:no:1"]), 'tag not found: "tag:no"'),
        (acl(["group:no"], ["tag:db:1"]), 'group not found: "group:no"'),
        (acl(["nohost"], ["tag:db:1"]), "nohost"),
        (acl(["ipset:no"], ["tag:db:1"]), "ipset:no"),
        (acl(["10.0.0.0/40"], ["tag:db:1"]), "10.0.0.0/40"),
        (acl(["*"], ["0.0.0.0/0:1"]), "to allow all IP addresses"),
        (acl(["*"], ["tag:db"]), 'port range "db": invalid first integer'),
        (acl(["*"], ["db"]), "missing ports"),
        (acl(["*"], ["tag:db:0"]), "first port must be >0"),
        (acl(["*"], ["tag:db:1-x"]), "invalid last integer"),
        (acl(["*"], ["tag:db:70000"]), "70000"),
        (acl(["*"], ["tag:db:9-1"]), "below the first"),
        (acl(["*"], ["tag:db:22"], proto="icmp"), "only tcp, udp and sctp have ports"),
        (acl(["*"], ["tag:db:22"], proto="tpc"), 'unknown protocol "tpc"'),
        (acl(["*"], ["tag:db:22"], why="?"), 'unknown field "why"'),
        ({"acls": [{"action": "deny", "src": ["*"], "dst": ["*:*"]}]}, 'action "deny"'),
        ({"acls": ["x"]}, "acls[0] must be a map"),
        ({"acls": [{"action": "accept", "src": "x", "dst": []}]}, "must be a list of strings"),
        ({"acls": {}}, '"acls" must be a list'),
        ({"grants": [{"src": ["*"], "dst": ["*"], "ip": []}]}, "ip and app can not both be empty"),
        (grant(["*"], ["office"], ["*"], via=["group:ops"]), 'via can only be a tag, not "group:ops"'),
        (grant(["*"], ["office"], ["*"], via=["tag:no"]), 'tag "tag:no" not found'),
        (grant(["*"], ["tag:db"], ["icmp"]), 'port range "icmp"'),
        (grant(["*"], ["tag:db"], ["*"], srcPosture=["posture:old"]), 'posture not found: "posture:old"'),
        (grant(["*"], ["tag:db"], ["*"], app={"https://a.example/x": [{}]}), "{domain}/{path}"),
        (grant(["*"], ["tag:db"], ["*"], app={"tailscale.com/cap/no": [{}]}), "tailscale.com domain"),
        (grant(["*"], ["tag:db"], ["*"], app=[]), "app must map"),
        (grant(["*"], ["autogroup:internet"], ["*"], app={"a.example/x": [{}]}), "cannot use app grants"),
        ({"unknownSection": 1}, 'unknown field "unknownSection"'),
        ({"groups": {"group:a": ["group:b"], "group:b": ["group:a"]}}, "contains itself"),
        ({"groups": {"group:a": ["group:b"]}, "tagOwners": {}}, 'group not found: "group:b"'),
        ({"groups": {"group:a": ["x"]}, "tagOwners": {}}, 'not a user: "x"'),
        ({"groups": {"ops": []}, "tagOwners": {}}, '"ops" must be named'),
        ({"tagOwners": {"web": []}}, 'not a tag name: "web"'),
        ({"tagOwners": {"tag:a": ["tag:b"]}}, 'tag not found: "tag:b"'),
        ({"tagOwners": {"tag:a": ["group:b"]}}, 'group not found: "group:b"'),
        ({"tagOwners": {"tag:a": "x"}}, "must be a list of strings"),
        ({"autoApprovers": {"routes": {"10.0.0.0/8": ["tag:b"]}}}, 'tag not found: "tag:b"'),
        ({"autoApprovers": {"exitNode": ["tag:b"]}}, 'tag not found: "tag:b"'),
        ({"nodeAttrs": [{"target": ["tag:b"], "attr": ["funnel"]}]}, 'tag not found: "tag:b"'),
        ({"nodeAttrs": [{"target": ["autogroup:x"], "attr": ["funnel"]}]}, "autogroup:x"),
        ({"nodeAttrs": ["x"]}, "nodeAttrs[0]"),
        ({"nodeAttrs": [{"target": ["no%name"], "attr": ["funnel"]}]}, "no%name"),
        ({"nodeAttrs": [{"target": ["*"], "ipPool": ["100.100.100.64/26"]}]}, "nodeAttrs[0].ipPool"),
        ({"nodeAttrs": [{"target": ["*"], "ipPool": ["10.0.0.0/24"]}]}, "10.0.0.0/24"),
        ({"nodeAttrs": [{"target": ["*"], "ipPool": "x"}]}, "not a network"),
        ({"hosts": {"h": 1}, **acl(["h"], ["*:*"])}, 'host "h"'),
        ({"ipsets": {"ipset:a": ["ipset:a"]}, **acl(["ipset:a"], ["*:*"])}, "contains itself"),
    ],
)
def test_what_the_vendor_refuses_is_refused(policy: dict[str, Any], culprit: str) -> None:
    with pytest.raises(SourceRefused) as caught:
        load(**policy)
    assert culprit in caught.value.message
    assert caught.value.exit == 1


def test_a_refusal_says_where() -> None:
    text = '{\n  "acls": [\n    {"action": "accept", "src": ["*"], "dst": ["*:*"]},\n    {"action": "accept", "src": ["tag:x"], "dst": ["*:*"]},\n  ],\n}'
    with pytest.raises(SourceRefused) as caught:
        import_tailscale({"policy.hujson": text, "devices.json": '{"devices": []}'})
    assert caught.value.message.startswith("policy.hujson:4 acls[1].src: ")


def test_devices(table: Table) -> None:
    devices = [
        device("pc", 1, user="ann@a.example"),
        {**device("pc", 2, user="bob@b.example"), "name": "pc-1.net"},
        {**device("pc", 3, user="bob@b.example"), "name": "pc-1.net"},
        device("off", 4, user="ann@a.example", authorized=False),
    ]
    imported = load(devices, **acl(["bob@b.example"], ["ann@a.example:1"], proto="tcp"))
    assert table(imported) == {("pc-1", "pc"): "tcp/1", ("pc-3", "pc"): "tcp/1"}
    assert imported.ids == {"pc-1": "pc", "pc-3": "pc"}
    assert "off is not authorized" in imported.untranslated[0].why


@pytest.mark.parametrize(
    "text",
    ["[", "[]", '{"devices": [1]}', '{"devices": [{"hostname": ""}]}', '{"devices": [{"hostname": "a", "addresses": ["x"]}]}',
     '{"devices": [{"hostname": "a", "tags": "x"}]}', '{"devices": [{"hostname": "a", "enabledRoutes": ["10.0.0.0/99"]}]}'],
)  # fmt: skip
def test_bad_device_lists_are_refused(text: str) -> None:
    with pytest.raises(SourceRefused, match=r"devices\.json"):
        import_tailscale({"policy.hujson": "{}", "devices.json": text})


def test_both_files_are_needed() -> None:
    for name in ("policy.hujson", "devices.json"):
        with pytest.raises(SourceRefused, match="there is no"):
            import_tailscale({name: "{}"})
    with pytest.raises(SourceRefused, match="must be a map"):
        import_tailscale({"policy.hujson": "[]", "devices.json": '{"devices": []}'})


RULES = {
    "acls": [
        {"action": "accept", "src": ["group:ops"], "dst": ["tag:db:5432", "nobody:22"], "proto": "tcp"},
        {"action": "accept", "src": ["tag:web"], "dst": ["dbhost:53"], "proto": "udp"},
        {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:22"]},
        {"action": "accept", "src": ["100.64.0.4"], "dst": ["10.1.2.3:80"]},
        {"action": "accept", "src": ["ann@a.example"], "dst": ["tag:web:*"], "proto": "icmp"},
    ]
}


@pytest.mark.parametrize(
    "test",
    [
        {"src": "ann@a.example", "accept": ["tag:db:5432"], "deny": ["tag:db:22", "tag:web:80"]},
        {"src": "group:ops", "accept": ["db:5432".replace("db", "dbhost")]},
        {"src": "group:ops", "accept": ["nobody:22"], "proto": "tcp"},
        {"src": "tag:web", "accept": ["100.64.0.5:53"], "proto": "udp"},
        {"src": "tag:web", "deny": ["100.64.0.5:53"], "proto": "tcp"},
        {"src": "ann@a.example", "accept": ["autogroup:self:22"]},
        {"src": "100.64.0.4", "accept": ["10.1.2.3:80"]},
        {"user": "bob@b.example", "deny": ["tag:db:5432", "ann@a.example:22", "group:ops:22"]},
        {"src": "autogroup:member", "deny": ["tag:db:53"]},
        {"src": "autogroup:tagged", "deny": ["ann@a.example:22"]},
        {"src": "ann@a.example", "accept": ["tag:web:80"], "proto": "icmp"},
        {"src": "nobody", "deny": ["tag:db:53"]},
        {"src": "group:none", "deny": ["tag:db:53"]},
    ],
)
def test_in_file_tests_that_hold(test: dict[str, Any]) -> None:
    assert load(**RULES, tests=[test]).tests == [{"index": 0, "pass": True}]


@pytest.mark.parametrize(
    "test",
    [
        {"src": "ann@a.example", "accept": ["tag:db:22"]},
        {"src": "ann@a.example", "deny": ["tag:db:5432"]},
        {"src": "group:all", "accept": ["tag:db:5432"]},  # bob may not
        {"src": "autogroup:member", "deny": ["tag:db:5432"]},  # ann may
        {"src": "group:none", "accept": ["tag:db:5432"]},
        {"src": "tag:web", "accept": ["autogroup:self:22"]},
        {"src": "ann@a.example", "deny": ["autogroup:self:22"]},
        {"src": "ann@a.example", "accept": ["autogroup:internet:22"]},
        {"src": "ann@a.example", "accept": ["tag:db:*"]},
        {"src": "ann@a.example", "accept": ["tag:db:5432-5433"]},
        {"src": "ann@a.example", "accept": ["tag:db:0"]},
        {"src": "ann@a.example", "accept": ["tag:db"]},
        {"src": "ann@a.example", "deny": ["*:5432"]},
        {"src": "ann@a.example", "deny": ["10.0.0.0/8:5432"]},
        {"src": "ann@a.example", "deny": ["100.64.0.5/32:53"]},
        {"src": "ann@a.example", "deny": ["office:53"]},
        {"src": "ann@a.example", "deny": ["tag:no:53"]},
        {"src": "ann@a.example", "deny": ["autogroup:no:53"]},
        {"src": "*", "deny": ["tag:db:22"]},
        {"src": "phantom", "deny": ["tag:db:22"]},
        {"src": "", "deny": ["tag:db:22"]},
        {"deny": ["tag:db:22"]},
        {"src": "ann@a.example"},
        {"src": "ann@a.example", "accept": [], "deny": []},
        {"src": "ann@a.example", "accept": "x"},
        {"src": "ann@a.example", "accept": [1]},
        {"src": "ann@a.example", "deny": ["tag:db:22"], "proto": "no"},
        {"src": "ann@a.example", "deny": ["tag:db:22"], "more": 1},
        "x",
    ],
)
def test_a_failing_in_file_test_refuses_the_policy(test: Any) -> None:
    with pytest.raises(SourceRefused, match=r"test\(s\) failed: tests\[1\]"):
        load(**RULES, tests=[{"src": "ann@a.example", "accept": ["tag:db:5432"]}, test])
