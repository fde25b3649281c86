"""The sidecar: own key, own identity, in the service's namespace; from a token and from the host's agent."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from mesh.lab import Lab
from mesh.lab_process import ProcessFailed, command, in_netns, inside
from mesh.probe_pairs import Receiver

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    members: {role: [web, api]}
    mode: enforce
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: tcp/8080}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(["host-a", "svc", "svc-b"], trust_domain="sidecar.example") as made:
        made.bring_up(["host-a"])
        policy = made.dir / "policy.yaml"
        policy.write_text(POLICY)
        made.ca("policy", "apply", str(policy))
        made.ca("workload", "add", "web", "--host", "host-a", "--label", "role=web")
        made.retinue("host-a", "attach", "web", "--netns", made.add_workload("web"), "--wait", "10")
        yield made


def start(lab: Lab, node: str, env: dict[str, str], *args: str):
    here = lab.nodes[node]
    return lab.spawn(
        [*command("retinue-sidecar"), *args], name=f"sidecar-{node}", netns=here.netns, env={**here.env, **env}
    )


def get(lab: Lab, node: str, path: str) -> tuple[int, dict]:
    def ask() -> tuple[int, dict]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:15020{path}", timeout=5) as r:
                return r.status, json.loads(r.read())
        except urllib.error.HTTPError as e:
            with e:
                return e.code, json.loads(e.read())

    return in_netns(lab.nodes[node].netns, ask)


async def until_ready(lab: Lab, node: str, status: int = 200) -> dict:
    async with asyncio.timeout(20):
        while True:
            try:
                code, body = await asyncio.to_thread(get, lab, node, "/readyz")
                if code == status:
                    return body
            except urllib.error.URLError:
                pass
            await asyncio.sleep(0.1)


def cli(lab: Lab, node: str, *args: str) -> subprocess.CompletedProcess[str]:
    here = lab.nodes[node]
    return subprocess.run(
        inside(here.netns, [*command("retinue"), *args]), env={**os.environ, **here.env}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


async def test_a_sidecar_joins_with_a_token_from_the_environment(lab, tmp_path):
    address = lab.ca("workload", "add", "api", "--label", "role=api")["addresses"]
    token = lab.ca("token", "create", "--workload", "api")["token"]
    svid, touched = tmp_path / "svid", tmp_path / "reloaded"
    env = {
        "RETINUE_TOKEN": token, "RETINUE_CA": lab.ca_url, "RETINUE_SVID_DIR": str(svid), "RETINUE_RELOAD": f"touch {touched}",
    }  # fmt: skip
    process = start(lab, "svc", env)
    await asyncio.to_thread(process.wait_ready)
    assert await until_ready(lab, "svc") == {"ready": True, "reason": None}
    assert await asyncio.to_thread(get, lab, "svc", "/livez") == (200, {"live": True})
    async with asyncio.timeout(10):
        while not touched.exists():  # noqa: ASYNC110 -- a file of another process has no event
            await asyncio.sleep(0.05)
    assert {p.name: p.stat().st_mode & 0o777 for p in svid.iterdir()} == {
        "cert.pem": 0o644, "key.pem": 0o600, "bundle.pem": 0o644,
    }  # fmt: skip
    found = lab.retinue("svc", "status")
    assert found["kind"] == "sidecar"
    assert [(a["name"], a["kind"], a["state"]) for a in found["attachments"]] == [("api", "host", "active")]
    netns = lab.nodes["svc"].netns
    async with Receiver("tcp", 8080, netns=netns), Receiver("tcp", 8080, netns=netns, v6=True):
        ping = await asyncio.to_thread(cli, lab, "host-a", "ping", "api", "8080", "-c", "1", "-o", "json")
        denied = await asyncio.to_thread(cli, lab, "svc", "ping", "web", "8080", "-c", "1", "-o", "json")
    assert {r["address"]: r["answered"] for r in json.loads(ping.stdout)["results"]} == dict.fromkeys(address, 1)
    assert denied.returncode == 1
    assert token not in "".join(p.read_text() for p in (lab.dir / "logs").iterdir())


async def test_a_sidecar_is_not_ready_while_its_instance_is_elsewhere(lab):
    held = lab.ca("workload", "move", "api", "--to", "host-a", "--force")
    assert held["workload"]["host"] == "host-a"
    body = await until_ready(lab, "svc", 503)
    assert "host-a" in body["reason"] or "no instance" in body["reason"]
    assert await asyncio.to_thread(get, lab, "svc", "/livez") == (200, {"live": True})
    lab.ca("workload", "move", "api", "--to", "api-sidecar-1", "--force")
    assert (await until_ready(lab, "svc"))["ready"]


async def test_a_sidecar_starts_again_without_a_token_and_without_the_ca(lab):
    lab.processes["sidecar-svc"].kill()
    lab.processes["retinue-ca"].kill()
    try:
        process = start(lab, "svc", {})
        await asyncio.to_thread(process.wait_ready)
        assert (await until_ready(lab, "svc"))["ready"]
    finally:
        await asyncio.to_thread(lab.start_ca, init=False)


async def test_a_sidecar_gets_its_token_from_the_host_agent(lab):
    lab.ca("workload", "add", "shop/cart", "--host", "host-a", "--label", "role=web")
    socket = lab.nodes["host-a"].run_dir / "agent.sock"
    # Only for what is placed on that host.
    with pytest.raises(ProcessFailed) as refused:
        start(lab, "svc-b", {}, "--from-agent", str(socket), "--workload", "nothing").wait_ready()
    assert "status 1" in str(refused.value)
    process = start(lab, "svc-b", {}, "--from-agent", str(socket), "--workload", "shop/cart")
    await asyncio.to_thread(process.wait_ready)
    assert (await until_ready(lab, "svc-b"))["ready"]
    found = lab.retinue("svc-b", "status")
    assert [(a["name"], a["state"], a["epoch"]) for a in found["attachments"]] == [("shop/cart", "active", 2)]


@pytest.mark.parametrize(
    ("args", "env", "code"),
    [
        ([], {}, "usage"),
        (["--from-agent", "/nowhere"], {}, "usage"),
        (["--from-agent", "/nowhere", "--workload", "x"], {}, "agent.unreachable"),
        (["--ca", "https://127.0.0.1:1"], {}, "token.missing"),
        (["--ca", "https://127.0.0.1:1"], {"RETINUE_TOKEN": "rt1.nonsense"}, "token.malformed"),
        (["--ca", "http://127.0.0.1:1"], {"RETINUE_TOKEN": "rt1.a." + "A" * 43 + "." + "0" * 64}, "ca.url"),
        (["--device", "magic"], {}, "usage"),
        (["--interface", "a/b"], {}, "usage"),
    ],
)
def test_bad_input_is_a_clear_error(tmp_path, args, env, code):
    argv = [*command("retinue-sidecar"), "--state-dir", str(tmp_path / "s"), "--run-dir", str(tmp_path / "r"), *args]
    done = subprocess.run(argv, env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True, timeout=30, check=False)
    assert f"error[{code}]" in done.stderr, done
    assert "Traceback" not in done.stderr
    assert done.returncode in {2, 3}
    assert sys.executable not in done.stderr
