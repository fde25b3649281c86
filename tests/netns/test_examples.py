"""The examples, run as their READMEs say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh import lab_registry
from mesh.lab_process import base_env


def example(repository: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run in the repository with our commands on PATH."""
    env = base_env({"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"})
    return subprocess.run(argv, cwd=repository, env=env, capture_output=True, text=True, timeout=100, check=False)


def left_behind() -> set[str]:
    """Labs whose owner has ended; others may be at work meanwhile."""
    return {e.id for e in lab_registry.entries() if not e.owner_alive}


def test_shop(repository: Path) -> None:
    done = example(repository, "examples/shop/run.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "shop/web  shop/api  tcp/8080", "allow: allowed by rule front-to-api", "deny: default deny: no rule allows batch",
        "denied by rule guardrail:no-dev-in-prod", "shop/web -> shop/api -> shop/db",
    ):  # fmt: skip
        assert words in done.stdout
    assert "FAIL" not in done.stdout


def test_a_broken_shop_is_refused_with_its_place(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "shop.yaml"
    broken.write_text((repository / "examples/shop/shop.yaml").read_text().replace("on: postgres", "on: postgre", 1))
    done = example(repository, "retinue", "policy", "check", "-p", str(broken))
    assert done.returncode == 2
    line = next(i for i, text in enumerate(broken.read_text().splitlines(), 1) if "on: postgre," in text)
    assert f"shop.yaml:{line}:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["sidecar", "gateway", "unit"])
def test_in_a_lab(repository: Path, name: str) -> None:
    before = left_behind()
    done = example(repository, sys.executable, f"examples/{name}/run.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("as promised")
    assert "NOT" not in done.stdout
    assert left_behind() <= before


@pytest.mark.parametrize("name", ["sidecar", "gateway", "unit"])
def test_their_policies_hold_their_own_tests(repository: Path, name: str) -> None:
    done = example(repository, "retinue", "policy", "test", "-p", f"examples/{name}/policy.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
