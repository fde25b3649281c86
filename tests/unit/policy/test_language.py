"""The language: what it reads, and what it refuses, where and why."""

from __future__ import annotations

import gc
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadPolicy
from policy.compile import compile_policy
from policy.language import digest, load
from policy.ports import parse_ports
from policy.program import AllOf, AnyOf, Everything, Exists, In, Named, Not, Under

FULL = """\
meshpolicy: 1
scope: acme/payments
owners: [role:payments-lead]
labels:
  keys: {app: [shop, ledger, pay, ops], role: "*", env: [dev, prod], data: "*"}
groups:
  web: {app: shop, role: web}
  ledger: {app: ledger, role: api}
  front: [web, {workload: acme/payments/old}]
services:
  pg: tcp/5432
  api: [tcp/8443, tcp/9000-9010]
guardrails:
  - deny: {from: {env: dev}, to: {env: prod}, why: SEC-12}
  - pass: {id: probes, from: "*", to: "*", on: icmp}
segments:
  - name: checkout
    members: {app: [shop, ledger, pay], env: prod}
    mode: enforce
    budget: {rules: 40, unused_ratio: 0.25}
    sensitive: true
    allow:
      - {id: web-to-ledger, from: front, to: ledger, on: api, why: orders}
      - {id: nightly, from: {group: web}, to: {not: {env: dev}}, on: [pg, udp/53], when: {cron: "0 1 * * *", for: 2h, tz: UTC}}
    deny:
      - {id: no-old, from: {under: acme/payments/old}, to: {any: [web, ledger]}, on: any, mode: draft}
  - {name: sketch, mode: draft, allow: [{id: idea, from: "*", to: {all: [web, {env: prod}]}, on: tcp}]}
grants:
  - {id: INC-881, from: {app: ops}, to: {data: "*"}, on: tcp/22, not_before: 2031-02-01, not_after: 2031-02-11T18:00Z}
offers:
  - {to: acme/mail/smtp, on: tcp/25}
accepts:
  - {from: acme/www, to: web, on: tcp/443}
tests:
  - {from: web, to: "ledger:api", expect: allow}
  - {from: web, to: {data: "*"}, on: pg, expect: deny, by: default, at: 2031-02-12T00:00Z}
  - {reach: web, depth: 2, never: {data: "*"}}
  - {reach: web, depth: any, never: ledger}
"""


def _load(text: str):
    return load([("p.yaml", text)])


def test_a_full_policy_is_read():
    policy = _load(FULL)
    assert [g.rule.id for g in policy.guardrails] == ["guardrail:SEC-12", "guardrail:probes"]
    assert [s.name for s in policy.segments] == ["checkout", "sketch"]
    checkout, sketch = policy.segments
    assert [r.id for r in checkout.rules] == ["nightly", "no-old", "web-to-ledger"]
    assert checkout.members == AllOf((In("app", frozenset({"shop", "ledger", "pay"})), In("env", frozenset({"prod"}))))
    assert (checkout.budget.rules, checkout.budget.unused_ratio, checkout.sensitive) == (40, 0.25, True)
    assert sketch.mode == "draft"
    web = AllOf((In("app", frozenset({"shop"})), In("role", frozenset({"web"}))))
    by_id = {r.id: r for r in policy.rules()}
    assert by_id["web-to-ledger"].src == AnyOf((web, Named(frozenset({"acme/payments/old"}))))
    assert by_id["web-to-ledger"].ports == parse_ports("tcp/8443,9000-9010")
    assert by_id["web-to-ledger"].why == "orders"
    assert str(by_id["web-to-ledger"].where) == "p.yaml:23"
    assert by_id["nightly"].dst == AllOf((Everything(), Not(In("env", frozenset({"dev"})))))
    assert by_id["nightly"].ports == parse_ports("tcp/5432") | parse_ports("udp/53")
    assert by_id["no-old"].src == Under("acme/payments/old")
    assert by_id["grant:INC-881"].dst == Exists("data")
    assert policy.grants[0].not_after == 1_928_599_200
    assert [(c.kind, c.peer) for c in policy.consents] == [("offer", "acme/mail/smtp"), ("accept", "acme/www")]
    assert len(policy.tests) == 4
    assert {g.name: g.uses for g in policy.groups}["front"] == ("web",)
    assert policy.owners == {"acme/payments": ("role:payments-lead",)}
    assert policy.digest == digest([("p.yaml", FULL)])


