"""The door of the administrators' API over real TLS and the real socket: certificates, roles, scopes, two persons."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from ca import admin_api, approvals, remote
from ca.plane import Plane
from ca.remote import Identity, RemoteClient
from ca.roles import RANK, TABLE, UNKNOWN, rule_of
from ca.serve import Options, running
from identity import certs
from identity.errors import BadState, Conflict, NotVerified, Refused, RetinueError
from identity.names import SpiffeId, TrustDomain
from identity.wire.admin import HostRef, Workload, WorkloadAdd, WorkloadLife, WorkloadMove, WorkloadRef
from identity.wire.entries import EntryCreate, EntryInfo, EntryRef
from identity.wire.people import (
    AdminAdd,
    AdminCertify,
    AdminCredential,
    AdminInfo,
    AdminList,
    AdminRef,
    AdminRenew,
    Approval,
    ApprovalList,
    ApprovalRef,
)
from tests.unit.ca.test_admin_api import Rig as Base

TD = TrustDomain("reg.test")
ENTRY = EntryCreate(name="payments/api", parent="web-*", selectors=["uid:33", "unit:api.service"])


class Rig(Base):
    @property
    def url(self) -> str:
        return f"https://{self.server.listen}"

    async def admin_of(self, name: str, role: str, *scopes: str) -> RemoteClient:
        key = remote.new_key()
        request = AdminAdd(name=name, role=role, scopes=list(scopes), csr=certs.make_csr(key))
        made = await self.post("/v1/admins", request, AdminCredential)
        remote.save(self.path / name, made, key, self.url)
        return RemoteClient(Identity.load(self.path / name))

    async def code(self, client, method: str, path: str, message=None, kind: type[RetinueError] = RetinueError) -> str:
        with pytest.raises(kind) as caught:
            await self.call(client.raw, method, path, message)
        return caught.value.code

    async def audited(self, action: str) -> list[dict]:
        found = (await self.call(self.admin.raw, "GET", "/v1/audit"))["entries"]
        return [e for e in found if e["action"] == action]

    def impostor(self, spiffe_id: SpiffeId, name: str, chain: list[str] | None = None) -> RemoteClient:
        """A client with another kind of certificate of the same authority."""
        key = remote.new_key()
        authority, now = self.plane.authority, time.time()
        issue = {"host": authority.issue_endpoint, "wl": lambda c, s, n: authority.issue_workload(c, s, [], n), "admin": authority.issue_admin}
        made = chain or issue[spiffe_id.kind](certs.make_csr(key), spiffe_id, now)
        info = AdminInfo(name=name, spiffe_id=str(spiffe_id), role="ca-admin", scopes=[], created=0, created_by="", state="active")
        credential = AdminCredential(admin=info, trust_domain=str(TD), chain=made, roots=self.plane.trust.roots_pem(), expires=0)
        remote.save(self.path / name, credential, key, self.url)
        return RemoteClient(Identity.load(self.path / name))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    Plane.create(tmp_path / "ca", TD, time.time())
    async with AsyncExitStack() as stack:
        options = Options(tmp_path / "ca", "127.0.0.1:0", heartbeat=0.2)
        yield Rig(await stack.enter_async_context(running(options)), tmp_path)


def routes(rig: Rig) -> set[tuple[str, str]]:
    app = admin_api.make_app(rig.service, lambda: "")
    return {(r.method, r.resource.canonical) for r in app.router.routes() if r.method != "HEAD"}


async def test_every_route_has_a_role_and_every_role_a_route(rig):
    assert routes(rig) == set(TABLE), "ca/roles.py and the routes differ"
    assert rule_of("POST", "/v1/nothing") == UNKNOWN
    assert (UNKNOWN.role, UNKNOWN.two) == ("ca-admin", True)
    assert rule_of("HEAD", "/v1/info") == TABLE["GET", "/v1/info"]


async def answer(rig: Rig, client: RemoteClient, path: str, query: dict | None) -> tuple[str, str]:
    """What a read says, and the code when it is refused."""
    try:
        return json.dumps(await rig.call(client.raw, "GET", path, query=query)), ""
    except RetinueError as e:
        return e.message + e.hint, e.code


async def test_reads_are_for_viewers_and_carry_no_secret(rig):
    eve = await rig.admin_of("eve", "viewer")
    await rig.join("web-1")
    await rig.add("payments/api", "web-1", role="api")
    await rig.post("/v1/entries", ENTRY, EntryInfo)
    secrets = {path.read_text() for path in (rig.path / "ca").glob("*.key")}
    for method, path in sorted(routes(rig)):
        if method == "GET":
            query = {"src": "payments/api", "dst": "payments/api", "name": "payments/api"} if "explain" in path else None
            said, code = await answer(rig, eve, path, query)
            assert not code.startswith("admin."), (path, code)
            assert not re.search(r"PRIVATE KEY|rt1\.|enroll_key|\"secret\"|token_proof", said), path
            assert not any(line in said for text in secrets for line in text.splitlines()[1:-1]), path


async def test_no_role_reaches_above_itself(rig):
    people = {role: await rig.admin_of(f"a-{role}", role) for role in RANK}
    for (method, path), rule in sorted(TABLE.items()):
        for role, client in people.items():
            if RANK[role] < RANK[rule.role]:
                assert await rig.code(client, method, path, kind=Refused) == "admin.role", (role, path)
    denied = [e for e in await rig.audited("admin") if e["outcome"] == "admin.role"]
    assert {e["actor"] for e in denied} == {"admin/a-viewer", "admin/a-registrar", "admin/a-operator"}


async def test_an_owner_registers_below_its_subtree_only(rig):
    await rig.join("web-1")
    owner = await rig.admin_of("pat", "registrar", "payments/*")
    mine = WorkloadAdd(name="payments/api", host="web-1")
    assert (await rig.call(owner.post, "/v1/workloads", mine, Workload)).host == "web-1"
    done = await rig.call(owner.post, "/v1/entries", ENTRY, EntryInfo)
    assert done.created_by == "admin/pat"
    for name in ("shop/api", "payments", "paymentsx/api", "payments2", "Payments/api", ""):
        assert await rig.code(owner, "POST", "/v1/workloads", WorkloadAdd(name=name), Refused) == "admin.scope"
    await rig.add("shop/api")
    other = await rig.post("/v1/entries", ENTRY.model_copy(update={"name": "shop/api"}), EntryInfo)
    for path, message in (
        ("/v1/workloads/move", WorkloadMove(name="shop/api", to="web-1")), ("/v1/workloads/life", WorkloadLife(name="shop/api")),
        ("/v1/entries", ENTRY.model_copy(update={"name": "shop/api"})), ("/v1/entries/delete", EntryRef(id=other.id)),
        ("/v1/tokens", None),
    ):  # fmt: skip
        assert await rig.code(owner, "POST", path, message, Refused) == "admin.scope", path
    from identity.wire.admin import TokenCreate

    assert await rig.code(owner, "POST", "/v1/tokens", TokenCreate(host="web-9"), Refused) == "admin.scope"
    assert await rig.code(owner, "POST", "/v1/tokens", TokenCreate(host="web-9", workload="payments/api"), RetinueError) == "token.subject"
    await rig.call(owner.post, "/v1/entries/delete", EntryRef(id=done.id), EntryInfo)
    operator = await rig.admin_of("olga", "operator", "payments/*")
    assert await rig.code(operator, "POST", "/v1/hosts/revoke", HostRef(name="web-1"), Refused) == "admin.scope"
    assert await rig.code(operator, "POST", "/v1/workloads/revoke", WorkloadRef(name="shop/api"), Refused) == "admin.scope"
    assert await rig.code(operator, "POST", "/v1/policy", None, Refused) == "admin.scope"


async def test_two_persons_revoke(rig):
    alice, bob, rae = [await rig.admin_of(*who) for who in (("alice", "operator"), ("bob", "operator"), ("rae", "registrar"))]
    await rig.add("payments/api")
    await rig.add("shop/api")
    act = WorkloadRef(name="payments/api")
    with pytest.raises(Conflict) as caught:
        await rig.call(alice.raw, "POST", "/v1/workloads/revoke", act)
    assert caught.value.code == "approval.pending"
    approval = re.search(r"approve (a-\w+)", caught.value.hint)[1]
    assert await rig.code(alice, "POST", "/v1/workloads/revoke", act) == "approval.pending"  # the same one, not another
    (shown,) = (await rig.call(rae.get, "/v1/approvals", ApprovalList)).approvals
    assert (shown.id, shown.state, shown.asked_by, shown.summary) == (approval, "pending", "admin/alice", "name=payments/api instance=0")
    ref = ApprovalRef(id=approval)
    assert await rig.code(alice, "POST", "/v1/approvals", ref, Refused) == "approval.same"
    assert await rig.code(rae, "POST", "/v1/approvals", ref, Refused) == "admin.role"
    scoped = await rig.admin_of("sue", "operator", "payments/*")
    assert await rig.code(scoped, "POST", "/v1/approvals", ref, Refused) == "admin.scope"
    assert (await rig.workload("payments/api")).state == "unplaced"
    assert (await rig.call(bob.post, "/v1/approvals", ref, Approval)).approved_by == "admin/bob"
    assert await rig.code(bob, "POST", "/v1/approvals", ref, Conflict) == "approval.done"
    # bound to who asked and to what was asked
    assert await rig.code(bob, "POST", "/v1/workloads/revoke", act, Conflict) == "approval.pending"
    assert await rig.code(alice, "POST", "/v1/workloads/revoke", WorkloadRef(name="shop/api"), Conflict) == "approval.pending"
    done = await rig.call(alice.post, "/v1/workloads/revoke", act, Workload)
    assert done.state == "revoked"
    assert await rig.code(alice, "POST", "/v1/workloads/revoke", act, Conflict) == "approval.pending"  # once
    assert [e["actor"] for e in await rig.audited("approval.give")] == ["admin/bob"]
    assert [e["actor"] for e in await rig.audited("workload.revoke")] == ["admin/alice"]


async def test_one_approval_serves_one_of_many_at_once(rig):
    alice, bob = await rig.admin_of("alice", "operator"), await rig.admin_of("bob", "operator")
    await rig.add("payments/api")
    act = WorkloadRef(name="payments/api")
    assert await rig.code(alice, "POST", "/v1/workloads/revoke", act) == "approval.pending"
    (shown,) = (await rig.call(bob.get, "/v1/approvals", ApprovalList)).approvals
    await rig.call(bob.post, "/v1/approvals", ApprovalRef(id=shown.id), Approval)
    codes = await asyncio.gather(*(rig.call(alice.raw, "POST", "/v1/workloads/revoke", act) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(c, dict) for c in codes) == 1
    assert {c.code for c in codes if isinstance(c, RetinueError)} == {"approval.pending"}


async def test_an_approval_expires(rig, monkeypatch):
    alice, bob = await rig.admin_of("alice", "operator"), await rig.admin_of("bob", "operator")
    await rig.add("payments/api")
    act = WorkloadRef(name="payments/api")
    monkeypatch.setattr(approvals, "LIFE", 1)
    assert await rig.code(alice, "POST", "/v1/workloads/revoke", act) == "approval.pending"
    (shown,) = (await rig.call(bob.get, "/v1/approvals", ApprovalList)).approvals
    real = rig.plane.clock
    monkeypatch.setattr(rig.plane, "clock", lambda: real() + 5)
    assert await rig.code(bob, "POST", "/v1/approvals", ApprovalRef(id=shown.id), Refused) == "approval.expired"
    monkeypatch.setattr(approvals, "LIFE", 3600)
    assert await rig.code(alice, "POST", "/v1/workloads/revoke", act) == "approval.pending"
    found = (await rig.call(bob.get, "/v1/approvals", ApprovalList)).approvals
    fresh = next(a for a in found if a.expires > time.time() + 60)
    await rig.call(bob.post, "/v1/approvals", ApprovalRef(id=fresh.id), Approval)
    monkeypatch.setattr(rig.plane, "clock", lambda: real() + 3606)  # approved, but too late
    assert await rig.code(alice, "POST", "/v1/workloads/revoke", act) == "approval.pending"


async def test_force_and_ends_that_come_at_once_want_two(rig):
    alice = await rig.admin_of("alice", "registrar")
    await rig.join("web-1")
    await rig.add("payments/api", "web-1")
    move = WorkloadMove(name="payments/api", to="web-1", wait=0)
    assert await rig.code(alice, "POST", "/v1/workloads/move", move) == "move.same"
    assert await rig.code(alice, "POST", "/v1/workloads/move", move.model_copy(update={"force": True})) == "approval.pending"
    for life in ({"ends_in": 5}, {"ends_at": int(time.time()) + 60}, {"ends_with": "shop/api"}):
        assert await rig.code(alice, "POST", "/v1/workloads/life", WorkloadLife(name="payments/api", **life)) == "approval.pending"
    done = await rig.call(alice.post, "/v1/workloads/life", WorkloadLife(name="payments/api", ends_in=86400), Workload)
    assert done.ends_at > time.time() + 80000


async def test_root_is_alone_and_it_is_written_down(rig):
    await rig.add("a")
    await rig.add("b")
    await rig.post("/v1/workloads/revoke", WorkloadRef(name="a"), Workload)
    assert await rig.audited("admin.break_glass") == []  # there is nobody else yet
    await rig.admin_of("alice", "viewer")
    await rig.post("/v1/workloads/revoke", WorkloadRef(name="b"), Workload)
    (entry,) = await rig.audited("admin.break_glass")
    assert (entry["subject"], entry["detail"]["summary"]) == ("POST /v1/workloads/revoke", "name=b instance=0")
    assert await rig.code(rig.admin, "POST", "/v1/admins/renew", AdminRenew(csr="x"), Refused) == "admin.local"


async def test_certificates_of_others_open_nothing(rig):
    agent = await rig.join("web-1")
    host = rig.impostor(SpiffeId(TD, ("host", "web-1")), "h")
    workload = rig.impostor(SpiffeId(TD, ("wl", "payments", "api")), "w")
    unknown = rig.impostor(SpiffeId(TD, ("admin", "nobody")), "n")
    for client, code in ((host, "admin.kind"), (workload, "admin.kind"), (unknown, "admin.certificate")):
        for method, path in (("GET", "/v1/info"), ("POST", "/v1/workloads"), ("GET", "/v1/audit"), ("POST", "/v1/admins")):
            assert await rig.code(client, method, path, None, Refused) == code
    refusals = {(e["actor"].split(":")[0], e["outcome"]) for e in await rig.audited("admin")}
    assert {("address", "admin.kind"), ("address", "admin.certificate")} <= refusals
    alice = await rig.admin_of("alice", "ca-admin")
    for trick in ("/../v1/feed", "/%2e%2e/v1/feed", "//v1/feed", "/admin/v1/info"):
        with pytest.raises(RetinueError) as caught:
            await rig.call(alice._ask, "GET", trick, None, None, None)
        assert caught.value.code in {"api.path", "caller.kind"}
    async with agent.machine.client(agent.machine.bundle) as client:
        with pytest.raises(RetinueError) as refused:
            await client.get("/admin/v1/workloads", Workload)
        assert refused.value.code == "admin.kind"


async def test_a_role_that_a_database_writer_gave_is_none(rig):
    from sqlalchemy import update

    from ca import schema

    alice = await rig.admin_of("alice", "viewer")
    bob = await rig.admin_of("bob", "registrar", "payments/*")
    for name, values in (("alice", {"role": "ca-admin"}), ("bob", {"scopes": "[]"})):
        with rig.plane.store.write() as tx:
            tx.execute(update(schema.admins).where(schema.admins.c.name == name).values(**values))
    for client in (alice, bob):
        assert await rig.code(client, "GET", "/v1/info") == "store.contradiction"


@pytest.mark.parametrize("path", ["/v1/report", "/v1/svid", "/v1/renew", "/v1/jwt", "/v1/sidecar-token", "/v1/underlay"])
async def test_an_administrators_certificate_is_no_endpoints(rig, path, monkeypatch):
    alice = await rig.admin_of("alice", "ca-admin")
    monkeypatch.setattr(remote, "PREFIX", "")
    assert await rig.code(alice, "POST", path, None, Refused) == "caller.kind"
    with pytest.raises(Refused) as caught:
        await rig.call(alice.raw, "GET", "/v1/feed")
    assert caught.value.code == "caller.kind"


async def test_without_a_certificate(rig):
    import ssl
    import urllib.request

    context = ssl.create_default_context(cadata=rig.plane.trust.roots_pem())
    context.check_hostname = False
    with pytest.raises(urllib.error.HTTPError) as caught:
        await rig.call(urllib.request.urlopen, f"{rig.url}/admin/v1/workloads", context=context, timeout=10)
    assert caught.value.code == 403
    assert json.loads(caught.value.read())["code"] == "admin.anonymous"
    caught.value.close()


async def test_a_revoked_administrator_is_out_with_every_certificate(rig):
    alice = await rig.admin_of("alice", "operator")
    assert await rig.call(alice.raw, "GET", "/v1/info")
    done = await rig.post("/v1/admins/revoke", AdminRef(name="alice"), AdminInfo)
    assert done.state == "revoked"
    assert await rig.code(alice, "GET", "/v1/info", None, Refused) == "admin.revoked"
    assert await rig.code(rig.admin, "POST", "/v1/admins/certify", AdminCertify(name="alice", csr=_csr()), Refused) == "admin.revoked"
    again = AdminAdd(name="alice", role="viewer", csr=_csr())
    assert await rig.code(rig.admin, "POST", "/v1/admins", again, Conflict) == "admin.exists"
    assert [a.state for a in (await rig.get("/v1/admins", AdminList)).admins] == ["revoked"]


def _csr() -> str:
    return certs.make_csr(remote.new_key())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "a\x1b[2J"}, "name.host"), ({"name": "a\nb"}, "name.host"), ({"name": "../ca"}, "name.host"), ({"name": "Alice"}, "name.host"),
        ({"scopes": ["*"]}, "admin.scope"), ({"scopes": ["payments"], "role": "ca-admin"}, "admin.scope"), ({"scopes": ["a\n/*"]}, "admin.scope"),
        ({"scopes": ["a/../b/*"]}, "name.workload"), ({"csr": "nonsense"}, "csr.syntax"),
    ],
)  # fmt: skip
async def test_administrators_that_cannot_be(rig, change, code):
    request = AdminAdd(**{"name": "alice", "role": "viewer", "csr": _csr(), **change})
    assert await rig.code(rig.admin, "POST", "/v1/admins", request) == code
    assert (await rig.get("/v1/admins", AdminList)).admins == []


async def test_a_certificate_is_renewed_past_half_of_its_life(rig, monkeypatch):
    alice = await rig.admin_of("alice", "viewer")
    first, shown = alice._identity, (alice.directory / "chain.pem").read_text()
    await rig.call(alice.raw, "GET", "/v1/info")
    assert (alice.directory / "chain.pem").read_text() == shown
    monkeypatch.setattr(remote.time, "time", lambda: (first.not_before + first.not_after) / 2 + 1)
    monkeypatch.setattr(RemoteClient, "_server_is_ours", lambda *_: None)  # its own certificate is of now
    await rig.call(alice.raw, "GET", "/v1/info")
    monkeypatch.undo()
    assert (alice.directory / "chain.pem").read_text() != shown
    assert Identity.load(first.directory) == alice._identity
    await rig.call(alice.raw, "GET", "/v1/info")


async def test_an_expired_one_says_what_to_do(rig, monkeypatch):
    alice = await rig.admin_of("alice", "viewer")
    monkeypatch.setattr(remote.time, "time", lambda: alice._identity.not_after + 1.0)
    assert await rig.code(alice, "GET", "/v1/info", None, BadState) == "admin.expired"


async def test_another_server_is_told_nothing(rig, tmp_path):
    """An endpoint of our own trust domain, and a CA of another, in the place of the server."""
    alice = await rig.admin_of("alice", "viewer")
    Plane.create(tmp_path / "other", TD, time.time())
    async with running(Options(tmp_path / "other", "127.0.0.1:0")) as other:
        client = RemoteClient(alice._identity, f"https://{other.listen}")
        assert await rig.code(client, "GET", "/v1/info") == "ca.tls"
    sock = type("Sock", (), {"_sslobj": type("Inner", (), {"get_unverified_chain": lambda _: [_Cert(c) for c in _chain(rig)]})()})()
    with pytest.raises(NotVerified) as caught:
        alice._server_is_ours(sock)
    assert caught.value.code == "ca.name"


class _Cert:
    def __init__(self, pem: str) -> None:
        self.pem = pem

    def public_bytes(self) -> str:
        return self.pem


def _chain(rig: Rig) -> list[str]:
    return rig.plane.authority.issue_endpoint(_csr(), SpiffeId(TD, ("host", "web-1")), time.time())


async def test_a_directory_that_others_can_read_is_refused(rig):
    alice = await rig.admin_of("alice", "viewer")
    directory = alice.directory
    (directory / "key.pem").chmod(0o644)
    with pytest.raises(BadState):
        Identity.load(directory)
    (directory / "key.pem").chmod(0o600)
    for name, text in (("admin.json", "[]"), ("chain.pem", "x"), ("admin.json", "{")):
        kept = (directory / name).read_text()
        (directory / name).write_text(text)
        with pytest.raises(BadState) as caught:
            Identity.load(directory)
        assert caught.value.code == "admin.identity"
        (directory / name).write_text(kept)
    (directory / "chain.pem").unlink()
    with pytest.raises(BadState):
        Identity.load(directory)


@pytest.mark.parametrize("url", ["http://a:1", "https://", "https://a/b", "https://u@a", "https://a:0", "https://a:x", "a:1"])
def test_addresses_of_no_ca(url):
    with pytest.raises(RetinueError) as caught:
        remote.check_server(url)
    assert caught.value.code == "ca.url"
