"""Selectors: what proves something, what only narrows, and what a process may try."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.entries import (
    NOBODY,
    EntriesRecord,
    Entry,
    Facts,
    Selectors,
    check_entry,
    check_parent,
    check_selectors,
    container_of,
    describe,
    holds,
    is_parent,
    judge,
    parse_selectors,
    unit_of,
    weight,
)
from identity.errors import BadInput

HEX = "0123456789abcdef" * 4
API = Selectors(uid=33, unit="api.service")


def facts(**changes):
    return Facts(**{"uid": 33, "gid": 33, "cgroup": "/system.slice/api.service", **changes})


@pytest.mark.parametrize(
    "selectors",
    [
        {}, {"uid": 33}, {"uid": 33, "gid": 33}, {"uid": 33, "path": "/usr/bin/api"}, {"uid": 33, "sha256": HEX},
        {"uid": 33, "groups": [1], "path": "/x", "sha256": HEX}, {"unit": "api.service"}, {"cgroup": "/a"}, {"netns": "web"},
        {"container": HEX}, {"gid": 33, "unit": "api.service"},
    ],
)  # fmt: skip
def test_an_entry_that_proves_nothing_is_refused_and_never_holds(selectors):
    made = Selectors(**selectors)
    with pytest.raises(BadInput) as caught:
        check_selectors(made)
    assert caught.value.code == "entry.selectors"
    everything = facts(path="/usr/bin/api", sha256=HEX, groups=frozenset({1}), netns=frozenset({"web"}))
    assert not holds(made, everything)


@pytest.mark.parametrize(
    ("selectors", "code"),
    [
        ({"uid": NOBODY, "unit": "a.service"}, "entry.nobody"), ({"uid": 1, "gid": NOBODY, "unit": "a.service"}, "entry.nobody"),
        ({"uid": 1, "unit": "a"}, "entry.unit"), ({"uid": 1, "unit": "a/b.service"}, "entry.unit"), ({"uid": 1, "unit": "a.slice"}, "entry.unit"),
        ({"uid": 1, "cgroup": "/"}, "entry.cgroup"), ({"uid": 1, "cgroup": "a"}, "entry.cgroup"), ({"uid": 1, "cgroup": "/a/../b"}, "entry.cgroup"),
        ({"uid": 1, "cgroup": "/a/"}, "entry.cgroup"), ({"uid": 1, "cgroup": "/a\x1b[2J"}, "entry.cgroup"), ({"uid": 1, "cgroup": "/a\nb"}, "entry.cgroup"),
        ({"uid": 1, "container": "abc"}, "entry.container"), ({"uid": 1, "container": "G" * 20}, "entry.container"),
        ({"uid": 1, "netns": "../web"}, "name.workload"), ({"uid": 1, "netns": "a", "path": "bin"}, "entry.path"),
        ({"uid": 1, "netns": "a", "sha256": "0" * 63}, "entry.sha256"), ({"uid": 1, "netns": "a", "sha256": "A" * 64}, "entry.sha256"),
    ],
)  # fmt: skip
def test_malformed_selectors(selectors, code):
    with pytest.raises(BadInput) as caught:
        check_selectors(Selectors(**selectors))
    assert caught.value.code == code
    assert "\x1b" not in caught.value.message


def test_all_selectors_have_to_hold():
    full = Selectors(
        uid=33, gid=33, groups=[5, 6], unit="api.service", cgroup="/system.slice", netns="web", path="/usr/bin/api", sha256=HEX
    )
    good = {"gid": 33, "groups": frozenset({5, 6, 7}), "netns": frozenset({"web", "x"}), "path": "/usr/bin/api", "sha256": HEX}
    assert holds(check_selectors(full), facts(**good))
    for change in (
        {"uid": 34}, {"gid": 34}, {"groups": frozenset({5})}, {"cgroup": "/user.slice/api.service"}, {"cgroup": "/"},
        {"cgroup": "/system.slice/other.service"}, {"netns": frozenset({"webs"})}, {"path": "/usr/bin/api2"}, {"path": None}, {"sha256": None},
        {"sha256": "0" * 64},
    ):  # fmt: skip
        assert not holds(full, facts(**good | change)), change
    assert [f.selector for f in judge(full, facts()) if not f.ok] == ["group", "group", "netns", "path", "sha256"]


def test_a_cgroup_holds_for_itself_and_below_and_not_beside():
    s = Selectors(uid=33, cgroup="/system.slice/api.service")
    assert holds(s, facts())
    assert holds(s, facts(cgroup="/system.slice/api.service/worker"))
    for other in ("/system.slice/api.service2", "/system.slice", "/", "", "/x/system.slice/api.service"):
        assert not holds(s, facts(cgroup=other))


def test_a_user_cannot_name_a_directory_like_a_system_unit():
    forged = "/user.slice/user-33.slice/user@33.service/app.slice/api.service"
    assert unit_of(forged) == "user@33.service"
    assert not holds(API, facts(cgroup=forged))
    assert unit_of("/system.slice/api.service/nested.service") == "api.service"
    assert unit_of("/system.slice") is None
    assert unit_of("/") is None


@pytest.mark.parametrize(
    ("cgroup", "found"),
    [
        (f"/system.slice/docker-{HEX}.scope", HEX), (f"/docker/{HEX}", HEX), (f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{HEX}.scope", HEX),
        (f"/machine.slice/libpod-{HEX}.scope/container", HEX), (f"/x/crio-{HEX}.scope", HEX), ("/system.slice/docker.service", None),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{HEX}.scope", None),
        (f"/a/user@1000.service/docker-{HEX}.scope", None), (f"/docker/{HEX[:63]}", None), (f"/docker/{HEX}0", None), ("/", None),
    ],
)  # fmt: skip
def test_container_ids(cgroup, found):
    assert container_of(cgroup) == found
    assert holds(Selectors(uid=33, container=HEX[:12]), facts(cgroup=cgroup)) is (found is not None)


def test_nobody_is_nobody():
    for uid, gid in ((NOBODY, 33), (33, NOBODY)):
        assert not holds(Selectors(uid=uid, unit="api.service"), facts(uid=uid, gid=gid))


def test_more_selectors_weigh_more():
    plain, narrow = API, Selectors(uid=33, unit="api.service", path="/usr/bin/api")
    deep = Selectors(uid=33, cgroup="/a/b/c")
    assert weight(narrow) > weight(plain)
    assert weight(deep) > weight(Selectors(uid=33, cgroup="/a"))
    assert weight(Selectors(uid=33, unit="a.service", groups=[1, 2])) > weight(narrow)


def test_words_round_trip():
    words = ["uid:33", "unit:api.service", "path:/usr/bin/a:b", "group:5", "group:6"]
    made = parse_selectors(words)
    assert made == Selectors(uid=33, unit="api.service", path="/usr/bin/a:b", groups=[5, 6])
    assert parse_selectors(describe(made).split(" ")) == made


@pytest.mark.parametrize(
    "words", [["uid"], ["uid:"], ["uid:x"], ["uid:-1"], ["uid:4294967295"], ["uid:1", "uid:2"], ["groups:1"], ["pid:1"], ["uid:٣"],
              ["cgroup:" + "/a" * 600], [f"group:{n}" for n in range(17)]]
)  # fmt: skip
def test_words_that_are_no_selectors(words):
    with pytest.raises(BadInput) as caught:
        parse_selectors(words)
    assert caught.value.code == "entry.form"


def test_parents():
    assert is_parent(check_parent("web-*"), "web-1")
    assert not is_parent("web-?", "web-10")
    for bad in ("", "Web", "web/1", "[a-z]", "x" * 64, "web\n", "-x"):
        with pytest.raises(BadInput):
            check_parent(bad)


@pytest.mark.parametrize("change", [{"id": "E 1"}, {"name": "../x"}, {"hint": "a\nb"}, {"hint": "\x1b[31m"}, {"labels": {"A": "b"}}])
def test_entries_that_are_refused(change):
    with pytest.raises(BadInput):
        check_entry(Entry(**{"id": "e-1", "name": "shop/api", "selectors": API, **change}))


def test_a_record_refuses_what_it_does_not_know():
    record = EntriesRecord(
        trust_domain="t", endpoint="h", generation=1, entries=[Entry(id="e", name="a", selectors=API)], issued=1
    )
    again = EntriesRecord.model_validate_json(record.model_dump_json())
    assert again == record
    with pytest.raises(ValueError):
        EntriesRecord.model_validate_json(record.model_dump_json().replace('"uid":33', '"uid":33,"root":true'))


SEGMENT = st.text(st.sampled_from("abz09.-_@"), min_size=1, max_size=8).filter(lambda s: s not in {".", ".."})


@settings(deadline=None)
@given(st.integers(0, 70000), st.lists(SEGMENT, min_size=1, max_size=4), st.lists(SEGMENT, max_size=3), st.integers(0, 70000))
def test_holding_means_same_user_and_at_or_below(uid, wanted, below, other):
    s = Selectors(uid=uid, cgroup="/" + "/".join(wanted))
    here = "/" + "/".join([*wanted, *below])
    assert holds(s, Facts(uid, 1, cgroup=here)) is (uid != NOBODY)
    if other != uid:
        assert not holds(s, Facts(other, 1, cgroup=here))
    assert not holds(s, Facts(uid, 1, cgroup=here.replace("/", "/x", 1)))
