from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca import policies as module
from ca.policies import Policies, newest
from identity import records
from identity.errors import BadInput, BadPolicy, NotFound
from identity.records import PolicyRecord
from policy.ports import parse_ports
from policy.program import Action, AllOf, Everything, In, Named, Not, Program, Rule, Subject, Tier
from policy.questions import difference

HEAD = "meshpolicy: 1\nlabels: {keys: [role]}\n"
WEB_TO_API = (
    HEAD
    + """segments:
  - name: shop
    allow:
      - {id: web-api, from: {role: web}, to: {role: api}, on: tcp/8080}
"""
)
NOTHING = HEAD


@pytest.fixture
def shop(bench):
    bench.enrol("a")
    bench.add("shop/web", "a", labels={"role": "web"})
    bench.add("shop/api", "a", labels={"role": "api"})
    bench.policies = Policies(bench.desk)
    return bench


def apply(bench, text: str, **more):
    return bench.policies.apply([("p.yaml", text)], more.pop("author", "me"), bench.now, "test", **more)


def test_a_policy_is_signed_kept_and_diffed(shop) -> None:
    done = apply(shop, WEB_TO_API)
    assert (done.revision, done.applied, done.lost) == (1, True, [])
    assert done.gained == [{"src": "shop/web", "dst": "shop/api", "ports": "tcp/8080"}]
    with shop.store.read() as tx:
        row = newest(tx)
    record = records.verify(PolicyRecord, row.record, [shop.key.public_key()], trust_domain="reg.test")
    assert (record.revision, record.digest, record.author) == (1, done.digest, "me")
    assert [(f.name, f.text) for f in record.files] == [("p.yaml", WEB_TO_API)]
    second = apply(shop, NOTHING)
    assert (second.revision, second.gained) == (2, [])
    assert second.lost == done.gained
    assert [p.revision for p in shop.policies.history()] == [2, 1]
    assert shop.policies.show(1).files[0].text == WEB_TO_API
    assert shop.policies.show().revision == 2


def test_the_same_policy_again_changes_nothing(shop) -> None:
    apply(shop, WEB_TO_API)
    with shop.store.read() as tx:
        before = shop.store.revision(tx)
    again = apply(shop, WEB_TO_API)
    assert (again.revision, again.gained, again.lost) == (1, [], [])
    with shop.store.read() as tx:
        assert shop.store.revision(tx) == before


def test_an_older_policy_again_is_a_new_revision(shop) -> None:
    first = apply(shop, WEB_TO_API)
    apply(shop, NOTHING)
    third = apply(shop, WEB_TO_API)
    assert (third.revision, third.digest) == (3, first.digest)


def test_a_dry_run_changes_nothing(shop) -> None:
    done = apply(shop, WEB_TO_API, dry_run=True)
    assert (done.applied, done.revision, len(done.gained)) == (False, 1, 1)
    with pytest.raises(NotFound) as e:
        shop.policies.show()
    assert e.value.code == "policy.none"


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("meshpolicy: 1\nsegmnets: []\n", "policy.unknown_key", 2),
        (
            HEAD
            + "segments:\n  - name: s\n    allow:\n      - {id: x, from: {rôle: web}, to: {role: api}, on: tcp/1}\n",
            "label.key",
            6,
        ),
        ("{", "policy", 2),
        (
            WEB_TO_API + "tests:\n  - {from: {role: web}, to: {role: api}, on: tcp/8080, expect: deny}\n",
            "policy.tests",
            8,
        ),
    ],
)
def test_a_bad_policy_leaves_the_one_in_force(shop, text: str, code: str, line: int) -> None:
    apply(shop, WEB_TO_API)
    for dry_run in (True, False):
        with pytest.raises(BadPolicy) as e:
            apply(shop, text, dry_run=dry_run)
        assert e.value.code.startswith(code)
        assert (e.value.file, e.value.line) == ("p.yaml", line)
    assert shop.policies.show().files[0].text == WEB_TO_API


def test_unknown_revisions(shop) -> None:
    apply(shop, WEB_TO_API)
    with pytest.raises(NotFound) as e:
        shop.policies.show(9)
    assert "1" in e.value.hint


def test_explanations(shop) -> None:
    before = shop.policies.explain("shop/web", "shop/api", "tcp", 8080, shop.now)
    assert (before.verdict, before.rule) == ("deny", None)
    apply(shop, WEB_TO_API)
    yes = shop.policies.explain("shop/web", "shop/api", "tcp", 8080, shop.now)
    assert (yes.verdict, yes.rule, yes.where) == ("allow", "web-api", "p.yaml:6")
    no = shop.policies.explain("shop/web", "shop/api", "tcp", 22, shop.now)
    assert no.verdict == "deny"
    assert no.smallest_change
    assert any("web-api" in miss for miss in no.near_misses)
    assert shop.policies.explain("shop/api", "shop/web", "icmp", None, shop.now).verdict == "deny"


