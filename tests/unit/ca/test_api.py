"""The endpoints' API over real TLS on loopback, with the real enrolment client."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from ca import api, audit
from ca import http as ca_http
from ca.plane import Plane
from ca.serve import Options, Running, running
from identity.errors import BadInput, Conflict, NotVerified, Refused, RetinueError, TimedOut, Unreachable
from identity.names import TrustDomain
from identity.wire.admin import ExplainReply, TokenCreate, WorkloadAdd
from identity.wire.enroll import (
    Challenge,
    ChallengeRequest,
    EnrollReply,
    RenewReply,
    SidecarTokenReply,
    SidecarTokenRequest,
    SvidReply,
    SvidRequest,
    UnderlayUpdate,
)
from identity.wire.feed import Beat, Delta, Report, Snapshot, parse_frame
from mesh.control import Busy, ControlClient, RootPin
from mesh.enroll import Enrollment, enroll, renew

TD = TrustDomain("reg.test")
WAIT = 10.0


class Rig:
    """A running server and machines that joined it."""

    def __init__(self, server: Running, path: Path) -> None:
        self.server, self.path = server, path
        self.service = server.service
        self.plane = server.service.plane
        self.url = f"https://{server.listen}"
        self._machines = 0

    async def token(self, host: str | None = None, **more: object) -> str:
        request = TokenCreate.model_validate({"host": host, **more})
        return (await self.service.read(lambda: self.plane.token(request, "test"))).token

    async def join(self, host: str | None = None, *, token: str | None = None) -> Enrollment:
        self._machines += 1
        text = token or await self.token(host)
        return await enroll(
            self.url, text, self.path / f"m{self._machines}", ["127.0.0.1:51820"], ["chacha20poly1305"]
        )

    async def add(self, name: str, host: str | None = None) -> None:
        request = WorkloadAdd(name=name, host=host)
        await self.service.change(lambda: self.plane.placements.add(request, self.plane.now, "test"))

    async def revoke(self, host: str) -> None:
        await self.service.change(lambda: self.plane.registry.revoke(host, self.plane.now, "test"))

    def client(self, machine: Enrollment) -> ControlClient:
        return machine.client(machine.bundle)

    def anonymous(self) -> ControlClient:
        return ControlClient(self.url, RootPin(self.plane.authority.root_fingerprint))


@asynccontextmanager
async def rig_at(path: Path, **options: object) -> AsyncIterator[Rig]:
    directory = path / "ca"
    Plane.create(directory, TD, time.time())
    async with running(Options(directory, "127.0.0.1:0", **options)) as server:  # type: ignore[arg-type]
        yield Rig(server, path)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig_at(tmp_path, heartbeat=0.2) as made:
        yield made


async def frames(lines: AsyncIterator[bytes], kind: type) -> object:
    """The next frame of a kind; heartbeats come in between."""
    async with asyncio.timeout(WAIT):
        async for line in lines:
            frame = parse_frame(line)
            if isinstance(frame, kind):
                return frame
    raise AssertionError("the feed ended")


async def refused(call, kind: type[RetinueError] = RetinueError) -> str:
    with pytest.raises(kind) as e:
        await call
    return e.value.code


# ---- enrolment


async def test_a_machine_enrols_and_renews(rig: Rig) -> None:
    machine = await rig.join("a")
    assert machine.endpoint == "a"
    renewed = await renew(machine, ["127.0.0.1:7"], ["chacha20poly1305"])
    assert (renewed.record.underlay, renewed.record.generation) == (["127.0.0.1:7"], 2)
    async with rig.client(renewed) as client:
        await client.send("/v1/underlay", UnderlayUpdate(underlay=[]))
        assert (
            await refused(client.send("/v1/underlay", UnderlayUpdate(underlay=["x"])), BadInput)
            == "underlay.form"
        )


async def test_one_token_and_fifty_machines_at_once(rig: Rig, join, csr) -> None:
    token = await rig.token("a")
    attempts = [join(rig.plane, None, token=token) for _ in range(50)]

    async def attempt(one) -> str:
        async with rig.anonymous() as client:
            challenge = await client.post(
                "/v1/enroll/challenge", ChallengeRequest(token_id=one.token.id), Challenge
            )
            try:
                reply = await client.post(
                    "/v1/enroll", one.answer(challenge, client.server_leaf), EnrollReply
                )
            except RetinueError as e:
                return e.code
        return reply.endpoint

    outcomes = await asyncio.gather(*(attempt(one) for one in attempts))
    assert sorted(set(outcomes)) == ["a", "token.used"]
    assert outcomes.count("a") == 1
    assert len(await rig.service.read(rig.plane.registry.all)) == 1


async def test_a_challenge_says_nothing_about_the_token(rig: Rig) -> None:
    token = await rig.token("a")
    async with rig.anonymous() as client:
        known = await client.post(
            "/v1/enroll/challenge", ChallengeRequest(token_id=token.split(".")[1]), Challenge
        )
        unknown = await client.post("/v1/enroll/challenge", ChallengeRequest(token_id="nobody"), Challenge)
    assert known.expires_in == unknown.expires_in
    assert len(known.nonce) == len(unknown.nonce)


async def test_a_proof_for_another_server_is_worth_nothing(rig: Rig, join) -> None:
    one = join(rig.plane, None, token=await rig.token("a"))
    async with rig.anonymous() as client:
        challenge = await client.post(
            "/v1/enroll/challenge", ChallengeRequest(token_id=one.token.id), Challenge
        )
        assert (
            await refused(client.post("/v1/enroll", one.answer(challenge, b"another leaf"), EnrollReply))
            == "token.refused"
        )


async def test_an_address_that_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    async with rig_at(tmp_path, limits=api.Limits(rate=0.5, burst=3)) as rig, rig.anonymous() as client:
        ask = ChallengeRequest(token_id="nobody")
        for _ in range(3):
            await client.post("/v1/enroll/challenge", ask, Challenge)
        with pytest.raises(Busy) as e:
            await client.post("/v1/enroll/challenge", ask, Challenge)
        assert e.value.code == "api.rate"
        assert e.value.retry_after >= 1
        # members are not slowed down by strangers
        assert rig.plane.registry.all() == []


# ---- who may do what


ROUTES = [("POST", p) for p in ("/v1/renew", "/v1/svid", "/v1/sidecar-token", "/v1/underlay", "/v1/report")] + [
    ("GET", "/v1/explain"), ("GET", "/v1/feed"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_a_certificate_nothing(rig: Rig, method: str, path: str) -> None:
    async with rig.anonymous() as client:
        assert (
            await refused(
                client._exchange(method, path, WAIT, data=b"{}" if method == "POST" else None), Refused
            )
            == "caller.anonymous"
        )


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_revoked_host_nothing(rig: Rig, method: str, path: str) -> None:
    machine = await rig.join("a")
    async with rig.client(machine) as client:
        await client.send("/v1/underlay", UnderlayUpdate(underlay=[]))  # the connection is open and good
        await rig.revoke("a")
        assert (
            await refused(
                client._exchange(method, path, WAIT, data=b"{}" if method == "POST" else None), Refused
            )
            == "caller.revoked"
        )
    with rig.plane.store.read() as tx:
        last = audit.entries(tx)[-1]
    assert (last.action, last.subject, last.outcome) == ("call", path, "caller.revoked")


async def test_a_certificate_of_another_authority_is_no_certificate(rig: Rig, tmp_path: Path) -> None:
    async with rig_at(tmp_path / "other") as other:
        stranger = await other.join("a")
        await rig.join("a")
        async with ControlClient(
            rig.url, rig.plane.authority.trust_bundle(0, rig.plane.now), stranger.files
        ) as client:
            with pytest.raises((Unreachable, NotVerified, Refused)):
                await client.send("/v1/underlay", UnderlayUpdate(underlay=[]))


async def test_workload_certificates_go_to_the_holder(rig: Rig, csr) -> None:
    a, b = await rig.join("a"), await rig.join("b")
    await rig.add("web", "a")
    ask = SvidRequest(workload="web", instance=0, csr=csr())
    async with rig.client(a) as client:
        reply = await client.post("/v1/svid", ask, SvidReply)
        a.bundle.verify_svid(reply.chain, rig.plane.clock())
        assert await refused(
            client.post("/v1/svid", ask.model_copy(update={"csr": "x"}), SvidReply), BadInput
        )
    async with rig.client(b) as client:
        assert await refused(client.post("/v1/svid", ask, SvidReply), Refused) == "svid.not_here"


async def test_a_host_gets_a_token_for_its_sidecar(rig: Rig) -> None:
    a, b = await rig.join("a"), await rig.join("b")
    await rig.add("web", "a")
    async with rig.client(b) as client:
        assert (
            await refused(
                client.post("/v1/sidecar-token", SidecarTokenRequest(workload="web"), SidecarTokenReply)
            )
            == "sidecar.not_here"
        )
    async with rig.client(a) as client:
        made = await client.post("/v1/sidecar-token", SidecarTokenRequest(workload="web"), SidecarTokenReply)
    side = await rig.join(token=made.token)
    assert (side.kind, side.workload, side.endpoint) == ("sidecar", "web", made.endpoint)
    assert (await rig.service.read(lambda: rig.plane.placements.get("web", 0))).endpoint == made.endpoint


async def test_a_member_asks_about_its_own_pairs(rig: Rig) -> None:
    a, b = await rig.join("a"), await rig.join("b")
    await rig.add("web", "a")
    await rig.add("api", "a")
    question = {"src": "web", "dst": "api", "proto": "tcp", "port": "80"}
    async with rig.client(a) as client:
        assert (await client.get("/v1/explain", ExplainReply, params=question)).verdict == "deny"
        for bad in (
            {"src": "web"},
            {**question, "port": "-1"},
            {**question, "port": "80000"},
            {**question, "dst": "x" * 600},
        ):
            assert await refused(client.get("/v1/explain", ExplainReply, params=bad), BadInput)
    async with rig.client(b) as client:
        assert (
            await refused(client.get("/v1/explain", ExplainReply, params=question), Refused)
            == "explain.not_here"
        )


# ---- feed


async def test_the_feed_follows_what_happens(rig: Rig) -> None:
    machine = await rig.join("a")
    async with rig.client(machine) as client, client.stream("/v1/feed") as lines:
        first = await frames(lines, Snapshot)
        assert set(first.objects) == {"bundle", "endpoint/a"}
        await rig.add("web", "a")
        delta = await frames(lines, Delta)
        assert set(delta.upserts) == {"placement/web/0"}
        assert await frames(lines, Beat)
        await client.send(
            "/v1/report", Report(timeline=delta.timeline, revision=delta.revision, hash=delta.hash)
        )
        assert rig.service.reports["a"].revision == delta.revision
        assert (
            await refused(client.send("/v1/report", Report(timeline="x", revision=1, hash="")), Conflict)
            == "report.timeline"
        )
    async with rig.client(machine) as client:
        where = {"timeline": delta.timeline, "revision": str(delta.revision)}
        async with client.stream("/v1/feed", params=where) as lines:
            again = await frames(lines, Delta)
            assert (again.upserts, again.removes, again.hash) == ({}, [], delta.hash)


async def test_a_revoked_host_loses_its_open_feed(rig: Rig) -> None:
    machine = await rig.join("a")
    async with rig.client(machine) as client:
        async with client.stream("/v1/feed") as lines:
            await frames(lines, Snapshot)
            await rig.revoke("a")
            assert await refused(frames(lines, Delta), Unreachable)
        assert await refused(client._exchange("GET", "/v1/feed", WAIT), Refused) == "caller.revoked"


async def test_enrolling_anew_ends_the_feed_of_the_old_keys(rig: Rig) -> None:
    machine = await rig.join("a")
    async with rig.client(machine) as client, client.stream("/v1/feed") as lines:
        await frames(lines, Snapshot)
        await rig.join(token=await rig.token("a", replace=True))
        with pytest.raises(Unreachable):
            async with asyncio.timeout(WAIT):
                async for _ in lines:
                    pass


async def test_the_newer_of_two_connections_has_the_feed(rig: Rig) -> None:
    machine = await rig.join("a")
    async with rig.client(machine) as one, rig.client(machine) as two, one.stream("/v1/feed") as old:
        await frames(old, Snapshot)
        async with two.stream("/v1/feed") as new:
            await frames(new, Snapshot)
            with pytest.raises(Unreachable):
                async with asyncio.timeout(WAIT):
                    async for _ in old:
                        pass
            await rig.add("web", "a")
            assert await frames(new, Delta)


async def test_a_scope_that_fails_says_come_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = await rig.join("a")

    def fail(*_: object) -> None:
        raise RuntimeError("a bad row")

    with monkeypatch.context() as patch:
        patch.setattr(rig.plane.mirror.world, "view", fail)
        async with rig.client(machine) as client:
            with pytest.raises(Busy) as e:
                await client._exchange("GET", "/v1/feed", WAIT)
            assert (e.value.code, e.value.retry_after) == ("feed.scope", 1.0)
    async with rig.client(machine) as client, client.stream("/v1/feed") as lines:
        assert await frames(lines, Snapshot)


async def test_an_endpoint_that_does_not_read_is_let_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = await rig.join("a")
    async with rig.client(machine) as client, client.stream("/v1/feed") as lines:
        await frames(lines, Snapshot)
        stream = rig.service.streams["a"]
        put = 0
        while not stream.closed.is_set() and put < 4 * stream.queue.maxsize:  # what the connection takes is small
            stream.put((b"x" * 60_000, b"\n"))
            put += 1
        assert (stream.closed.is_set(), stream.why) == (True, "too slow")
        assert stream.queue.full()
        assert put > stream.queue.maxsize


async def test_a_stream_ends_with_its_certificate(rig: Rig) -> None:
    machine = await rig.join("a")
    async with rig.client(machine) as client, client.stream("/v1/feed") as lines:
        await frames(lines, Snapshot)
        rig.service.streams["a"].expires = rig.plane.now
        with pytest.raises(Unreachable):
            async with asyncio.timeout(WAIT):
                async for _ in lines:
                    pass


# ---- bad input


async def raw(rig: Rig, method: str, path: str, **more: object) -> tuple[int, dict]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.request(method, rig.url + path, **more) as response,  # type: ignore[arg-type]
    ):
        return response.status, json.loads(await response.read())


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "code"),
    [
        ("GET", "/nowhere", {}, 404, "api.path"),
        ("GET", "/v1/enroll", {}, 405, "api.method"),
        ("POST", "/v1/enroll", {"data": b"not json"}, 400, "wire.schema"),
        ("POST", "/v1/enroll", {"data": b"[" * 100_000}, 400, "wire.schema"),
        ("POST", "/v1/enroll", {"data": b'{"token_id": 1}'}, 400, "wire.schema"),
        ("POST", "/v1/enroll/challenge", {"data": b'{"token_id": "x", "more": 1}'}, 400, "wire.schema"),
        ("POST", "/v1/enroll", {"data": b"x" * (api.MAX_BODY + 1)}, 413, "api.large"),
        ("POST", "/v1/enroll", {"data": b"x", "headers": {"Content-Encoding": "gzip"}}, 400, "api.encoding"),
        (
            "POST",
            "/v1/enroll/challenge",
            {"data": b'{"token_id": "' + b"x" * 100 + b'"}'},
            400,
            "wire.schema",
        ),
    ],
)
async def test_bad_requests(rig: Rig, method: str, path: str, more: dict, status: int, code: str) -> None:
    got, error = await raw(rig, method, path, **more)
    assert (got, error["code"]) == (status, code)


async def test_a_body_that_trickles_is_cut(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ca_http, "BODY_S", 0.2)

    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(WAIT)

    status, error = await raw(rig, "POST", "/v1/enroll", data=trickle())
    assert (status, error["code"]) == (TimedOut.http, "api.slow")


async def test_a_defect_shows_no_trace(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(rig.plane, "challenge", fail)
    status, error = await raw(rig, "POST", "/v1/enroll/challenge", data=b'{"token_id": "x"}')
    assert (status, error["code"]) == (500, "bug")
    assert "secret" not in json.dumps(error)


async def test_only_tls_1_3(rig: Rig) -> None:
    host, _, port = rig.server.listen.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection(host, int(port), ssl=context)


async def test_a_renewed_server_certificate_is_shown_to_the_next(rig: Rig) -> None:
    """The certificate file is what a new handshake shows; enrolment proofs follow it."""
    async with rig.anonymous() as client:
        await client.post("/v1/enroll/challenge", ChallengeRequest(token_id="x"), Challenge)
        leaf = client.server_leaf
    assert (
        leaf == (await rig.service.read(lambda: rig.plane.authority.server_chain(rig.plane.clock()))).leaf_der
    )


async def test_renew_reply_shape(rig: Rig, csr) -> None:
    machine = await rig.join("a")
    async with rig.client(machine) as client:
        reply = await client._exchange(
            "POST", "/v1/renew", WAIT, data=json.dumps({"csr": csr(), "underlay": [], "ciphers": []}).encode()
        )
    assert RenewReply.model_validate_json(reply).record
