"""policy/test.py: the tests that policy files hold."""

from __future__ import annotations

import pytest

from policy.compile import compile_policy
from policy.evaluate import Decision
from policy.language import load
from policy.program import Program, Subject
from policy.test import decided_by, run_tests

BASE = """\
meshpolicy: 1
groups: {web: {role: web}, api: {role: api}, db: {role: db}}
guardrails: [{deny: {from: {env: dev}, to: {env: prod}, why: SEC-12}}]
segments:
  - name: s
    members: {env: [prod, dev]}
    allow:
      - {id: web-api, from: web, to: api, on: [tcp/80, tcp/443]}
      - {id: api-db, from: api, to: db, on: tcp/5432}
grants: [{id: g, from: web, to: db, on: tcp/22, not_after: 2031-01-01}]
tests:
"""
WEB, API, DB = (Subject(f"shop/{r}", {"role": r, "env": "prod"}) for r in ("web", "api", "db"))
DEV = Subject("shop/dev", {"role": "dev", "env": "dev"})
ALL = (WEB, API, DB, DEV)


def _run(test: str, subjects=ALL, now=None):
    policy = load([("p.yaml", BASE + f"  - {test}\n")])
    (result,) = run_tests(policy, compile_policy(policy, now), subjects)
    return result


@pytest.mark.parametrize(
    "test",
    [
        '{from: web, to: "api:tcp/80", expect: allow, by: web-api}',
        "{from: web, to: api, on: [tcp/80, tcp/443], expect: allow}",
        '{from: web, to: "db:tcp/5432", expect: deny, by: default}',
        "{from: {env: dev}, to: {env: prod}, on: any, expect: deny, by: SEC-12}",
        '{from: {env: dev}, to: "api:tcp/80", expect: deny, by: "guardrail:SEC-12"}',
        "{from: web, to: db, on: tcp/22, at: 2030-12-31, expect: allow, by: g}",
        "{from: web, to: db, on: tcp/22, at: 2031-01-01, expect: deny}",
        "{from: web, to: db, on: [icmp, 47], expect: deny}",
        "{reach: web, depth: 1, never: db}",
        "{reach: db, never: web}",
    ],
)
def test_that_hold(test):
    result = _run(test)
    assert result.passed, result.message
    assert result.covers
    assert not result.stand_in


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ('{from: web, to: "api:tcp/81", expect: allow}', "shop/web -> shop/api tcp/81: default deny"),
        ("{from: web, to: api, on: any, expect: deny}", "shop/web -> shop/api tcp/80: allowed by rule web-api"),
        ("{from: web, to: api, on: any, expect: allow}", "default deny"),
        ('{from: web, to: "api:tcp/80", expect: allow, by: other}', "tcp/80 is decided by web-api, not by other"),
        ('{from: "*", to: "api:tcp/80", expect: allow}', "shop/"),
        ("{reach: web, never: db}", "shop/web -> shop/api -> shop/db"),
        ("{reach: web, depth: 2, never: db}", "shop/web -> shop/api -> shop/db"),
        ("{from: {workload: shop/web}, to: {workload: shop/web}, on: any, expect: deny}", "covers nothing"),
        ("{from: {all: [{a: b}, {a: c}]}, to: web, on: any, expect: deny}", "covers nothing"),
        ("{reach: web, never: web}", "covers nothing"),
    ],
)
def test_that_fail_say_why(test, says):
    result = _run(test)
    assert not result.passed
    assert says in result.message
    assert result.where.line == 12


def test_stand_ins_take_the_place_of_workloads_to_come():
    result = _run('{from: {role: web, env: prod}, to: "api:tcp/80", expect: allow}', ())
    assert (result.passed, result.stand_in, result.covers) == (True, True, 1)
    assert _run("{from: {workload: a/b, env: prod}, to: {under: x, env: '*'}, on: tcp/1, expect: deny}", ()).passed
    assert _run("{from: {any: [{role: db}, {role: api}], env: dev}, to: {not: {role: db}}, on: tcp/1, expect: deny}", ()).passed
    assert _run('{from: web, to: "api:tcp/80", expect: allow, by: web-api}', ()).passed  # a web that is a member would be
    assert _run('{from: {env: prod}, to: "api:tcp/80", expect: allow}', ()).passed  # and so would a web among the env: prod
    assert _run('{from: web, to: "api:tcp/80", expect: allow}', (API,)).passed
    assert _run('{from: web, to: "api:tcp/80", expect: allow}', (WEB,)).passed
    assert not _run('{from: web, to: "db:tcp/80", expect: allow}', ()).passed
    assert not _run('{from: {role: web, env: dev}, to: {role: api, env: prod}, on: tcp/80, expect: allow}', ()).passed
    assert not _run('{from: db, to: "api:tcp/80", expect: allow}', ()).passed
    assert not _run("{reach: {role: web, env: prod}, never: {role: db, env: prod}}", ()).passed
    assert _run("{reach: {role: db, env: prod}, never: {role: web, env: prod}}", ()).passed
    taken = Subject("a/b", {"role": "x"})
    assert not _run("{from: {workload: a/b, role: y}, to: web, on: any, expect: deny}", (taken, WEB)).passed


def test_names_of_what_decided():
    assert decided_by(Decision("deny", None, "", "", "egress")) == ("default",)
    assert decided_by(Decision("deny", None, "", "", "egress", "iso")) == ("tier:iso",)


def test_tests_with_a_time_use_the_running_workloads_given():
    policy = load([("p.yaml", BASE + "  - {from: web, to: db, on: tcp/22, at: 2030-01-01, expect: allow}\n")])
    (result,) = run_tests(policy, Program(()), ALL, running=["x"])
    assert result.passed


SCOPED = """\
meshpolicy: 1
scope: acme/pay
guardrails: [{deny: {id: apart, from: {env: dev}, to: {env: prod}}}]
segments: [{name: s, allow: [{id: a, from: {role: web}, to: {role: api}, on: tcp/80}]}]
tests:
  - {from: {env: dev}, to: {env: prod}, on: tcp/80, expect: deny, by: apart}
  - {from: {under: acme/mail, env: dev}, to: {workload: acme/mail/x}, on: tcp/80, expect: deny, by: default}
  - {from: {role: web}, to: {role: api}, on: tcp/80, expect: allow}
  - {reach: {role: db}, never: {role: web}}
"""


def test_made_up_subjects_stand_in_the_scope_of_the_file_that_asks() -> None:
    policy = load([("p.yaml", SCOPED)])
    results = run_tests(policy, compile_policy(policy, 0), ())
    assert [(r.passed, r.stand_in, r.message) for r in results if not r.passed] == []
    assert all(r.stand_in for r in results)
    opened = load([("p.yaml", SCOPED.replace("from: {role: web}, to: {role: api}, on: tcp/80}]", "from: {role: db}, to: {role: web}, on: tcp/80}]"))])
    assert [r.passed for r in run_tests(opened, compile_policy(opened, 0), ())] == [True, True, False, False]
