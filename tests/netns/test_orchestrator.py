"""A scheduler tells the CA what runs where: identities, addresses and permissions follow with nothing else to do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from identity.errors import BadInput, Conflict, NotFound, RetinueError
from identity.wire.orchestrator import Event
from mesh.lab_process import ip_batch, run

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: [tcp/8080, tcp/8081]}
"""


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Iterator[Any]:
    made = make_mesh("host-a", "host-b", "host-c")
    made.add("web", "host-a")
    made.place("web", "host-a")
    made.apply(POLICY)
    yield made
    for host in ("host-b", "host-c"):
        run(["ip", "netns", "del", pod(made, host)], codes=range(256))


def pod(mesh: Any, host: str) -> str:
    return f"att-pod-{host}-{mesh.lab.id}"


async def tell(mesh: Any, event: str, kind: str, host: str, seq: int, **more: Any) -> dict[str, Any]:
    said = Event.model_validate({"id": event, "kind": kind, "workload": "api", "instance": "pod-1", "host": host, "seq": seq, "wait": 10.0} | more)
    done: dict[str, Any] = await mesh.lab.admin("POST", "/v1/orchestrator/events", said, timeout=60)
    return done


def container(mesh: Any, host: str) -> str:
    """A namespace called like the pod, made by the scheduler on this host, with the service in it."""
    space = pod(mesh, host)
    run(["ip", "netns", "del", space], codes=range(256))
    ip_batch([f"netns add {space}"])
    ip_batch(["link set lo up"], netns=space)
    return space


async def test_a_container_that_is_made_again_elsewhere(mesh: Any) -> None:
    """Nothing but the hook and attach."""
    first = await tell(mesh, "e1", "scheduled", "host-b", 1, labels={"role": "api"})
    assert (first["outcome"], first["number"], first["host"]) == ("registered", 0, "host-b")
    mesh.addresses["api"] = first["addresses"]
    b = container(mesh, "host-b")
    await mesh.lab.aretinue("host-b", "attach", "api", "--netns", b, "--wait", "15")
    assert (await tell(mesh, "e2", "running", "host-b", 2))["outcome"] == "unchanged"
    mesh.serve(b, "api@b")
    web = mesh.lab.netns("web-host-a")
    for family in (0, 1):
        assert (await mesh.answered(web, mesh.url("api", family))).served_by == "api@b"
    # it is made on another host
    c = container(mesh, "host-c")
    await mesh.lab.aretinue("host-c", "attach", "api", "--netns", c)
    moved = await tell(mesh, "e3", "running", "host-c", 3)
    assert (moved["outcome"], moved["addresses"]) == ("moved", first["addresses"])
    assert moved["epoch"] > first["epoch"]
    mesh.serve(c, "api@c")
    for family in (0, 1):
        assert (await mesh.answered(web, mesh.url("api", family))).served_by == "api@c"
    # the old one's end, heard late, takes nothing away
    assert (await tell(mesh, "e4", "stopped", "host-b", 4))["outcome"] == "noted"
    assert (await mesh.answered(web, mesh.url("api", 0))).served_by == "api@c"


async def test_a_container_that_is_made_again_on_its_host(mesh: Any) -> None:
    """Under the same name: the new namespace takes the old one's place, and attaching it twice is no change."""
    mesh.lab.processes["service-api@c-8080"].kill()
    c = container(mesh, "host-c")
    again = await mesh.lab.aretinue("host-c", "attach", "api", "--netns", c, "--wait", "15")
    assert again == await mesh.lab.aretinue("host-c", "attach", "api", "--netns", c, "--wait", "15")
    mesh.serve(c, "api@c2", port=8081)
    for family in (0, 1):
        answer = await mesh.answered(mesh.lab.netns("web-host-a"), mesh.url("api", family, port=8081))
        assert answer.served_by == "api@c2"


