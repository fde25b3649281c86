"""A writer in the CA's database, and operators' mistakes at the command line.

What a writer can do is said in SECURITY.md; what endpoints and the CA must not swallow is here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import sqlite3
from typing import Any

import pytest

from mesh.lab_process import ProcessFailed

pytestmark = [pytest.mark.timeout(120)]

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: tcp/8080}
"""


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Any:
    made = make_mesh("host-a", "host-b")
    made.spaces = {}
    for name, host in (("web", "host-a"), ("batch", "host-a"), ("api", "host-b")):
        made.add(name, host)
        made.spaces[name] = made.place(name, host)
    made.apply(POLICY)
    made.serve(made.spaces["api"], "api")
    return made


@contextlib.contextmanager
def rewritten(mesh: Any, *statements: str) -> Any:
    """The CA stops, its database is changed, it starts again; afterwards everything is put back."""
    lab = mesh.lab
    lab.forget("retinue-ca")
    path = lab.ca_dir / "ca.db"
    before = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in statements:
            assert db.execute(statement).rowcount != 0, statement
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    lab.start_ca(init=False)
    try:
        yield
    finally:
        lab.forget("retinue-ca")
        for extra in lab.ca_dir.glob("ca.db-*"):
            extra.unlink()
        path.write_bytes(before)
        lab.start_ca(init=False)


async def answered(mesh: Any, who: str) -> bool:
    return (await mesh.get(mesh.spaces[who], mesh.url("api", 0), timeout=1.0)).ok


async def settled(mesh: Any) -> None:
    """Both agents have heard from the CA after it started again."""
    for host in ("host-a", "host-b"):
        before = (await mesh.lab.until(host, lambda _: True)).staleness_s
        assert before is not None
        async with asyncio.timeout(20):
            while True:
                status = await asyncio.to_thread(mesh.lab.retinue, host, "status")
                if status["control"] == "connected" and status["staleness_s"] is not None and status["staleness_s"] < 1.5:
                    break
                await asyncio.sleep(0.1)


BLOWS = {
    "signatures": [
        "update instances set placement = replace(placement, substr(placement, 60, 6), 'AAAAAA') where name = 'api'",
        "update policies set record = replace(record, substr(record, 90, 4), 'AAAA')",
    ],
    "records of others": [
        "update instances set placement = (select placement from instances where name = 'web') where name = 'batch'",
        "update endpoints set record = (select record from endpoints where name = 'host-a') where name = 'host-b'",
    ],
    "rows that say other things than their records": [
        "update instances set labels = '{\"role\": \"web\"}' where name = 'batch'",
        "update instances set endpoint = 'host-a' where name = 'api'",
        "update instances set epoch = 0, epoch_top = 0 where name = 'api'",
        "update endpoints set tunnel_key = 'AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA' where name = 'host-b'",
    ],
    "the text of the policy": ["update policies set files = replace(files, '{role: web}', '{role: batch}')"],
}


@pytest.mark.parametrize("blow", BLOWS)
async def test_endpoints_take_nothing_that_is_not_signed(mesh: Any, blow: str) -> None:
    """Whatever the rows say, batch is refused. What a writer can do is withhold; with the rows put right web is back."""
    await mesh.answered(mesh.spaces["web"], mesh.url("api", 0))
    with rewritten(mesh, *BLOWS[blow]):
        await settled(mesh)
        for _ in range(3):
            assert not await answered(mesh, "batch")
        for host in ("host-a", "host-b"):
            plan = await asyncio.to_thread(mesh.lab.retinue, host, "status")
            assert all(mesh.addresses["batch"][0] not in ip for p in plan["peers"] for ip in p["allowed_ips"])
    await settled(mesh)
    assert (await mesh.answered(mesh.spaces["web"], mesh.url("api", 0))).served_by == "api", "positive control"


async def test_a_rewritten_audit_is_noticed(mesh: Any) -> None:
    assert (await mesh.lab.aca("audit", "verify"))["size"] > 5, "positive control"
    forged = rewritten(mesh, "drop trigger ledger_no_update", "update ledger set actor = 'admin:nobody' where seq = 3")
    with forged, pytest.raises(ProcessFailed, match="log"):
        await mesh.lab.aca("audit", "verify")


# ---- operators


