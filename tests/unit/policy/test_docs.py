"""docs/POLICY.md: its file is a policy, and its own tests hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from policy.compile import compile_policy
from policy.language import load
from policy.lint import lint
from policy.test import run_tests
from policy.windows import parse_instant

DOCS = Path(__file__).resolve().parents[3] / "docs"
NOW = parse_instant("2031-02-01")


def blocks(name: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def test_the_file_of_the_guide() -> None:
    (text,) = blocks("POLICY.md")
    policy = load([("guide.yaml", text)])
    results = run_tests(policy, compile_policy(policy, NOW), ())
    assert len(results) == 5
    assert [r for r in results if not r.passed] == []
    assert [f for f in lint(policy, (), NOW) if f.severity == "error"] == []


@pytest.mark.parametrize("text", blocks("PLACES.md"))
def test_rules_of_places(text: str) -> None:
    rules = "".join(f"      {line}\n" for line in text.splitlines())
    assert load([("p.yaml", f"meshpolicy: 1\nsegments:\n  - name: s\n    allow:\n{rules}")]).segments
