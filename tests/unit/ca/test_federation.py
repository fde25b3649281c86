"""Two trust domains over real TLS: bundles fetched by both profiles, kept by sequence, told to the endpoints."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ca import federation, federation_service, succession
from ca.federation_service import WebIdentity
from ca.plane import Plane
from ca.serve import Options, Running, running
from identity import certs
from identity.errors import BadInput, Conflict, NotFound, NotVerified, RetinueError
from identity.federation import make_bundle
from identity.keys import private_pem, write_file, write_secret
from identity.names import SpiffeId, TrustDomain
from identity.records import ForeignBundle
from identity.wire.federation import FederationAdd

ONE, TWO = TrustDomain("one.example"), TrustDomain("two.example")


@asynccontextmanager
async def domain(path: Path, name: TrustDomain, **more: Any) -> AsyncIterator[Running]:
    Plane.create(path, name, time.time())
    async with running(Options(path, "127.0.0.1:0", **more)) as server:
        yield server


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[Running, Running]]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(domain(tmp_path / "one", ONE))
        other = await stack.enter_async_context(domain(tmp_path / "two", TWO, bundle_listen="127.0.0.1:0"))
        yield one, other


def request(other: Running, **changed: Any) -> FederationAdd:
    fields = {
        "trust_domain": "two.example", "url": f"https://{other.bundle}/", "profile": "https_spiffe",
        "endpoint_id": "spiffe://two.example/cp/ca", "bundle": federation.own_bundle(other.service.plane, 60),
    }  # fmt: skip
    return FederationAdd.model_validate(fields | changed)


async def known(server: Running, name: str = "two.example") -> federation.Federation:
    def read() -> federation.Federation:
        with server.service.plane.store.read() as tx:
            return federation.get(tx, name)

    return await server.service.read(read)


async def do(server: Running, job: Any) -> Any:
    done, _ = await server.service.change(job)
    return done


async def shown(server: Running) -> None:
    """Until the server has looked at its certificates after a change of its authority."""
    await asyncio.sleep(0.05)  # the renewing task takes the event, and then
    assert not server.service.trust_changed.is_set()
    await server.service.read(lambda: None)  # stands before us in the worker
    await asyncio.sleep(0.05)


async def test_a_bundle_is_followed_over_a_change_of_the_root(two: tuple[Running, Running]) -> None:
    one, other = two
    plane, foreign = one.service.plane, other.service.plane
    await do(one, lambda: federation.add(plane, request(other), "test"))
    first = await known(one)
    told = plane.mirror.world.foreign["federation/two.example"]
    assert plane.trust.verify(ForeignBundle, told).foreign == "two.example"
    for kind in ("prepare", "activate"):
        await do(other, lambda kind=kind: getattr(succession, kind)(foreign, "root", "test"))
    await shown(other)
    assert await federation_service.refresh(one.service, first, {})
    second = await known(one)
    assert len(second.roots.roots) == 2
    assert (second.roots.sequence or 0) > (first.roots.sequence or 0)
    assert len(plane.trust.verify(ForeignBundle, plane.mirror.world.foreign["federation/two.example"]).roots) == 2
    await do(other, lambda: succession.revoke(foreign, "root", "test", force=True))
    await shown(other)
    assert await federation_service.refresh(one.service, second, {})
    assert not await federation_service.refresh(one.service, first, {})  # now the endpoint is one of the new root
    assert [certs.fingerprint(r) for r in (await known(one)).roots.roots] == [foreign.authority.root_fingerprint]
    await do(one, lambda: federation.remove(plane, "two.example", "test"))
    assert plane.mirror.world.foreign == {}
    with pytest.raises(NotFound):
        await known(one)


async def test_the_server_must_be_the_named_svid_of_that_domain(two: tuple[Running, Running], tmp_path: Path) -> None:
    one, other = two
    plane = one.service.plane
    row = federation.Federation("two.example", f"https://{other.bundle}/", "https_spiffe", "spiffe://two.example/cp/ca",
                                federation.own_bundle(other.service.plane, 60), 0, None, None)  # fmt: skip
    now = time.time()
    async def code(**changed: Any) -> str:
        try:
            await asyncio.to_thread(federation.fetch, replace(row, **changed), now)
        except RetinueError as e:
            return e.code
        return "ok"

    assert await code() == "ok"
    assert await code(endpoint_id="spiffe://two.example/cp/other") == "federation.server"
    assert await code(bundle=federation.own_bundle(plane, 60)) in {"cert.untrusted", "cert.ca_name"}  # another domain's roots
    assert await code(bundle=make_bundle([], 1)) == "chain.no_root"
    # Our own CA answers there: it is a CA, but not theirs.
    assert await code(url=f"https://{one.listen}/") in {"cert.trust_domain", "cert.untrusted", "cert.ca_name"}
    assert await code(url="https://127.0.0.1:1/") == "federation.fetch"
    rogue = tmp_path / "rogue"
    async with domain(rogue, TWO, bundle_listen="127.0.0.1:0") as same_name:
        assert await code(url=f"https://{same_name.bundle}/") == "cert.untrusted"


async def test_what_is_known_stays_when_it_cannot_be_fetched(two: tuple[Running, Running]) -> None:
    one, other = two
    plane = one.service.plane
    await do(one, lambda: federation.add(plane, request(other, url="https://127.0.0.1:1/"), "test"))
    failed: dict[str, float] = {}
    assert await federation_service.refresh(one.service, await known(one), failed) is False
    row = await known(one)
    assert row.roots.roots
    assert (row.error or "").startswith("federation.fetch")
    assert "two.example" in failed
    assert federation.due(plane, failed, time.monotonic()) == []


async def test_a_bundle_never_goes_back_or_changes_unsaid(two: tuple[Running, Running]) -> None:
    one, other = two
    plane = one.service.plane
    await do(one, lambda: federation.add(plane, request(other), "test"))
    root, mine = other.service.plane.authority.root, plane.authority.root
    tokens = other.service.plane.authority.jwt_authorities()
    sequence = (await known(one)).roots.sequence or 0

    async def take(text: str) -> str:
        try:
            await do(one, lambda: federation.take(plane, "two.example", text, "test"))
        except RetinueError as e:
            return e.code
        return "ok"

    assert await take(make_bundle([root], sequence, 60, tokens)) == "ok"
    assert await take(make_bundle([root], sequence - 1, 60, tokens)) == "federation.sequence"
    assert await take(make_bundle([], sequence)) == "federation.sequence"
    # Our own root as theirs: a foreign authority would speak for us.
    assert await take(make_bundle([mine], sequence + 1)) == "federation.root"
    assert await take("junk") == "federation.bundle"
    assert (await known(one)).roots.roots == (root,)
    # No keys at all: everything of theirs is revoked, and the endpoints are told.
    assert await take(make_bundle([], sequence + 1)) == "ok"
    assert plane.trust.verify(ForeignBundle, plane.mirror.world.foreign["federation/two.example"]).roots == []


async def test_foreign_identities_are_believed_under_their_own_roots_only(two: tuple[Running, Running]) -> None:
    one, other = two
    mine, theirs = one.service.plane, other.service.plane
    csr = certs.make_csr(ec.generate_private_key(ec.SECP256R1()))
    name = SpiffeId.workload(TWO, "shop/api")
    chain = certs.parse_chain(await other.service.read(lambda: theirs.authority.issue_workload(csr, name, [], time.time())))
    now = time.time()
    assert federation.verify_foreign(chain, (theirs.authority.root,), TWO, now) == name
    for roots, domain_name in (((mine.authority.root,), TWO), ((theirs.authority.root,), ONE), ((), TWO)):
        with pytest.raises(NotVerified):
            federation.verify_foreign(chain, roots, domain_name, now)
    with pytest.raises(NotVerified):
        mine.trust.verify_svid(chain, now)  # and never as one of ours


async def test_requests_that_make_no_sense(two: tuple[Running, Running]) -> None:
    one, other = two
    plane = one.service.plane
    for changed, code in (
        ({"trust_domain": "one.example"}, "federation.own"), ({"url": "http://x/"}, "federation.url"), ({"url": "https:///x"}, "federation.url"),
        ({"url": "https://u@h/"}, "federation.url"), ({"endpoint_id": None}, "federation.endpoint"), ({"profile": "https_web"}, "federation.endpoint"),
        ({"endpoint_id": "spiffe://three.example/a"}, "federation.endpoint"), ({"bundle": "{}"}, "federation.bundle"),
        ({"bundle": federation.own_bundle(plane, 60)}, "federation.root"),
    ):  # fmt: skip
        with pytest.raises(BadInput) as e:
            await do(one, lambda changed=changed: federation.add(plane, request(other, **changed), "test"))
        assert e.value.code == code
    await do(one, lambda: federation.add(plane, request(other), "test"))
    with pytest.raises(Conflict):
        await do(one, lambda: federation.add(plane, request(other), "test"))


def web_certificate(path: Path) -> WebIdentity:
    """A self-signed web certificate of 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    cert = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(5)
        .not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    path.mkdir()
    write_file(path / "cert.pem", cert.public_bytes(Encoding.PEM))
    write_secret(path / "key.pem", private_pem(key))
    return WebIdentity(path / "cert.pem", path / "key.pem")


async def test_the_web_profile(tmp_path: Path) -> None:
    web = web_certificate(tmp_path / "web")
    async with (
        domain(tmp_path / "one", ONE, web_roots=web.chain) as one,
        domain(tmp_path / "two", TWO, bundle_listen="127.0.0.1:0", bundle_identity=web) as other,
    ):
        plane = one.service.plane
        await do(one, lambda: federation.add(plane, request(other, profile="https_web", endpoint_id=None), "test"))
        assert await federation_service.refresh(one.service, await known(one), {}, one.service.web_roots)
        # Without that root the system's count, and its certificate is nobody's.
        assert await federation_service.refresh(one.service, await known(one), {}) is False
        assert (await known(one)).error.startswith("federation.server")  # type: ignore[union-attr]  # just set
