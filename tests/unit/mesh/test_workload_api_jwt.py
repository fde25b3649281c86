"""The JWT profile of the Workload API: a plain client, the outside one, and tokens that were tampered with."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

import jwt as second
import pytest
from grpclib.client import UnaryStreamMethod, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from identity.errors import Refused
from identity.keys import b64
from mesh import svid_files
from mesh.jwt_svid import JwtSvids
from tests.unit.mesh.test_workload_proto import outside
from tests.unit.mesh.workload_rig import CART, HEADER, JwtIssuer, moved, refused, tell


@pytest.fixture
def tokens(live, agent, tmp_path):
    made = JwtIssuer(live, tmp_path / "jwt")
    agent.jwts = JwtSvids(made, lambda: agent.uplink.trust, time.time)
    made.publish(agent)
    return made


async def call(channel, name, message, reply):
    method = UnaryUnaryMethod(channel, f"/SpiffeWorkloadAPI/{name}", bytes, reply)
    async with asyncio.timeout(10):
        return await method(message.SerializeToString(), metadata=HEADER)


async def fetch(channel, *audience, spiffe_id=""):
    request = outside().JWTSVIDRequest(audience=audience, spiffe_id=spiffe_id)
    return await call(channel, "FetchJWTSVID", request, outside().JWTSVIDResponse)


async def validate(channel, audience, token):
    request = outside().ValidateJWTSVIDRequest(audience=audience, svid=token)
    return await call(channel, "ValidateJWTSVID", request, outside().ValidateJWTSVIDResponse)


async def test_a_token_is_for_the_caller_and_its_audiences(channel, tokens):
    answer = await fetch(channel, "db", "cache")
    (svid,) = answer.svids
    assert (svid.spiffe_id, svid.hint) == (CART, "cart/0")
    claims = second.decode(svid.svid, options={"verify_signature": False})
    assert (claims["sub"], claims["aud"]) == (CART, ["db", "cache"])
    assert 0 < claims["exp"] - claims["iat"] <= 300
    assert (await fetch(channel, "db", "cache")).svids[0].svid == svid.svid
    assert tokens.count == 1
    assert (await fetch(channel, "cache")).svids[0].svid != svid.svid
    assert (await fetch(channel, "db", spiffe_id=CART)).svids[0].spiffe_id == CART


async def test_a_token_validates_for_its_audience_only(channel, tokens):
    token = (await fetch(channel, "db")).svids[0].svid
    answer = await validate(channel, "db", token)
    assert answer.spiffe_id == CART
    assert answer.claims["sub"] == CART
    assert list(answer.claims["aud"]) == ["db"]
    for audience, text in (("cache", token), ("db", token[:-4] + "AAAA"), ("db", ""), ("", token)):
        with pytest.raises(GRPCError) as caught:
            await validate(channel, audience, text)
        assert caught.value.status is Status.INVALID_ARGUMENT


async def test_keys_are_published_and_followed(channel, tokens, api, agent):
    method = UnaryStreamMethod(channel, "/SpiffeWorkloadAPI/FetchJWTBundles", bytes, outside().JWTBundlesResponse)
    async with asyncio.timeout(10), method.open(metadata=HEADER) as stream:
        await stream.send_message(b"", end=True)
        first = json.loads((await stream.recv_message()).bundles["spiffe://test.example"])
        (key,) = first["keys"]
        assert (key["kty"], key["crv"], key["use"]) == ("EC", "P-256", "jwt-svid")
        tokens.keys.maintain(time.time() + 25 * 86400)
        tokens.publish(agent)
        api.ring()
        second_set = json.loads((await stream.recv_message()).bundles["spiffe://test.example"])
        assert second_set["keys"][0] == key
        assert len(second_set["keys"]) == 2
        await stream.cancel()


@pytest.mark.parametrize("name", ["FetchJWTSVID", "ValidateJWTSVID"])
async def test_the_header_is_asked_for(channel, tokens, name):
    method = UnaryUnaryMethod(channel, f"/SpiffeWorkloadAPI/{name}", bytes, None)
    assert (await refused(method.open()))[0] is Status.INVALID_ARGUMENT
    assert (await refused(method.open(metadata=HEADER), b"\x0a\x01\xff"))[0] is Status.INVALID_ARGUMENT
    assert (await refused(method.open(metadata=HEADER), b"\x08\x01"))[0] is Status.INVALID_ARGUMENT


async def test_no_audience_another_identity_and_a_moved_one(channel, tokens, agent, live):
    for audience, spiffe_id, status in (
        ([], "", Status.INVALID_ARGUMENT), ([""], "", Status.INVALID_ARGUMENT), (["db\n"], "", Status.INVALID_ARGUMENT),
        (["a"] * 40 + [str(n) for n in range(40)], "", Status.INVALID_ARGUMENT),
        (["db"], "spiffe://test.example/wl/web", Status.PERMISSION_DENIED), (["db"], "nonsense", Status.PERMISSION_DENIED),
    ):  # fmt: skip
        with pytest.raises(GRPCError) as caught:
            await fetch(channel, *audience, spiffe_id=spiffe_id)
        assert caught.value.status is status
    assert tokens.count == 0
    token = (await fetch(channel, "db")).svids[0].svid
    await moved(agent, live)
    assert agent.jwts._held == {}
    for ask in (fetch(channel, "db"), validate(channel, "db", token)):
        with pytest.raises(GRPCError) as caught:
            await ask
        assert caught.value.status is Status.PERMISSION_DENIED


async def test_what_the_ca_sends_is_checked(channel, tokens, live):
    other = tokens.keys.sign(_id("web"), ["db"], live.now)[0]
    for spoiled in (other, "not a token", tokens.keys.sign(_id("cart"), ["cache"], live.now)[0]):
        tokens.spoil = spoiled
        with pytest.raises(GRPCError) as caught:
            await fetch(channel, "db")
        assert caught.value.status is Status.UNAVAILABLE
    tokens.spoil, tokens.fail = None, Refused("svid.not_here", "cart/0 is not placed on cart-sidecar-1")
    with pytest.raises(GRPCError) as caught:
        await fetch(channel, "db")
    assert caught.value.status is Status.PERMISSION_DENIED


def _id(name):
    from identity.names import SpiffeId, TrustDomain

    return SpiffeId.workload(TrustDomain("test.example"), name)


async def test_a_token_whose_key_is_gone_is_asked_for_again(channel, tokens, agent, live, tmp_path):
    first = (await fetch(channel, "db")).svids[0].svid
    other = JwtIssuer(live, tmp_path / "other")
    agent.jwts._ask = other
    other.publish(agent)
    again = (await fetch(channel, "db")).svids[0].svid
    assert again != first
    with pytest.raises(GRPCError):
        await validate(channel, "db", first)
    assert (await validate(channel, "db", again)).spiffe_id == CART


async def test_tokens_that_were_made_by_others(channel, tokens, agent, live):
    """alg none, HMAC with the public key, another key under the same kid, another trust domain, a web page's audience."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from identity.jwt import public_key

    kid = tokens.keys.published()[0].kid
    public = public_key(tokens.keys.published()[0])
    claims = {"sub": CART, "aud": ["db"], "exp": int(live.now) + 60, "iat": int(live.now)}
    mine = ec.generate_private_key(ec.SECP256R1())
    raw = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    real = (await fetch(channel, "db")).svids[0].svid
    head, body, _ = real.split(".")
    bad = [
        second.encode(claims, None, "none", {"kid": kid}),
        second.encode(claims, raw.ljust(64, b"x"), "HS256", {"kid": kid}),
        second.encode(claims, mine, "ES256", {"kid": kid}),
        second.encode(claims, mine, "ES256", {"kid": "mine", "jwk": {"kty": "EC"}}),
        second.encode(claims | {"sub": "spiffe://other.example/wl/cart"}, mine, "ES256", {"kid": kid}),
        f"{head}.{body}.",
        ".".join((b64(b'{"alg":"none"}'), body, "")),
    ]
    for token in bad:
        with pytest.raises(GRPCError) as caught:
            await validate(channel, "db", token)
        assert caught.value.status is Status.INVALID_ARGUMENT