HEAD = "meshpolicy: 1\n"
RULE = HEAD + "segments:\n  - name: s\n    allow:\n      - {id: r, from: %s, to: %s, on: %s}\n"

BAD = [
    # what, text, code, line, column
    ("not a map", "- a", "policy.type", 1, 1),
    ("no version", "segments: []", "policy.version", 1, 1),
    ("other version", "meshpolicy: 2", "policy.version", 1, 13),
    ("unknown top key", HEAD + "segment: []", "policy.unknown_key", 2, 1),
    ("unknown segment key", HEAD + "segments:\n  - {name: s, alow: []}", "policy.unknown_key", 3, 15),
    ("unknown rule key", RULE.replace("id: r", "id: r, port: 1") % ("'*'", "'*'", "any"), "policy.unknown_key", 5, 17),
    ("bad scope", HEAD + "scope: Acme", "name.workload", 2, 8),
    ("segments not a list", HEAD + "segments: {a: b}", "policy.type", 2, 11),
    ("unknown group", RULE % ("web", "'*'", "any"), "policy.unknown_group", 5, 23),
    ("unknown service", RULE % ("'*'", "'*'", "pgg"), "policy.unknown_service", 5, 41),
    ("no on", HEAD + "segments:\n  - name: s\n    allow:\n      - {id: r, from: '*', to: '*'}", "policy.missing_key", 5, 9),
    ("no id", HEAD + "segments:\n  - name: s\n    allow:\n      - {from: '*', to: '*', on: any}", "policy.missing_key", 5, 9),
    ("bad id", RULE.replace("id: r", "id: a b") % ("'*'", "'*'", "any"), "policy.name", 5, 14),
    ("port 0", RULE % ("'*'", "'*'", "tcp/0"), "port.range", 5, 41),
    ("port 65536", RULE % ("'*'", "'*'", "tcp/65536"), "port.range", 5, 41),
    ("reversed", RULE % ("'*'", "'*'", "tcp/90-80"), "port.reversed", 5, 41),
    ("empty on", RULE % ("'*'", "'*'", "[]"), "policy.empty", 5, 41),
    ("empty selector", RULE % ("{}", "'*'", "any"), "policy.empty_selector", 5, 23),
    ("null selector", RULE % ("~", "'*'", "any"), "policy.empty_selector", 5, 23),
    ("empty list selector", RULE % ("[]", "'*'", "any"), "policy.empty_selector", 5, 23),
    ("empty any", RULE % ("{any: []}", "'*'", "any"), "policy.empty_selector", 5, 29),
    ("empty not", RULE % ("{not: {}}", "'*'", "any"), "policy.empty_selector", 5, 29),
    ("empty label list", RULE % ("{app: []}", "'*'", "any"), "policy.empty", 5, 29),
    ("null label", RULE % ("{app: }", "'*'", "any"), "policy.empty", 5, 29),
    ("star in a list", RULE % ("{app: ['*']}", "'*'", "any"), "label.value", 5, 30),
    ("bad label value", RULE % ("{app: 'a b'}", "'*'", "any"), "label.value", 5, 29),
    ("bad label key", RULE % ("{App: a}", "'*'", "any"), "label.key", 5, 24),
    ("bad workload", RULE % ("{workload: Shop}", "'*'", "any"), "name.workload", 5, 34),
    ("process alone", RULE % ("{process: /bin/x}", "'*'", "any"), "policy.empty_selector", 5, 23),
    ("any not a list", RULE % ("{any: a}", "'*'", "any"), "policy.type", 5, 29),
    ("nested value", RULE % ("{app: {a: b}}", "'*'", "any"), "policy.type", 5, 29),
    ("unknown label", HEAD + "labels: {keys: [app]}\ngroups: {g: {ap: x}}", "policy.unknown_label", 3, 14),
    ("unknown value", HEAD + "labels: {keys: {env: [prod]}}\ngroups: {g: {env: prd}}", "policy.unknown_value", 3, 19),
    ("label key word", HEAD + "labels: {keys: [not]}", "label.key", 2, 17),
    ("label key form", HEAD + "labels: {keys: [App]}", "label.key", 2, 17),
    ("label key twice", HEAD + "labels: {keys: [a, a]}", "policy.duplicate", 2, 20),
    ("no label keys", HEAD + "labels: {keys: []}", "policy.empty", 2, 16),
    ("label value form", HEAD + "labels: {keys: {a: ['x y']}}", "label.value", 2, 21),
    ("empty group", HEAD + "groups:\n  g:\n", "policy.empty_group", 3, 3),
    ("empty group map", HEAD + "groups:\n  g: {}\n", "policy.empty_selector", 3, 6),
    ("group name", HEAD + "groups:\n  G: {a: b}\n", "policy.name", 3, 3),
    ("group cycle", HEAD + "groups:\n  a: [b]\n  b: {any: [c]}\n  c: a\n", "policy.cycle", 5, 6),
    ("group names itself", HEAD + "groups:\n  a: {not: a}\n", "policy.cycle", 3, 12),
    ("empty service", HEAD + "services:\n  s:\n", "policy.empty_service", 3, 3),
    ("service as protocol", HEAD + "services:\n  tcp: tcp/1\n", "policy.name", 3, 3),
    ("service ports", HEAD + "services:\n  s: tcp/0\n", "port.range", 3, 6),
    ("guardrail of two", HEAD + "guardrails:\n  - {deny: {from: '*', to: '*', id: a}, pass: {}}", "policy.guardrail", 3, 5),
    ("guardrail without id", HEAD + "guardrails:\n  - deny: {from: '*', to: '*'}", "policy.missing_key", 3, 11),
    ("guardrail why of many words", HEAD + "guardrails:\n  - deny: {from: '*', to: '*', why: a b}", "policy.missing_key", 3, 37),
    ("guardrail pass without on", HEAD + "guardrails:\n  - pass: {id: a, from: '*', to: '*'}", "policy.missing_key", 3, 11),
    ("segment without name", HEAD + "segments:\n  - {allow: []}", "policy.missing_key", 3, 5),
    ("segment name", HEAD + "segments:\n  - {name: S}", "policy.name", 3, 12),
    ("segment twice", HEAD + "segments:\n  - {name: s}\n  - {name: s}", "policy.duplicate", 4, 12),
    ("mode word", HEAD + "segments:\n  - {name: s, mode: on}", "policy.value", 3, 21),
    ("audit without end", HEAD + "segments:\n  - {name: s, mode: audit}", "policy.audit_end", 3, 21),
    ("audit with a bad end", HEAD + "segments:\n  - {name: s, mode: {audit_until: soon}}", "time.instant", 3, 35),
    ("audit of everybody by silence", HEAD + "segments:\n  - {name: s, mode: {audit_until: 2031-01-01}}", "policy.audit_members", 3, 5),
    ("audit of nobody", HEAD + "segments:\n  - {name: s, members: {}, mode: {audit_until: 2031-01-01}}", "policy.empty_selector", 3, 24),
    ("budget", HEAD + "segments:\n  - {name: s, budget: {rules: 0}}", "policy.number", 3, 31),
    ("budget ratio", HEAD + "segments:\n  - {name: s, budget: {unused_ratio: 2}}", "policy.number", 3, 38),
    ("budget ratio word", HEAD + "segments:\n  - {name: s, budget: {unused_ratio: x}}", "policy.number", 3, 38),
    ("sensitive", HEAD + "segments:\n  - {name: s, sensitive: yes}", "policy.value", 3, 26),
    ("alert to an address", HEAD + "segments:\n  - {name: s, alert: {on_deny: 'http://169.254.169.254/'}}", "policy.value", 3, 32),
    ("alert word", HEAD + "segments:\n  - {name: s, alert: {on_deny: shout}}", "policy.value", 3, 32),
    ("alert collapse", HEAD + "segments:\n  - {name: s, alert: {on_deny: log, collapse: x}}", "time.duration", 3, 47),
    ("process path", RULE % ("{app: a, process: /bin/x}", "'*'", "any"), "policy.not_enforced", 5, 41),
    ("process uid", RULE % ("{app: a, process: 'uid:4294967295'}", "'*'", "any"), "policy.process", 5, 41),
    ("process upwards", RULE % ("{app: a, process: 'cgroup:a/../b'}", "'*'", "any"), "policy.process", 5, 41),
    ("process of nft", RULE % ("{app: a, process: 'cgroup:a; accept'}", "'*'", "any"), "policy.process", 5, 41),
    ("process unit", RULE % ("{app: a, process: 'unit:a/b.service'}", "'*'", "any"), "policy.process", 5, 41),
    ("process of a root slice", RULE % ("{app: a, process: 'unit:-.slice'}", "'*'", "any"), "policy.process", 5, 41),
    ("process without a name", RULE % ("{app: a, process: 'unit:'}", "'*'", "any"), "policy.process", 5, 41),
    ("process of the root group", RULE % ("{app: a, process: 'cgroup:/'}", "'*'", "any"), "policy.process", 5, 41),
    ("process none", RULE % ("{app: a, process: }", "'*'", "any"), "policy.empty", 5, 41),
    ("process alone", RULE % ("{process: 'uid:1'}", "'*'", "any"), "policy.empty_selector", 5, 23),
    ("process of the destination", RULE % ("'*'", "{app: a, process: 'uid:1'}", "any"), "policy.process", 5, 41),
    ("process of a deny", HEAD + "guardrails:\n  - deny: {id: x, from: {app: a, process: 'uid:1'}, to: '*'}", "policy.process", 3, 34),
    ("rate", RULE.replace("id: r", "max_rate: 5Mb, id: r") % ("'*'", "'*'", "any"), "policy.rate", 5, 20),
    ("rate of nothing", RULE.replace("id: r", "max_rate: 0Mbit, id: r") % ("'*'", "'*'", "any"), "policy.rate", 5, 20),
    ("rate too high", RULE.replace("id: r", "max_rate: 1001Gbit, id: r") % ("'*'", "'*'", "any"), "policy.rate", 5, 20),
    ("rate of a deny", HEAD + "guardrails:\n  - deny: {id: x, max_rate: 1Mbit, from: '*', to: '*'}", "policy.rate", 3, 29),
    ("idle timeout", RULE.replace("id: r", "idle_timeout: 5, id: r") % ("'*'", "'*'", "any"), "time.duration", 5, 24),
    ("idle timeout of nothing", RULE.replace("id: r", "idle_timeout: 0s, id: r") % ("'*'", "'*'", "any"), "time.duration", 5, 24),
    ("idle timeout too long", RULE.replace("id: r", "idle_timeout: 31d, id: r") % ("'*'", "'*'", "any"), "policy.idle_timeout", 5, 24),
    ("idle timeout of ICMP", RULE.replace("id: r", "idle_timeout: 5m, id: r") % ("'*'", "'*'", "icmp"), "policy.idle_timeout", 5, 24),
    ("idle timeout of a deny", HEAD + "guardrails:\n  - deny: {id: x, idle_timeout: 5m, from: '*', to: '*'}", "policy.idle_timeout", 3, 33),
    ("idle timeout of a segment", HEAD + "segments:\n  - {name: s, idle_timeout: 31d, allow: [{id: r, from: '*', to: '*', on: any}]}", "policy.idle_timeout", 3, 29),
    ("idle timeout of nobody", HEAD + "segments:\n  - {name: s, idle_timeout: 31d}", "policy.idle_timeout", 3, 29),
    ("window cron", RULE.replace("id: r", "when: {cron: x, for: 1h}, id: r") % ("'*'", "'*'", "any"), "time.cron", 5, 23),
    ("window for", RULE.replace("id: r", "when: {cron: 0 1 * * *, for: 1}, id: r") % ("'*'", "'*'", "any"), "time.duration", 5, 39),
    ("window zone", RULE.replace("id: r", "when: {cron: 0 1 * * *, for: 1h, tz: X}, id: r") % ("'*'", "'*'", "any"), "time.zone", 5, 47),
    ("grant without end", HEAD + "grants:\n  - {id: g, from: '*', to: '*', on: any}", "policy.grant_end", 3, 5),
    ("grant backwards", HEAD + "grants:\n  - {id: g, from: '*', to: '*', on: any, not_before: 2031-01-02, not_after: 2031-01-01}", "policy.grant_end", 3, 77),
    ("grant instant", HEAD + "grants:\n  - {id: g, from: '*', to: '*', on: any, not_after: soon}", "time.instant", 3, 53),
    ("grant instant empty", HEAD + "grants:\n  - {id: g, from: '*', to: '*', on: any, not_after: }", "policy.empty", 3, 53),
    ("end condition name", HEAD + "grants:\n  - {id: g, from: '*', to: '*', on: any, until: {workload_ends: A}}", "name.workload", 3, 65),
    ("idle duration", HEAD + "idle: {keep_membership: 90}", "time.duration", 2, 25),
    ("idle duration empty", HEAD + "idle: {keep_membership: }", "policy.empty", 2, 25),
    ("idle word", HEAD + "idle: {on_return: hope}", "policy.value", 2, 19),
    ("review count", HEAD + "review: {approvals: 0}", "policy.number", 2, 21),
    ("offer without scope", HEAD + "offers:\n  - {to: a/b, on: tcp/25}", "policy.consent", 3, 5),
    ("offer to itself", HEAD + "scope: a\noffers:\n  - {to: a/b, on: tcp/25}", "policy.consent", 4, 10),
    ("rule outside the scope", HEAD.replace("\n", "\nscope: a\n") + RULE.partition("\n")[2] % ("'*'", "{workload: b/c}", "any"), "policy.outside_scope", 6, 32),
    ("deny outside the scope", HEAD + "scope: a\nguardrails:\n  - deny: {id: x, from: {under: b}, to: {workload: c}}", "policy.outside_scope", 4, 41),
    ("accept outside the scope", HEAD + "scope: a\naccepts:\n  - {from: b, to: {under: c}, on: any}", "policy.outside_scope", 4, 19),
    ("duplicate id", HEAD + "guardrails:\n  - deny: {id: x, from: '*', to: '*'}\n  - deny: {id: x, from: '*', to: '*'}", "policy.duplicate", 4, 16),
    ("test without ports", HEAD + "tests:\n  - {from: '*', to: '*', expect: deny}", "policy.missing_key", 3, 5),
    ("test of a map without ports", HEAD + "tests:\n  - {from: '*', to: {app: a}, expect: deny}", "policy.missing_key", 3, 5),
    ("test expects", HEAD + "tests:\n  - {from: '*', to: '*', on: any, expect: maybe}", "policy.value", 3, 43),
    ("test group", HEAD + "tests:\n  - {from: '*', to: 'api:tcp/80', expect: deny}", "policy.unknown_group", 3, 21),
    ("test service", HEAD + "tests:\n  - {from: '*', to: '*:htp', expect: deny}", "policy.unknown_service", 3, 23),
    ("replay", HEAD + "tests:\n  - {replay: 30d, max_new_denied: 0}", "policy.value", 3, 14),
    ("reach depth", HEAD + "tests:\n  - {reach: '*', never: '*', depth: 0}", "policy.number", 3, 37),
]