async def test_told_again_nothing_happens_twice(mesh: Any) -> None:
    one = await tell(mesh, "r1", "scheduled", "host-b", 1, instance="pod-2")
    many = await asyncio.gather(*(tell(mesh, "r1", "scheduled", "host-b", 1, instance="pod-2") for _ in range(10)))
    assert all(a == one for a in many)
    same = await tell(mesh, "r2", "running", "host-b", 2, instance="pod-2")
    assert (same["outcome"], same["epoch"]) == ("unchanged", one["epoch"]), "by state, too: no second epoch"
    with pytest.raises(Conflict) as reused:
        await tell(mesh, "r1", "scheduled", "host-c", 1, instance="pod-2")
    assert reused.value.code == "event.reused"


async def test_two_at_once_register_one(mesh: Any) -> None:
    both = await asyncio.gather(*(tell(mesh, f"c{n}", "scheduled", "host-b", n, instance="pod-3") for n in range(8)))
    assert len({a["number"] for a in both}) == 1
    assert [a["outcome"] for a in both].count("registered") == 1


async def test_what_comes_late_changes_nothing(mesh: Any) -> None:
    await tell(mesh, "l1", "scheduled", "host-b", 10, instance="pod-4")
    await tell(mesh, "l2", "stopped", "host-b", 30, instance="pod-4")
    late = await tell(mesh, "l3", "running", "host-b", 20, instance="pod-4")
    assert (late["outcome"], late["host"]) == ("stale", None)
    back = await tell(mesh, "l4", "running", "host-c", 40, instance="pod-4")
    assert (back["outcome"], back["host"]) == ("placed", "host-c")
    # an end that is heard before the beginning
    assert (await tell(mesh, "l5", "stopped", "host-b", 9, instance="pod-5"))["number"] is None
    early = await tell(mesh, "l6", "running", "host-b", 8, instance="pod-5")
    assert (early["outcome"], early["number"]) == ("stale", None)
    gone = await tell(mesh, "l7", "stopped", "host-c", 50, instance="pod-4", final=True)
    assert gone["outcome"] == "retired"
    with pytest.raises(RetinueError) as over:
        await tell(mesh, "l8", "running", "host-b", 60, instance="pod-4")
    assert over.value.code == "workload.revoked"


async def test_bad_events_change_nothing(mesh: Any) -> None:
    before = await mesh.lab.aca("workload", "list")
    for kind, wrong in (
        (NotFound, {"host": "nowhere"}), (BadInput, {"workload": "../x"}), (BadInput, {"labels": {"a b": "c"}}),
        (Conflict, {"labels": {"role": "web"}}), (Conflict, {"instance": "pod-2", "host": "host-c", "wait": 0.2}),
    ):  # fmt: skip
        said = {"event": f"bad-{wrong}", "kind": "running", "host": "host-b", "seq": 99} | wrong
        with pytest.raises(kind):
            await tell(mesh, said.pop("event"), said.pop("kind"), said.pop("host"), said.pop("seq"), **said)
    for raw in ({"kind": "exploded"}, {"seq": -1}, {"id": ""}, {"seq": True}, {"more": 1}):
        body = {"id": "x", "kind": "running", "workload": "api", "host": "host-b", "seq": 1} | raw
        path = mesh.lab.dir / "bad.json"
        path.write_text(json.dumps(body))
        with pytest.raises(Exception, match="exit"):
            await mesh.lab.aca("orchestrator", "send", str(path))
    assert await mesh.lab.aca("workload", "list") == before


async def test_the_example_of_the_page(mesh: Any, repository: Path, tmp_path: Path) -> None:
    """Every command and event of docs/ORCHESTRATOR.md, as it stands there."""
    text = (repository / "docs" / "ORCHESTRATOR.md").read_text()
    blocks = re.findall(r"```jsonl\n(.*?)```", text, re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block.replace("web-1", "host-b").replace("web-2", "host-c"))
        said = await mesh.lab.aca("orchestrator", "send", str(path))
        assert [a["id"] for a in said] == [json.loads(line)["id"] for line in block.splitlines()]
        assert await mesh.lab.aca("orchestrator", "send", str(path)) == said, "sent again, answered the same"
