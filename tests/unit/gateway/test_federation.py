"""gateway.federation: callers of other trust domains, each verified under the bundle of its own domain and no other."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ca.authority import Authority
from gateway import federation
from gateway.callers import Proven, identify
from gateway.config import Caller, Config, Listen, Route, parse_config
from gateway.connections import FrontServer
from gateway.daemon import client_roots, tls_context
from gateway.ingress import Ingress, still_federated
from gateway.view import View, refusal, rule_on
from identity import certs
from identity.errors import BadInput, NotVerified
from identity.keys import private_pem
from identity.names import SpiffeId, TrustDomain
from identity.records import ForeignBundle
from tests.unit.gateway.test_daemon import self_signed
from tests.unit.gateway.test_ingress import Backend

OTHER, THIRD, OWN = "other.example", "third.example", "edge.example"
WEB = f"spiffe://{OTHER}/wl/shop/web"
BOTH = """meshpolicy: 1
segments:
  - name: edge
    allow:
      - {id: partner-to-api, from: {role: partner}, to: {role: api}, on: [tcp/8080, tcp/8081], why: contract 7}
      - {id: theirs, from: spiffe://other.example/wl/shop/*, to: {role: api}, on: [tcp/8080, tcp/8082]}
"""
ACME = Caller(workload="partner/acme", federated=[f"spiffe://{OTHER}/wl/shop/*"])
ROUTE = Route(workload="shop/api", port=8080)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Authority]:
    now = time.time()
    names = {OTHER: OTHER, THIRD: THIRD, "pretender": OWN}
    return {k: Authority.create(tmp_path_factory.mktemp("other") / "ca", TrustDomain(n), now) for k, n in names.items()}


def federate(world: Any, name: str, authority: Authority | None, sequence: int = 1, roots: list[str] | None = None) -> None:
    own = [certs.pem(r) for r in authority.roots] if authority is not None else []
    record = ForeignBundle(
        trust_domain=OWN, foreign=name, sequence=sequence, roots=own if roots is None else roots, issued=int(time.time())
    )
    world.objects[f"federation/{name}"] = world.authority.sign_record(record)


def chain_of(authority: Authority, domain: str, name: str = "shop/web", change: Any = None) -> list[bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    now = time.time()
    spiffe_id = SpiffeId.workload(TrustDomain(domain), name)
    if change is None:
        pems = authority.issue_workload(certs.make_csr(key), spiffe_id, [], now)
        return [c.public_bytes(Encoding.DER) for c in certs.parse_chain(pems)]
    issuer = authority.intermediate
    builder = certs.build(certs.WORKLOAD, key=key.public_key(), trust_domain=TrustDomain(domain), spiffe_id=spiffe_id,
                          issuer=issuer, serial=1 << 130, now=now)  # fmt: skip
    # Signed past the linter, which would stop every one of these.
    leaf = change(builder).sign(authority.signer("intermediate")._key, hashes.SHA256())  # type: ignore[attr-defined]
    return [leaf.public_bytes(Encoding.DER), issuer.public_bytes(Encoding.DER)]


@pytest.fixture
def joined(world: Any, theirs: dict[str, Authority]) -> Any:
    federate(world, OTHER, theirs[OTHER])
    federate(world, THIRD, theirs[THIRD])
    world.policy(BOTH)
    return world


def who(view: View, chain: list[bytes], *callers: Caller, now: float | None = None) -> tuple[Proven | None, str | None]:
    notes: dict[str, Any] = {}
    found = identify(callers or (ACME,), chain, None, view.trust, now or time.time(), view.foreign, notes)
    return found, notes.get("refused")


def test_a_named_foreign_identity_is_its_stand_in(joined: Any, theirs: dict[str, Authority]) -> None:
    view = joined.view()
    found, why = who(view, chain_of(theirs[OTHER], OTHER))
    assert found is not None
    assert (found.caller, found.by, found.spiffe_id, why) == (ACME, "federated-id", WEB, None)
    with_root = [*chain_of(theirs[OTHER], OTHER), theirs[OTHER].root.public_bytes(Encoding.DER)]
    assert who(view, with_root)[0] is not None


def test_the_nearest_entry_decides(joined: Any, theirs: dict[str, Authority]) -> None:
    view = joined.view()
    wide = Caller(workload="partner/wide", federated=[f"spiffe://{OTHER}/*"])
    exact = Caller(workload="partner/exact", federated=[WEB])
    chain = chain_of(theirs[OTHER], OTHER)
    assert who(view, chain, wide, ACME, exact)[0].caller == exact  # type: ignore[union-attr]
    assert who(view, chain, wide, ACME)[0].caller == ACME  # type: ignore[union-attr]
    assert who(view, chain_of(theirs[OTHER], OTHER, "shopping"), wide, ACME)[0].caller == wide  # type: ignore[union-attr]


def test_who_is_not_federated_is_refused_for_the_right_reason(joined: Any, theirs: dict[str, Authority], world: Any) -> None:
    view = joined.view()
    assert who(view, chain_of(theirs[THIRD], THIRD)) == (None, "federation.caller")
    assert who(view, chain_of(theirs[OTHER], OTHER, "shopping")) == (None, "federation.caller")
    assert who(view, chain_of(theirs[OTHER], OTHER, "shop")) == (None, "federation.caller"), "/* is what lies below"
    assert who(view, chain_of(theirs["pretender"], OWN, "partner/acme")) == (None, "cert.untrusted"), "they write our name"
    assert who(view, chain_of(theirs[THIRD], OTHER, change=lambda b: b)) == (None, "cert.ca_name"), "a federated one writes another's"
    assert who(view, chain_of(theirs[OTHER], OTHER), now=time.time() + 86400)[1] == "cert.expired"
    assert who(view, chain_of(theirs[OTHER], OTHER)[:1])[1] == "cert.untrusted"
    assert who(view, chain_of(joined.authority, OWN, "partner/acme"))[0] is None, "our own are named by spiffe_id alone"
    del joined.objects[f"federation/{OTHER}"]
    assert who(joined.view(), chain_of(theirs[OTHER], OTHER)) == (None, "federation.unknown")


def test_bundles_that_are_over(joined: Any, theirs: dict[str, Authority]) -> None:
    chain = chain_of(theirs[OTHER], OTHER)
    assert who(joined.view(), chain, now=time.time() + 4000 * 86400)[1] == "federation.expired"
    federate(joined, OTHER, theirs[OTHER], 2, roots=[])
    assert who(joined.view(), chain) == (None, "federation.revoked")
    federate(joined, OTHER, theirs[THIRD], 3)
    assert who(joined.view(), chain)[1] == "cert.ca_name", "the roots of a third domain under this name"


def sans(*names: str) -> Any:
    def change(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        value = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(n) for n in names])
        kept = [x509.Extension(e.oid, e.critical, value) if e.oid == value.oid else e for e in builder._extensions]
        return x509.CertificateBuilder(
            builder._issuer_name, builder._subject_name, builder._public_key, builder._serial_number, builder._not_valid_before,
            builder._not_valid_after, kept,
        )  # fmt: skip

    return change


@pytest.mark.parametrize(("names", "code"), [
    ((WEB, f"spiffe://{OTHER}/wl/shop/api"), "cert.san"), ((WEB, WEB), "cert.san"), ((), "cert.san"),
    ((f"spiffe://{OTHER}/wl/shop/../web",), "cert.spiffe_id"), ((f"spiffe://{OTHER}/wl/shop%2fweb",), "cert.spiffe_id"),
    ((f"spiffe://{OTHER}/wl//shop/web",), "cert.spiffe_id"), ((WEB + "/",), "cert.spiffe_id"), ((f"spiffe://{OTHER}",), "cert.spiffe_id"),
    (("spiffe://OTHER.example/wl/shop/web",), "cert.spiffe_id"), (("spiffe://other.example.evil/wl/shop/web",), "federation.unknown"),
    (("spiffe://edge.example/wl/partner/acme",), "cert.ca_name"), ((f"spiffe://{THIRD}/wl/shop/web",), "cert.ca_name"),
])  # fmt: skip
def test_names_that_confuse(joined: Any, theirs: dict[str, Authority], names: tuple[str, ...], code: str) -> None:
    assert who(joined.view(), chain_of(theirs[OTHER], OTHER, change=sans(*names))) == (None, code)


def test_an_id_of_ours_is_never_foreign(joined: Any) -> None:
    view = joined.view()
    chain = [x509.load_der_x509_certificate(c) for c in chain_of(joined.authority, OWN, "partner/acme")]
    for given, code in ((chain, "federation.own"), ([], "chain.empty")):
        with pytest.raises(NotVerified) as refused:
            federation.verify(given, view.trust, view.foreign, time.time())
        assert refused.value.code == code


def test_policy_must_permit_the_identity_and_its_stand_in(joined: Any) -> None:
    view = joined.view()

    def ruled(port: int, name: str | None = WEB) -> tuple[str, str]:
        ruling = rule_on(view, ACME, Route(workload="shop/api", port=port), time.time(), name)
        return ruling.code, ruling.asked

    assert ruled(8080) == ("ok", WEB)
    assert ruled(8081) == ("policy", WEB), "the stand-in alone may"
    assert ruled(8081, None) == ("ok", "partner/acme")
    assert ruled(8082) == ("policy", "partner/acme"), "the foreign identity alone may"
    assert ruled(8080, f"spiffe://{OTHER}/wl/pay")[0] == "policy"
    denied = rule_on(view, ACME, Route(workload="shop/api", port=8081), time.time(), WEB)
    assert refusal(denied, ROUTE, view, full=True, spiffe_id=WEB)["caller"] == WEB
    gone = rule_on(view, ACME, Route(workload="shop/none", port=8080), time.time(), WEB)
    assert (gone.code, gone.asked) == ("unknown", WEB)
    assert rule_on(view, ACME, ROUTE, time.time(), WEB).rule == "theirs"


def test_an_open_exchange_ends_with_the_federation(joined: Any, theirs: dict[str, Authority]) -> None:
    view = joined.view()
    found, _ = who(view, chain_of(theirs[OTHER], OTHER))
    assert found is not None
    assert still_federated(view, found, time.time())
    assert still_federated(view, Proven(ACME, "token", True), time.time())
    assert not still_federated(view, found, time.time() + 86400)
    del joined.objects[f"federation/{OTHER}"]
    assert not still_federated(joined.view(view), found, time.time())


def test_bundles_are_signed_named_and_never_older(joined: Any, theirs: dict[str, Authority]) -> None:
    federate(joined, OTHER, theirs[OTHER], 5)
    view = joined.view()
    good = joined.objects[f"federation/{OTHER}"]

    def refused() -> str:
        with pytest.raises(NotVerified) as error:
            joined.view(view)
        return error.value.code

    federate(joined, OTHER, theirs[OTHER], 4)
    assert refused() == "federation.sequence"
    joined.objects[f"federation/{OTHER}"] = joined.objects[f"federation/{THIRD}"]
    assert refused() == "record.key"
    joined.objects[f"federation/{OTHER}"] = good[:-4] + "AAAA"
    assert refused() == "record.signature"
    joined.objects[f"federation/{OTHER}"] = good
    federate(joined, OWN, theirs["pretender"])
    assert refused() == "federation.own"
    del joined.objects[f"federation/{OWN}"]
    del joined.objects[f"federation/{OTHER}"]
    without = joined.view(view)
    assert set(without.foreign) == {THIRD}
    federate(joined, OTHER, theirs[OTHER], 4)
    with pytest.raises(NotVerified):
        joined.view(without)  # removed and come back older


def test_each_listener_knows_one_trust_domain(joined: Any, theirs: dict[str, Authority]) -> None:
    view = joined.view()
    tls: dict[str, Any] = {"address": "127.0.0.1:0", "certificate": Path("a"), "key": Path("b")}
    assert client_roots(Listen(**tls), view) == view.trust.roots_pem()
    assert client_roots(Listen(**tls, federation=OTHER), view) == certs.pem(theirs[OTHER].root)
    assert client_roots(Listen(**tls, federation="unknown.example"), view) == ""


async def test_over_tls(joined: Any, theirs: dict[str, Authority], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A caller of another trust domain reaches the workload from its stand-in's address, until the federation ends."""
    caplog.set_level(logging.INFO, logger="retinue.gateway.access")
    self_signed(tmp_path, "server")
    backend = Backend()
    runner = await backend.start()
    joined.policy(BOTH.replace("8080", str(backend.port)))
    listen = Listen(address="127.0.0.1:0", certificate=tmp_path / "server.pem", key=tmp_path / "server.key", federation=OTHER)
    ingress = Ingress(Config(
        listen=[listen], caller=[ACME], route=[Route(workload="shop/api", port=backend.port, family="ipv4")], explain="brief"
    ))  # fmt: skip
    ingress.update(joined.view())
    assert ingress.view is not None
    server = FrontServer(ingress.handle, ingress.config.limits)

    async def serve() -> tuple[asyncio.Server, str]:
        made = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, ssl=tls_context(listen, ingress.view))
        return made, f"https://127.0.0.1:{made.sockets[0].getsockname()[1]}/"

    def client(authority: Authority, domain: str) -> aiohttp.ClientSession:
        key = ec.generate_private_key(ec.SECP256R1())
        chain = authority.issue_workload(certs.make_csr(key), SpiffeId.workload(TrustDomain(domain), "shop/web"), [], time.time())
        (tmp_path / "chain.pem").write_text("".join(chain))
        (tmp_path / "key.pem").write_bytes(private_pem(key))
        context = ssl.create_default_context(cafile=str(tmp_path / "server.pem"))
        context.check_hostname = False
        context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context))

    listener, url = await serve()
    try:
        async with client(theirs[OTHER], OTHER) as one:
            async with one.get(url) as answer:
                said = await answer.json()
                assert (answer.status, said["source"]) == (200, "127.0.0.31")
                assert said["headers"]["X-Retinue-Caller"] == WEB
                assert said["headers"]["X-Retinue-Caller-Proof"] == "federated-id"
            for stranger, domain in (("pretender", OWN), (THIRD, THIRD)):
                async with client(theirs[stranger], domain) as two:
                    with pytest.raises(aiohttp.ClientError):
                        await two.get(url)
            async with client(joined.authority, OWN) as own:
                with pytest.raises(aiohttp.ClientError):
                    await own.get(url)  # this listener knows one trust domain, and that is not ours
            del joined.objects[f"federation/{OTHER}"]
            ingress.update(joined.view(ingress.view))
            async with one.get(url) as answer:  # the connection that was made before
                assert answer.status == 401
        listener.close()
        listener, url = await serve()
        async with client(theirs[OTHER], OTHER) as late:
            with pytest.raises(aiohttp.ClientError):
                await late.get(url)
    finally:
        listener.close()
        await ingress.close()
        await server.shutdown(0.1)
        await runner.cleanup()
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "retinue.gateway.access"]
    assert [(x["foreign"], x["caller"], x.get("refused")) for x in lines] == [(WEB, "partner/acme", None), (None, None, "federation.unknown")]


