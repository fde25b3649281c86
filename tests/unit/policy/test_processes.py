"""policy.processes: what a rule may name at its source, and where systemd puts a unit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadPolicy
from policy.document import Node
from policy.processes import group_of_unit, parse_process
from policy.program import Process


def parsed(text: str) -> Process:
    return parse_process(Node("scalar", "p.yaml", 3, 7, text))


@pytest.mark.parametrize(("text", "kind", "value"), [
    ("uid:0", "uid", "0"), ("uid:007", "uid", "7"), ("uid:4294967294", "uid", "4294967294"),
    ("cgroup:/system.slice/nginx.service", "cgroup", "system.slice/nginx.service"), ("cgroup:a/b/", "cgroup", "a/b"), ("cgroup:a", "cgroup", "a"),
    ("unit:nginx", "cgroup", "system.slice/nginx.service"), ("unit:nginx.service", "cgroup", "system.slice/nginx.service"),
    ("unit:node-1.2", "cgroup", "system.slice/node-1.2.service"), ("unit:x.scope", "cgroup", "system.slice/x.scope"),
    ("unit:a-b@1.service", "cgroup", "system.slice/system-a\\x2db.slice/a-b@1.service"),
    ("unit:shop-web.slice", "cgroup", "shop.slice/shop-web.slice"),
])  # fmt: skip
def test_processes(text: str, kind: str, value: str) -> None:
    assert parsed(text) == Process(kind, value)  # type: ignore[arg-type]  # values of the literal


@pytest.mark.parametrize(("text", "code"), [
    *((t, "policy.process") for t in (
        "uid:", "uid:-1", "uid:4294967295", "uid:99999999999", "uid:٣", "nginx", "", "pid:1", "cgroup:", "cgroup:/", "cgroup://a", "cgroup:a//b",
        "cgroup:../a", "cgroup:a/./b", 'cgroup:a"b', "cgroup:a b", "cgroup:a\nb", "cgroup:" + "a/" * 17 + "a", "unit:", "unit:/a", "unit:a/b.service",
        "unit:-.slice", "unit:a--b.slice", "unit:.service", "unit:-x.service", 'unit:x".service', "unit:" + "x" * 128,
    )), ("/usr/bin/nginx", "policy.not_enforced"),
])  # fmt: skip
def test_what_is_none(text: str, code: str) -> None:
    with pytest.raises(BadPolicy) as refused:
        parsed(text)
    assert refused.value.code == code
    assert refused.value.hint


@given(st.text(max_size=60), st.sampled_from(["", "cgroup:", "unit:", "uid:"]))
def test_any_text_is_a_plain_path_or_refused(text: str, kind: str) -> None:
    try:
        one = parsed(kind + text)
    except BadPolicy:
        return
    words = one.value.split("/")
    assert not {"", ".", ".."} & set(words)
    assert one.value.isascii()
    assert one.value.isprintable()
    assert not set(one.value) & set(' ";{}$')


def test_units_without_a_group_of_their_own() -> None:
    assert group_of_unit("-.slice") is None
    assert group_of_unit("") is None
    assert group_of_unit("dbus.socket") == "system.slice/dbus.socket.service", "no unit has that name, so nobody is in it"
