"""Counts and identity of classes; their verdicts are held to the evaluator in test_random_programs.py."""

from __future__ import annotations

import pytest

from policy.classes import Classes, bits
from policy.ports import parse_ports
from policy.program import (
    Action,
    AllOf,
    AnyOf,
    Everything,
    Exists,
    In,
    Named,
    Nothing,
    Program,
    Rule,
    Subject,
    Tier,
    Under,
)


def _in(key: str, *values: str) -> In:
    return In(key, frozenset(values))


def _program(*ends) -> Program:
    rules = tuple(Rule(f"r{n}", Action.ALLOW, s, d, parse_ports(f"tcp/{n + 1}")) for n, (s, d) in enumerate(ends))
    return Program((Tier("t", rules),))


def test_subjects_that_the_program_cannot_tell_apart_are_one_class():
    classes = Classes(_program((_in("app", "web"), _in("app", "api"))))
    for n in range(50):
        classes.put(Subject(f"w{n}", {"app": "web", "pod": str(n), "zone": "a"}))
        classes.put(Subject(f"x{n}", {"app": f"other{n}"}))
    classes.put(Subject("api", {"app": "api"}))
    assert len(classes) == 3
    assert classes.class_of("w1") == classes.class_of("w49")
    assert str(classes.permitted("w3", "api")) == "tcp/1"
    assert classes.subject("w3").labels["pod"] == "3"


def test_names_trees_and_presence_make_classes():
    classes = Classes(_program((Named(frozenset({"a/b"})), Under("a")), (Exists("app"), _in("app", "", "x"))))
    for name, labels in (("a/b", {}), ("a/c", {}), ("b", {}), ("b2", {"app": ""}), ("b3", {"app": "x"}), ("b4", {"app": "q"}), ("b5", {"app": "r"})):
        classes.put(Subject(name, labels))
    assert len(classes) == 6
    assert classes.class_of("b4") == classes.class_of("b5")
    assert classes.class_of("b2") != classes.class_of("b4")


def test_a_relabelled_subject_changes_its_class_only():
    classes = Classes(_program((_in("app", "web"), _in("app", "api"))), [Subject("a", {"app": "web"}), Subject("b", {"app": "api"})])
    assert [n for c in classes.targets(classes.class_of("a")) for n in classes.members[c]] == ["b"]
    classes.put(Subject("a", {"app": "api"}))
    assert list(classes.sources(classes.class_of("b"))) == []  # nobody is web any more
    assert not classes.permitted("a", "b")
    classes.remove("b")
    with pytest.raises(KeyError):
        classes.class_of("b")


def test_rules_are_found_by_the_label_they_need():
    wide = AnyOf((_in("app", "web"), AllOf((_in("app", "api"), _in("env", "prod")))))
    classes = Classes(_program((wide, Everything()), (Nothing(), Everything()), (AnyOf(()), Everything()), (_in("app"), Everything())))
    for name, labels in (("w", {"app": "web"}), ("p", {"app": "api", "env": "prod"}), ("d", {"app": "api", "env": "dev"})):
        classes.put(Subject(name, labels))
    assert str(classes.permitted("w", "d")) == str(classes.permitted("p", "d")) == "tcp/1"
    assert not classes.permitted("d", "w")


def test_bits():
    assert list(bits(0)) == []
    assert list(bits(0b101001)) == [0, 3, 5]