HEAD = '[[listen]]\naddress = "127.0.0.1:1"\n'
TAIL = '[[route]]\nworkload = "a"\nport = 1\n'


@pytest.mark.parametrize(("listen", "caller"), [
    ('plaintext = true\nfederation = "other.example"', ""),
    ('certificate = "a"\nkey = "b"\nclient_ca = ["c"]\nfederation = "other.example"', ""),
    ('certificate = "a"\nkey = "b"\nfederation = "Other"', ""),
    ("plaintext = true", 'federated = ["spiffe://other.example"]'), ("plaintext = true", 'federated = ["spiffe://other.example/*/a"]'),
    ("plaintext = true", f'federated = ["{WEB}", "{WEB}"]'), ("plaintext = true", ""),
])  # fmt: skip
def test_configurations_that_are_refused(listen: str, caller: str) -> None:
    text = f'{HEAD}{listen}\n[[caller]]\nworkload = "a"\n{caller}\n{TAIL}'
    if not caller and listen != "plaintext = true":
        text = f"{HEAD}{listen}\n{TAIL}"
    with pytest.raises(BadInput):
        parse_config(text)


def test_a_configuration_of_a_federation() -> None:
    config: Config = parse_config(
        f'{HEAD}certificate = "a"\nkey = "b"\nfederation = "{OTHER}"\n[[caller]]\nworkload = "a"\nfederated = ["{WEB}"]\n{TAIL}'
    )
    assert config.listen[0].federation == OTHER
    assert config.caller[0].federated == [WEB]
