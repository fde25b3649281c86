"""go-spiffe, as published, against the Workload API. It runs where a Go toolchain is, and says so elsewhere.

The modules come through Go's own proxy settings; a machine that cannot fetch them is told apart from one that fails.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.jwt_svid import JwtSvids
from mesh.svid_files import api_environment
from tests.unit.mesh.workload_rig import CART, JwtIssuer

GO = shutil.which("go") or next((p for p in ("/usr/local/go/bin/go", "/opt/gobin/bin/go") if os.access(p, os.X_OK)), None)
SOURCE = Path(__file__).parents[2] / "clients" / "go-spiffe"
BUILD_S = 900

pytestmark = [
    pytest.mark.skipif(GO is None, reason="no Go toolchain here: go-spiffe is not tried"),
    pytest.mark.timeout(BUILD_S + 120),
]


def build(*argv: str, cwd: Path, **environment: str) -> None:
    done = subprocess.run([GO, *argv], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=BUILD_S, check=False)
    offline = ("dial tcp", "no such host", "connection refused", "403 Forbidden", "404 Not Found", "requires go >=", "i/o timeout")
    if done.returncode and any(word in done.stderr for word in offline):
        pytest.skip(f"the Go modules cannot be fetched here: {done.stderr.strip().splitlines()[-1][:200]}")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("go") / "src"
    shutil.copytree(SOURCE, directory)
    build("build", "-o", "client", ".", cwd=directory)
    return directory / "client"


@pytest.fixture
def tokens(live, agent, tmp_path):
    made = JwtIssuer(live, tmp_path / "jwt")
    agent.jwts = JwtSvids(made, lambda: agent.uplink.trust, time.time)
    made.publish(agent)
    return made


def renew(agent) -> None:
    agent.svids._held["cart/0"] = replace(agent.svids._held["cart/0"], renew_at=time.time())


async def test_go_spiffe_fetches_validates_and_watches(api, agent, tokens, client):
    process = await asyncio.create_subprocess_exec(
        str(client), stdout=asyncio.subprocess.PIPE, env=os.environ | api_environment(agent.config.run_dir)
    )
    lines = []
    async with asyncio.timeout(60):
        while line := (await process.stdout.readline()).decode().strip():
            lines.append(line)
            if line.startswith("update") and lines.count(line) == 1:
                renew(agent)
        await process.wait()
    assert lines == [
        f"x509 {CART} cart/0 2 1", f"jwt {CART} [db]", f"validated here {CART}", f"validated there {CART}", "other audience true",
        "x509 bundles 1", f"source {CART} 1 <nil>", "jwt bundles 1",
        f"update {CART}", f"update {CART}", "watched 2",
    ]  # fmt: skip