BAD_POLICIES = {
    "empty": "", "blank": "\n\n", "null": "null", "no version": "segments: []", "a label that cannot be": POLICY.replace("role: web", "röle: web"),
    "a key twice": POLICY.replace("on: tcp/8080", "on: tcp/8080, on: any"), "a typo": POLICY.replace("allow:", "alow:"),
    "a port": POLICY.replace("tcp/8080", "tcp/80800"), "reversed": POLICY.replace("8080", "9000-8000"), "an anchor bomb": "a: &a [x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}, *{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)),
    "a tag": "!!python/object/apply:os.system [id]", "deep": "meshpolicy: 1\nsegments: " + "[" * 5000 + "]" * 5000, "control": POLICY + "# \x1b[31m\x00",
    "rtl": POLICY.replace("web-to-api", "web\u202e-to-api"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_POLICIES)
async def test_a_bad_policy_is_refused_and_the_one_in_force_stays(mesh: Any, kind: str) -> None:
    before = await mesh.lab.aca("policy", "show")
    path = mesh.lab.dir / "bad.yaml"
    path.write_text(BAD_POLICIES[kind])
    with pytest.raises(ProcessFailed) as caught:
        await mesh.lab.aca("policy", "apply", str(path))
    said = str(caught.value)
    assert "Traceback" not in said
    assert "defect" not in said
    assert not any(c in said for c in "\x1b\u202e\0")
    assert await mesh.lab.aca("policy", "show") == before


async def test_a_huge_policy_is_refused_while_others_are_served(mesh: Any) -> None:
    path = mesh.lab.dir / "huge.yaml"
    path.write_text(POLICY + "#" * (40 << 20))
    with pytest.raises(ProcessFailed) as caught:
        await mesh.lab.aca("policy", "apply", str(path))
    assert "Traceback" not in str(caught.value)
    assert (await mesh.lab.aca("info"))["trust_domain"] == "netns.example"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "a\x1b[31mb", "a\u202eb", "a\nb", "", ".", "x" * 300, "a b", "-x", "a%2fb", "é"])
async def test_names_that_are_no_names(mesh: Any, name: str) -> None:
    """A18, A44: in every command that takes one."""
    lab = mesh.lab
    for args in (("workload", "add", "--", name), ("token", "create", f"--host={name}"), ("workload", "move", "--to", "host-a", "--", name),
                 ("workload", "add", "ok", f"--host={name}"), ("host", "revoke", "--", name), ("workload", "add", "ok", f"--label=role={name}x/..")):  # fmt: skip
        with pytest.raises(ProcessFailed) as caught:
            await lab.aca(*args)
        said = str(caught.value).partition(": exit ")[2]  # what comes before repeats our own words
        assert said
        assert "Traceback" not in said
        assert "defect" not in said
        assert not any(c in said for c in "\x1b\u202e"), args
    assert {w["name"] for w in await lab.aca("workload", "list")} == {"web", "batch", "api"}


async def test_the_same_twice_and_at_once(mesh: Any) -> None:
    """To the same host, revoked twice, applied by two at once."""
    lab = mesh.lab
    with pytest.raises(ProcessFailed, match=r"move\.same"):
        await lab.aca("workload", "move", "api", "--to", "host-b")
    await lab.aca("workload", "add", "gone", "--host", "host-a")
    first = await lab.aca("workload", "revoke", "gone")
    assert (await lab.aca("workload", "revoke", "gone"))["epoch"] == first["epoch"]
    with pytest.raises(ProcessFailed, match=r"workload\.revoked"):
        await lab.aca("workload", "move", "gone", "--to", "host-b")
    paths = []
    for n in range(6):
        paths.append(lab.dir / f"p{n}.yaml")
        paths[-1].write_text(POLICY.replace("8080", f"80{80 + n}"))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda p: lab.ca("policy", "apply", str(p)), paths))
    revisions = sorted(d["revision"] for d in done)
    assert revisions == list(range(revisions[0], revisions[0] + 6)), "one after the other, none lost"
    newest = max(done, key=lambda d: d["revision"])
    assert (await lab.aca("policy", "show"))["digest"] == newest["digest"]
    await mesh.aapply(POLICY)
    assert json.dumps(await lab.aca("audit", "list")).count("policy.apply") >= 6