CLIENT = """
import sys
from spiffe import WorkloadApiClient
from spiffe.svid.jwt_svid import JwtSvid

with WorkloadApiClient() as client:
    svid = client.fetch_jwt_svid({"db"}, timeout=20)
    print(svid.spiffe_id, sorted(svid.audience), flush=True)
    bundles = client.fetch_jwt_bundles(timeout=20)
    bundle = bundles.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    print(JwtSvid.parse_and_validate(svid.token, bundle, {"db"}).spiffe_id, flush=True)
    print(client.validate_jwt_svid(svid.token, "db", timeout=20).spiffe_id, flush=True)
    try:
        client.validate_jwt_svid(svid.token, "other", timeout=20)
    except Exception as e:
        print(type(e).__name__, flush=True)
"""


async def test_the_outside_client_fetches_and_validates(api, agent, tokens):
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | svid_files.api_environment(agent.config.run_dir) | {"GRPC_VERBOSITY": "NONE"},
    )  # fmt: skip
    async with asyncio.timeout(60):
        said, wrong = await client.communicate()
    lines = said.decode().splitlines()
    assert lines == [f"{CART} ['db']", CART, CART, "ValidateJwtSvidError"], wrong.decode()[-2000:]


async def test_an_end_is_pushed_as_permission_denied(channel, agent, live, tokens):
    """An identity whose end comes loses its stream by the signed clock, without another word of the CA."""
    own = agent.enrollment.record.tunnel_key
    ending = live.placement(
        "cart", "cart-sidecar-1", epoch=2, index=7, labels={"role": "web"}, tunnel_key=own, ends=live.time + 1
    )
    await tell(agent, live.delta({"placement/cart/0": ending}))
    with pytest.raises(GRPCError) as caught:
        await fetch(channel, "db")
    assert caught.value.status is Status.PERMISSION_DENIED
    assert agent.in_force.view.ended == {"cart/0"}