LIMITED = WEB_TO_API.replace("on: tcp/8080", "on: tcp/8080, max_rate: 1Mbit, idle_timeout: 5m").replace(
    "from: {role: web}", "from: {role: web, process: uid:33}"
)


def test_an_explanation_says_on_what_an_allowed_flow_depends(shop) -> None:
    apply(shop, LIMITED)
    yes = shop.policies.explain("shop/web", "shop/api", "tcp", 8080, shop.now)
    assert yes.verdict == "allow"
    assert sorted(yes.conditions) == [
        "at most 1000000 bit/s each way by web-api", "ended after 300 s of silence by web-api",
        "only uid 33 at the source by web-api",
    ]  # fmt: skip
    assert yes.model_dump()["conditions"] == yes.conditions
    no = shop.policies.explain("shop/web", "shop/api", "tcp", 22, shop.now)
    assert "conditions" not in no.model_dump()  # an agent before this field reads the answer


def test_an_explanation_says_what_an_audit_lets_through(shop) -> None:
    audit = HEAD + 'segments:\n  - {name: s, members: {role: [web, api]}, mode: {audit_until: "2027-02-01T00:00:00Z"}, allow: []}\n'
    apply(shop, audit)
    found = shop.policies.explain("shop/web", "shop/api", "tcp", 22, shop.now)
    assert (found.verdict, found.audited, found.would_deny) == ("allow", True, "default")


def test_bad_questions(shop) -> None:
    with pytest.raises(NotFound) as e:
        shop.policies.explain("shop/web", "shop/apl", "tcp", 1, shop.now)
    assert "shop/api" in e.value.hint
    with pytest.raises(BadInput):
        shop.policies.explain("shop/web", "shop/api", "tcp", 70000, shop.now)
    with pytest.raises(BadInput):
        shop.policies.explain("shop/web", "shop/api", "carrier-pigeon", 1, shop.now)
    shop.placements.revoke("shop/api", 0, shop.now, "test")
    with pytest.raises(NotFound):
        shop.policies.explain("shop/web", "shop/api", "tcp", 1, shop.now)


WHO = st.sampled_from(
    [Everything(), In("role", frozenset({"web"})), In("role", frozenset({"api", "db"})), Named(frozenset({"w1"})),
     AllOf((Not(Named(frozenset({"w2"}))), In("role", frozenset({"db"}))))]
)  # fmt: skip
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(Action), WHO, WHO, st.sampled_from(["tcp/1", "tcp/1-9", "udp/7", "icmp"])), max_size=4
).map(
    lambda rules: Program(
        (Tier("t", tuple(Rule(f"r{n}", a, s, d, parse_ports(p)) for n, (a, s, d, p) in enumerate(rules))),)
    )
)


@settings(max_examples=150, deadline=None)
@given(PROGRAMS, PROGRAMS, st.lists(st.sampled_from(["web", "api", "db", "other"]), max_size=7))
def test_the_diff_by_groups_equals_the_one_by_pairs(before: Program, after: Program, roles: list[str]) -> None:
    known = [Subject(f"w{n}", {"role": role}) for n, role in enumerate(roles)]
    wanted: dict[str, list[dict[str, str]]] = {"gains": [], "loses": []}
    for one in difference(before, after, known):
        wanted[one.kind].append({"src": one.src, "dst": one.dst, "ports": str(one.ports)})
    assert module.difference_of(before, after, known) == (wanted["gains"], wanted["loses"])


def test_a_large_diff_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DIFF", 7)
    known = [Subject(f"w{n}") for n in range(9)]
    everything = Program((Tier("t", (Rule("r", Action.ALLOW, Everything(), Everything()),)),))
    gained, lost = module.difference_of(Program(()), everything, known)
    assert ([p["dst"] for p in gained], lost) == ([f"w{n}" for n in range(1, 8)], [])


FOREIGN = """meshpolicy: 1
labels: {keys: [role]}
segments:
  - name: edge
    allow:
      - {id: theirs, from: spiffe://%s/shop/*, to: {role: api}, on: tcp/8080}
"""


def test_a_policy_names_foreign_identities_and_never_our_own_as_such(shop) -> None:
    assert apply(shop, FOREIGN % "other.example").gained == [], "they are in nobody's inventory"
    them = "spiffe://other.example/shop/web"
    assert shop.policies.explain(them, "shop/api", "tcp", 8080, shop.now).rule == "theirs"
    assert shop.policies.explain(them, "shop/web", "tcp", 8080, shop.now).verdict == "deny"
    assert shop.policies.explain("shop/api", them, "tcp", 8080, shop.now).verdict == "deny"
    for wrong, kind in (("spiffe://reg.test/wl/shop/web", NotFound), ("spiffe://other.example/../x", BadInput)):
        with pytest.raises(kind):
            shop.policies.explain(wrong, "shop/api", "tcp", 8080, shop.now)
    with pytest.raises(BadPolicy) as e:
        apply(shop, FOREIGN % "reg.test")
    assert (e.value.code, e.value.line) == ("policy.foreign", 6)
