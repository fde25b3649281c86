"""spiffe-helper, as published, against the Workload API: files of an identity, renewed, and a token; nothing after the end.

It is built with Go from its module, which takes minutes: RETINUE_CONFORMANCE=1 asks for it, RETINUE_SPIFFE_HELPER names one
that is built already.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mesh.jwt_svid import JwtSvids
from mesh.svid_files import API_SOCKET
from tests.unit.mesh.workload_rig import CART, JwtIssuer

MODULE = "github.com/spiffe/spiffe-helper@v0.11.0"
BUILT = os.environ.get("RETINUE_SPIFFE_HELPER")
GO = shutil.which("go") or next((p for p in ("/usr/local/go/bin/go",) if os.access(p, os.X_OK)), None)

pytestmark = [
    pytest.mark.skipif(
        not BUILT and (GO is None or os.environ.get("RETINUE_CONFORMANCE") != "1"),
        reason="spiffe-helper is not tried: RETINUE_CONFORMANCE=1 builds it, with a Go toolchain",
    ),
    pytest.mark.timeout(1500),
]


@pytest.fixture(scope="module")
def helper(tmp_path_factory) -> Path:
    if BUILT:
        return Path(BUILT)
    found = subprocess.run([GO, "mod", "download", "-json", MODULE], capture_output=True, text=True, timeout=600, check=False)
    if found.returncode:
        pytest.skip(f"{MODULE} cannot be fetched here")
    directory = tmp_path_factory.mktemp("helper") / "src"
    shutil.copytree(json.loads(found.stdout)["Dir"], directory)
    for path in (directory, *directory.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    subprocess.run([GO, "build", "-o", "spiffe-helper", "./cmd/spiffe-helper"], cwd=directory, timeout=1200, check=True)
    return directory / "spiffe-helper"


@pytest.fixture
def out(tmp_path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


@pytest.fixture
def config(agent, live, out, tmp_path) -> Path:
    agent.jwts = JwtSvids(made := JwtIssuer(live, tmp_path / "jwt"), lambda: agent.uplink.trust, time.time)
    made.publish(agent)
    path = tmp_path / "helper.conf"
    path.write_text(f"""
agent_address = "{agent.config.run_dir / API_SOCKET}"
cert_dir = "{out}"
svid_file_name = "svid.pem"
svid_key_file_name = "key.pem"
svid_bundle_file_name = "bundle.pem"
jwt_svids = [{{jwt_audience = "db", jwt_svid_file_name = "db.token"}}]
jwt_bundle_file_name = "jwt.json"
""")
    return path


def serial(out: Path) -> int:
    return x509.load_pem_x509_certificates((out / "svid.pem").read_bytes())[0].serial_number


async def until(what, seconds: float = 60.0):
    async with asyncio.timeout(seconds):
        while True:
            try:
                if found := what():
                    return found
            except (OSError, ValueError):
                pass  # not there, or only half written
            await asyncio.sleep(0.05)


async def test_files_of_an_identity_are_written_and_follow_it(api, agent, config, helper, out):
    process = await asyncio.create_subprocess_exec(str(helper), "-config", str(config), stderr=asyncio.subprocess.DEVNULL)
    try:
        first = await until(lambda: serial(out))
        leaf, *issuers = x509.load_pem_x509_certificates((out / "svid.pem").read_bytes())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [CART]
        assert load_pem_private_key((out / "key.pem").read_bytes(), None).public_key() == leaf.public_key()
        leaf.verify_directly_issued_by(issuers[0])
        issuers[0].verify_directly_issued_by(x509.load_pem_x509_certificates((out / "bundle.pem").read_bytes())[0])
        token = await until((out / "db.token").read_text)
        assert token.count(".") == 2
        assert json.loads(await until((out / "jwt.json").read_text))
        agent.svids._held["cart/0"] = replace(agent.svids._held["cart/0"], renew_at=time.time())
        await until(lambda: serial(out) != first)
    finally:
        process.terminate()
        await process.wait()


async def test_once_is_enough_for_a_job(api, agent, config, helper, out):
    process = await asyncio.create_subprocess_exec(str(helper), "-config", str(config), "-daemon-mode=false", stderr=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(60):
        assert await process.wait() == 0
    assert serial(out)
    assert (out / "db.token").read_text().count(".") == 2