@pytest.mark.parametrize(("text", "code", "line", "column"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_refused_with_code_and_position(text, code, line, column):
    with pytest.raises(BadPolicy) as caught:
        _load(text)
    assert (caught.value.code, caught.value.line, caught.value.column) == (code, line, column)
    assert caught.value.file == "p.yaml"
    assert caught.value.hint, "what to do about it"


def test_hints_name_what_was_meant():
    cases = [
        (HEAD + "segmnts: []", "did you mean segments?"),
        (HEAD + "groups: {web: {a: b}}\nsegments: [{name: s, members: wbe}]", "did you mean web?"),
        (HEAD + "labels: {keys: [role]}\ngroups: {g: {rol: x}}", "did you mean role?"),
        (HEAD + "segments: [{name: s, members: {}}]", 'write "*"'),
    ]
    for text, hint in cases:
        with pytest.raises(BadPolicy) as caught:
            _load(text)
        assert hint in caught.value.hint


def test_group_bombs_are_refused():
    doubling = "".join(f"  g{n}: {{any: [{{all: [g{n - 1}, {{a: x{n}}}]}}, {{all: [g{n - 1}, {{a: y{n}}}]}}]}}\n" for n in range(1, 30))
    with pytest.raises(BadPolicy) as caught:
        _load(HEAD + "groups:\n  g0: {a: b}\n" + doubling)
    assert caught.value.code == "policy.too_complex"
    chain = "".join(f"  g{n}: {{not: g{n - 1}}}\n" for n in range(1, 100))
    for text in (chain, "".join(reversed(chain.splitlines(keepends=True)))):
        with pytest.raises(BadPolicy) as caught:
            _load(HEAD + "groups:\n  g0: {a: b}\n" + text)
        assert caught.value.code == "policy.too_complex"
    wide = ", ".join(f"v{n}" for n in range(6000))
    with pytest.raises(BadPolicy) as caught:
        _load(HEAD + f"groups:\n  g: [{', '.join(f'{{a: b{n}}}' for n in range(6000))}]")
    assert caught.value.code == "policy.too_complex"
    assert _load(HEAD + f"groups:\n  g: {{a: [{wide}]}}").groups[0].name == "g"


def test_files():
    with pytest.raises(BadPolicy, match="at least one"):
        load([])
    with pytest.raises(BadPolicy) as caught:
        load([("a", HEAD), ("a", HEAD)])
    assert caught.value.code == "policy.duplicate_file"
    with pytest.raises(BadPolicy) as caught:
        load([(str(n), HEAD) for n in range(1001)])
    assert caught.value.code == "policy.too_large"
    assert load([("a", HEAD)]).rules() == ()


def test_several_files_are_one_policy_in_any_order():
    files = [
        ("a.yaml", HEAD + "groups: {web: {app: web}}\n"),
        ("b.yaml", HEAD + "services: {http: tcp/80}\nlabels: {keys: [app]}\nowners: [ann, bob]\n"),
        ("c.yaml", HEAD + "owners: cid\nlabels: {keys: [env]}\nsegments: [{name: s, allow: [{id: r, from: web, to: {env: prod}, on: http}]}]\n"),
        ("d.yaml", HEAD + "scope: team\nsegments: [{name: t, allow: [{id: q, from: web, to: {app: db}, on: http}]}]\n"),
    ]
    policies = [load(order) for order in itertools.permutations(files)]
    assert all(p == policies[0] for p in policies)
    assert all(compile_policy(p) == compile_policy(policies[0]) for p in policies)
    assert policies[0].owners == {"": ("ann", "bob", "cid")}
    assert len({digest(order) for order in itertools.permutations(files)}) == 1
    assert digest(files) != digest([*files[1:], ("a.yaml", HEAD)])
    assert digest([("ab", "c")]) != digest([("a", "bc")])
    for twice, code in (("groups: {web: {app: x}}", "policy.duplicate"), ("labels: {keys: {app: [web]}}", "policy.duplicate")):
        with pytest.raises(BadPolicy) as caught:
            load([*files, ("e.yaml", HEAD + twice)])
        assert caught.value.code == code


def test_a_scope_sees_its_ancestors_names_and_shadows_them():
    root = ("root.yaml", HEAD + "groups: {web: {app: web}}\nservices: {http: tcp/80}\n")
    own = ("own.yaml", HEAD + "scope: a\ngroups: {web: {app: own}}\nsegments: [{name: s, allow: [{id: r, from: web, to: web, on: http}]}]\n")
    (rule,) = load([root, own]).rules()
    assert rule.src == In("app", frozenset({"own"}))
    below = ("below.yaml", HEAD + "scope: b\nsegments: [{name: t, members: hidden}]\n")
    with pytest.raises(BadPolicy) as caught:
        load([root, own, below, ("x.yaml", HEAD + "scope: a\ngroups: {hidden: {app: x}}")])
    assert caught.value.code == "policy.unknown_group"


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_file_loads_or_is_refused(data):
    text = FULL
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        end = min(len(text), at + data.draw(st.integers(0, 12)))
        text = text[:at] + data.draw(st.text(max_size=6) | st.sampled_from(("{}", "[]", ": ", "\n  ", "'*'", "not: ", "web", "~", "}", "- "))) + text[end:]
    try:
        compile_policy(_load(text), 1_900_000_000)
    except BadPolicy as error:
        refusal = error
    else:
        return
    assert refusal.code
    assert refusal.message


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        _load(HEAD)
        assert gc.isenabled() is enabled
        with pytest.raises(BadPolicy):
            _load("meshpolicy: 2\n")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
