"""Mixed versions: the release before ours and ours in one mesh, upgraded one at a time under traffic, and one step back.

The release before is run for real, from its commit. Its engine is ours: engines have a test of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import mesh
from mesh.lab import Lab
from mesh.lab_process import Process
from mesh.probe_pairs import Receiver, Sender

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]
BEFORE = "fff46d4"  # the release before
ROOT = Path(mesh.__file__).resolve().parent.parent
POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    members: {role: [web, api]}
    mode: enforce
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: [tcp/8080, udp/9000%s]}
"""


class Mixed(Lab):
    """A lab whose nodes run from different source trees."""

    def __init__(self, hosts: Sequence[str], before: Path) -> None:
        super().__init__(hosts, trust_domain="mixed.example")
        self.before = before
        self.old: set[str] = {"ca", *hosts}

    def _tree(self, node: str) -> dict[str, str]:
        return {"PYTHONPATH": str(self.before)} if node in self.old else {}

    def spawn(
        self, argv: Sequence[str], *, name: str, netns: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        node = "ca" if name == "retinue-ca" else name.removeprefix("agent-")
        return super().spawn(argv, name=name, netns=netns, env={**(env or {}), **self._tree(node)})

    def _json(self, argv, node, env, stdin, codes=(0,)):
        return super()._json(argv, node, {**env, **self._tree(node)}, stdin, codes)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the release before, with our native module."""
    tree = tmp_path_factory.mktemp("before")
    got = subprocess.run(["git", "-C", str(ROOT), "archive", BEFORE], check=False, capture_output=True)
    if got.returncode != 0:
        pytest.skip(f"commit {BEFORE} is not in this clone: fetch the whole history to run this")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=got.stdout, check=True)
    for module in (ROOT / "mesh").glob("_native*"):
        shutil.copy(module, tree / "mesh")
    return tree


@pytest.fixture
def lab(before: Path) -> Iterator[Mixed]:
    with Mixed(["host-a", "host-b"], before) as made:
        yield made


@contextlib.asynccontextmanager
async def flows(lab: Mixed, spaces: Mapping[str, str], addresses: Sequence[str]):
    """UDP and TCP over both families; yields what was lost so far."""
    async with contextlib.AsyncExitStack() as stack:
        pairs = []
        for v6 in (False, True):
            for transport, port in (("udp", 9000), ("tcp", 8080)):
                receiver = await stack.enter_async_context(Receiver(transport, port, netns=spaces["api"], v6=v6))
                tag = f"{transport}{6 if v6 else 4}"
                sender = Sender(transport, addresses[v6], port, tag=tag, rate=100, netns=spaces["web"])
                pairs.append((tag, sender, receiver))
        for _, sender, _ in pairs:
            await stack.enter_async_context(sender)
        for tag, _, receiver in pairs:
            await receiver.wait(tag, 20, timeout=20)
        yield pairs


async def lost(pairs) -> dict[str, int]:
    """How many of the messages sent until now did not arrive; every TCP flow is on its first connection."""
    out = {}
    for tag, sender, receiver in pairs:
        upto = sender.sent
        async with asyncio.timeout(20):
            while max(receiver.of(tag).seqs, default=0) < upto:
                await receiver.wait_more(tag, 1)
        out[tag] = len(set(range(upto)) - receiver.of(tag).seqs)
        assert sender.connections == 1, tag
    print(json.dumps({"lost": out, "sent": [s.sent for _, s, _ in pairs]}), flush=True)
    return out


def apply(lab: Mixed, more: str = "") -> str:
    path = lab.dir / "policy.yaml"
    path.write_text(POLICY % more)
    return lab.ca("policy", "apply", str(path))["digest"]


async def follows(lab: Mixed, *hosts: str, more: str) -> None:
    """Every host enforces a policy that the CA of now publishes, and holds nothing back."""
    digest = await asyncio.to_thread(apply, lab, more)
    for host in hosts:
        said = await lab.until(host, lambda s: s.policy_digest == digest, timeout=30)
        assert not {c.code for c in said.conditions} & {"feed.refused", "svid.refused"}, said.conditions


async def replace_agent(lab: Mixed, host: str, *, old: bool) -> None:
    process = lab.processes[f"agent-{host}"]
    process.send(9)
    await asyncio.to_thread(process.wait)
    (lab.old.add if old else lab.old.discard)(host)
    await asyncio.to_thread(lab.start_agent, host)


async def replace_ca(lab: Mixed, *, old: bool) -> None:
    """Stop, migrate where it is needed, start the other version."""
    await asyncio.to_thread(lab.forget, "retinue-ca")
    if old:
        await asyncio.to_thread(lab.ca, "migrate", "--dir", str(lab.ca_dir), "--to", "1")
        lab.old.add("ca")
    else:
        lab.old.discard("ca")
        await asyncio.to_thread(lab.ca, "migrate", "--dir", str(lab.ca_dir))
    await asyncio.to_thread(lab.start_ca, init=False)


async def test_one_at_a_time_and_back(lab: Mixed) -> None:
    lab.bring_up()
    apply(lab)
    spaces, addresses = {}, {}
    for name, host in (("web", "host-a"), ("api", "host-b")):
        addresses[name] = lab.ca("workload", "add", name, "--host", host, "--label", f"role={name}")["addresses"]
        spaces[name] = lab.add_workload(name)
        assert lab.retinue(host, "attach", name, "--netns", spaces[name], "--wait", "10")["state"] == "active"
    async with flows(lab, spaces, addresses["api"]) as pairs:
        await replace_ca(lab, old=False)  # the CA goes first, the schema with it
        await follows(lab, "host-a", "host-b", more=", udp/9001")
        await replace_agent(lab, "host-a", old=False)
        await follows(lab, "host-a", "host-b", more=", udp/9002")
        await replace_agent(lab, "host-b", old=False)
        await follows(lab, "host-a", "host-b", more=", udp/9003")
        assert not any((await lost(pairs)).values())
        await replace_agent(lab, "host-b", old=True)  # one step back: it reads what the newer one wrote
        await follows(lab, "host-a", "host-b", more=", udp/9004")
        await replace_ca(lab, old=True)  # a newer agent with the older CA
        await follows(lab, "host-a", "host-b", more=", udp/9005")
        gone = await lost(pairs)
        # The release before takes our one routing rule away before it sets up its own, one a link: that is its order, and
        # costs datagrams on that host for as long as it takes. Upgrading costs none, and no connection breaks.
        assert gone["tcp4"] == gone["tcp6"] == 0
        assert gone["udp4"] < 300 > gone["udp6"]


@pytest.mark.parametrize("old", [{"host-a"}, {"ca", "host-a"}], ids=["ca of now", "ca before"])
async def test_machines_of_both_releases_enrol_with_a_ca_of_either(lab: Mixed, old: set[str]) -> None:
    lab.old = old
    lab.start_ca()
    for host in ("host-a", "host-b"):
        lab.enroll(host)
        lab.start_agent(host)
    await follows(lab, "host-a", "host-b", more="")
