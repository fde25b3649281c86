"""Enrolment end to end over real TLS: the client of mesh/enroll.py against the authority and admission of ca/."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import stat
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ca.authority import Authority
from ca.enroll import Challenges, JoinTokenAttestor, TokenRow, admit
from identity import certs
from identity.enrollment import JoinToken
from identity.errors import BadInput, BadState, Conflict, NotVerified, Refused, RetinueError, Unreachable
from identity.keys import b64, private_pem, write_file
from identity.names import SpiffeId, TrustDomain
from identity.records import EndpointRecord
from identity.wire import parse
from identity.wire.enroll import ChallengeRequest, EnrollReply, EnrollRequest, RenewReply, RenewRequest
from mesh import enroll as joining
from mesh.enroll import check_underlay, enroll, load_enrollment, renew

NOW = 1_800_000_000
TD = TrustDomain("prod.example")


@dataclass
class Desk:
    """The smallest CA that enrols: real authority, real admission, tokens in a dict, real TLS."""

    authority: Authority
    now: int = NOW
    tokens: dict[str, TokenRow] = field(default_factory=dict)
    challenges: Challenges = field(default_factory=Challenges)
    generation: int = 0
    asked: list[str] = field(default_factory=list)
    lose: int = 0  # replies to lose after the token was claimed
    spoil: dict[str, object] = field(default_factory=dict)  # fields of the reply to replace
    url: str = ""

    def token(self, endpoint: str = "web-1", ttl: int = 600, **more) -> JoinToken:
        made = JoinToken(f"t{len(self.tokens)}", os.urandom(32), self.authority.root_fingerprint)
        self.tokens[made.id] = TokenRow(made.id, made.public_key, endpoint, "host", self.now + ttl, **more)
        return made

    def record(self, endpoint: str, tunnel_key: str, underlay: list[str], ciphers: list) -> str:
        self.generation += 1
        return self.authority.sign_record(
            EndpointRecord(
                trust_domain=TD.name, endpoint=endpoint, kind="host", tunnel_key=tunnel_key, underlay=underlay,
                ciphers=ciphers, generation=self.generation, issued=self.now, expires=self.now + 86400,
            )
        )  # fmt: skip

    async def challenge(self, request: web.Request) -> web.Response:
        self.asked.append("challenge")
        body = parse(ChallengeRequest, await request.read())
        made = self.challenges.issue(body.token_id, self.authority.server_chain(self.now).leaf_der, self.now)
        return web.Response(body=made.to_wire(self.now).model_dump_json(), content_type="application/json")

    async def enroll(self, request: web.Request) -> web.StreamResponse:
        self.asked.append("enroll")
        body = parse(EnrollRequest, await request.read())
        row = self.tokens.get(body.token_id)
        try:
            admitted = admit(body, self.challenges.take(body.nonce, self.now), JoinTokenAttestor(row), self.now)
        except RetinueError as e:
            return web.json_response(e.as_dict(), status=e.http)
        if not admitted.again:
            self.tokens[row.id] = replace(
                row, used_at=self.now, enroll_key=admitted.enroll_key, tunnel_key=admitted.tunnel_key
            )
        if self.lose:
            self.lose -= 1
            request.transport.abort()
            return web.Response()
        name = SpiffeId.endpoint(TD, admitted.endpoint, admitted.kind)
        reply = EnrollReply(
            trust_domain=TD.name, endpoint=admitted.endpoint, kind=admitted.kind, workload=admitted.workload,
            chain=self.authority.issue_endpoint(admitted.csr, name, self.now), bundle=self.authority.bundle(1, self.now),
            record=self.record(admitted.endpoint, b64(admitted.tunnel_key), [*admitted.underlay], [*admitted.ciphers]),
        )  # fmt: skip
        return web.Response(body=reply.model_copy(update=self.spoil).model_dump_json(), content_type="application/json")

    async def renew(self, request: web.Request) -> web.Response:
        chain = request.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        bundle = self.authority.trust_bundle(1, self.now)
        svid = bundle.verify_svid([*certs.parse_der_chain([chain]), self.authority.intermediate], self.now)
        body = parse(RenewRequest, await request.read())
        tunnel = self.spoil.get("tunnel") or b64(next(t.tunnel_key for t in self.tokens.values() if t.tunnel_key))
        reply = RenewReply(
            chain=self.authority.issue_endpoint(body.csr, svid.spiffe_id, self.now),
            bundle=self.authority.bundle(2, self.now),
            record=self.record(svid.spiffe_id.name, tunnel, body.underlay, body.ciphers),
        )
        return web.Response(body=reply.model_dump_json(), content_type="application/json")

    @asynccontextmanager
    async def serve(self):
        server = self.authority.server_chain(self.now)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(server.certificate, server.key)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=certs.pem(self.authority.root))
        # The certificates of these tests live in their own time; the SVID is verified above, at that time.
        context.verify_flags |= ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME
        app = web.Application()
        app.router.add_post("/v1/enroll/challenge", self.challenge)
        app.router.add_post("/v1/enroll", self.enroll)
        app.router.add_post("/v1/renew", self.renew)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self.url = f"https://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def join(self, directory: Path, token: JoinToken | str | None = None, **more):
        text = token if isinstance(token, str) else (token or self.token()).format()
        return await enroll(
            self.url, text, directory, ["192.0.2.1:51820"], ["aes-256-gcm"], clock=lambda: self.now, **more
        )


@pytest.fixture
async def desk(tmp_path):
    async with Desk(Authority.create(tmp_path / "ca", TD, NOW)).serve() as made:
        yield made


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "state"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file() and p.name != ".enroll.lock"}


# -- joining ----------------------------------------------------------------------------------------------------------


async def test_a_host_enrols_and_everything_it_holds_fits_together(desk, home):
    made = await desk.join(home)
    assert (made.endpoint, made.kind, str(made.spiffe_id)) == ("web-1", "host", "spiffe://prod.example/host/web-1")
    assert made.trust_domain == TD
    assert made.ca_url == desk.url
    assert made.record.tunnel_key == made.tunnel_public
    assert made.record.underlay == ["192.0.2.1:51820"]
    assert made.record.ciphers == ["aes-256-gcm"]
    assert made.svid.not_after == NOW + 86400
    assert made.root_fingerprint == desk.authority.root_fingerprint
    again = load_enrollment(home)
    assert again.svid.leaf == made.svid.leaf
    assert again.record_envelope == made.record_envelope
    assert set(snapshot(home)) == set(joining.FILES), "nothing else stays: no attempt, no staging"
    for path in home.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


async def test_secrets_are_in_no_repr_and_the_token_is_in_no_file(desk, home):
    token = desk.token()
    made = await desk.join(home, token)
    secret = b64(token.secret)
    assert secret not in repr(token)
    assert secret not in str(token)
    assert secret in token.format()
    assert "PRIVATE" not in repr(made)
    assert "tunnel_key=<" not in repr(made)
    assert all(secret.encode() not in data for data in snapshot(home).values())


async def test_a_token_works_once(desk, home, tmp_path):
    token = desk.token()
    await desk.join(home, token)
    with pytest.raises(Conflict) as e:
        await desk.join(tmp_path / "other", token)
    assert e.value.code == "token.used"
    assert not (tmp_path / "other" / "endpoint.json").exists()


async def test_bad_tokens_get_their_answer(desk, home):
    expired, forged = desk.token(ttl=0), replace(desk.token(), secret=os.urandom(32))
    unknown = JoinToken("nobody", os.urandom(32), desk.authority.root_fingerprint)
    for token, code in ((expired, "token.expired"), (forged, "token.refused"), (unknown, "token.refused")):
        with pytest.raises(Refused) as e:
            await desk.join(home, token)
        assert e.value.code == code
        assert not (home / "endpoint.json").exists()


async def test_malformed_input_is_refused_before_anything_is_made(desk, home):
    for text in ("", "rt1", "rt2.a.b.c", desk.token().format()[:-1], "x" * 5000):
        with pytest.raises(BadInput) as e:
            await desk.join(home, text)
        assert e.value.code == "token.malformed"
    with pytest.raises(BadInput) as e:
        await enroll("http://127.0.0.1:1", desk.token().format(), home, [], [])
    assert e.value.code == "ca.url"
    with pytest.raises(BadInput) as e:
        await enroll(desk.url, desk.token().format(), home, ["nowhere"], [])
    assert e.value.code == "underlay.form"
    assert not home.exists()
    assert desk.asked == []


async def test_a_wrong_fingerprint_stops_before_anything_is_sent(desk, home):
    token = replace(desk.token(), root_fingerprint="0" * 64)
    with pytest.raises(NotVerified) as e:
        await desk.join(home, token)
    assert e.value.code == "ca.fingerprint"
    assert desk.asked == []
    with pytest.raises(Unreachable) as missing:
        load_enrollment(home)
    assert (missing.value.code, missing.value.exit) == ("enroll.missing", 3)


async def test_an_enrolment_is_not_overwritten_by_accident(desk, home):
    first = await desk.join(home)
    before = snapshot(home)
    with pytest.raises(Conflict) as e:
        await desk.join(home)
    assert e.value.code == "enroll.exists"
    assert snapshot(home) == before
    second = await desk.join(home, desk.token("web-2"), replace=True)
    assert second.endpoint == "web-2"
    assert second.tunnel_public != first.tunnel_public


async def test_a_failed_replacement_leaves_the_old_enrolment(desk, home):
    await desk.join(home)
    before = snapshot(home)
    with pytest.raises(Refused):
        await desk.join(home, desk.token(ttl=0), replace=True)
    assert snapshot(home) == before
    assert load_enrollment(home).endpoint == "web-1"


async def test_a_lost_reply_is_fetched_again_at_once(desk, home):
    desk.lose = 1
    made = await desk.join(home)
    assert desk.asked == ["challenge", "enroll", "challenge", "enroll"]
    assert made.endpoint == "web-1"


async def test_a_lost_reply_is_fetched_again_by_a_later_run_with_the_same_keys(desk, home):
    desk.lose = 2
    token = desk.token()
    with pytest.raises(Unreachable) as e:
        await desk.join(home, token)
    assert e.value.code == "ca.disconnected"
    claimed = desk.tokens[token.id].tunnel_key
    made = await desk.join(home, token)
    assert made.tunnel_public == b64(claimed)
    assert not (home / ".pending").exists()


async def test_a_lost_reply_is_not_for_another_machine_nor_for_ever(desk, home, tmp_path):
    desk.lose = 2
    token = desk.token()
    with pytest.raises(Unreachable):
        await desk.join(home, token)
    with pytest.raises(Conflict) as e:
        await desk.join(tmp_path / "thief", token)
    assert e.value.code == "token.used"
    desk.now += 301
    with pytest.raises(Conflict):
        await desk.join(home, token)


async def test_torn_keys_of_an_attempt_are_made_anew(desk, home):
    desk.lose = 2
    token = desk.token()
    with pytest.raises(Unreachable):
        await desk.join(home, token)
    (home / ".pending" / "tunnel.key").write_bytes(b"torn")
    with pytest.raises(Conflict):  # other keys: the CA sees another machine
        await desk.join(home, token)


async def test_only_one_enrolment_at_a_time(desk, home):
    joining._make_dir(home)
    with joining._sole(home), pytest.raises(Conflict) as e:
        await desk.join(home)
    assert e.value.code == "enroll.running"


async def test_a_directory_others_can_enter_is_refused(desk, home):
    home.mkdir(mode=0o755)
    with pytest.raises(BadState) as e:
        await desk.join(home)
    assert e.value.code == "state.mode"
    home.rmdir()
    home.write_text("a file")
    with pytest.raises(BadState) as e:
        await desk.join(home)
    assert e.value.code == "state.dir"


async def test_every_part_of_the_reply_is_verified(desk, home, tmp_path):
    other = Authority.create(tmp_path / "ca2", TD, NOW)
    stranger = ec.generate_private_key(ec.SECP256R1())
    name = SpiffeId.endpoint(TD, "web-1")
    theirs = b64(bytes(31) + b"\x40")
    lies = {
        "trust_domain": ("evil.example", "enroll.reply"),
        "endpoint": ("web-9", "svid.name"),
        "kind": ("sidecar", "svid.name"),
        "bundle": (other.bundle(1, NOW), "bundle.root"),
        "chain": (desk.authority.issue_endpoint(certs.make_csr(stranger), name, NOW), "enroll.foreign_key"),
        "record": (desk.record("web-1", theirs, [], []), "enroll.foreign_record"),
    }
    for part, (value, code) in lies.items():
        desk.spoil = {part: value}
        with pytest.raises(NotVerified) as e:
            await desk.join(home)
        assert e.value.code == code, part
        assert not (home / "endpoint.json").exists()
    desk.spoil = {"record": desk.record("web-7", theirs, [], [])}
    with pytest.raises(NotVerified) as e:
        await desk.join(home)
    assert e.value.code == "enroll.foreign_record"
    desk.spoil = {"chain": other.issue_endpoint(certs.make_csr(stranger), name, NOW)}
    with pytest.raises(NotVerified) as e:
        await desk.join(home)
    assert e.value.code == "cert.untrusted"


# -- renewal ----------------------------------------------------------------------------------------------------------


async def test_renewal_changes_certificate_and_tls_key_only(desk, home):
    old = await desk.join(home)
    desk.now += 43200
    new = await renew(old, ["[2001:db8::1]:51820"], ["chacha20poly1305"], clock=lambda: desk.now)
    assert new.svid.not_after == old.svid.not_after + 43200
    assert certs.spki(new.svid.public_key) != certs.spki(old.svid.public_key)
    assert new.tunnel_public == old.tunnel_public
    assert new.bundle.sequence == 2
    assert new.record.underlay == ["[2001:db8::1]:51820"]
    async with new.client(clock=lambda: desk.now) as client:
        third = await renew(new, [], [], client=client, bundle=new.bundle, clock=lambda: desk.now)
    assert third.record.generation == 3


async def test_a_bad_renewal_leaves_the_old_state(desk, home):
    old = await desk.join(home)
    before = snapshot(home)
    desk.spoil = {"tunnel": b64(bytes(31) + b"\x40")}
    with pytest.raises(NotVerified):
        await renew(old, [], [], clock=lambda: desk.now)
    after = snapshot(home)
    assert after.pop(".renewing.key")  # a lost reply is asked for again with the same key
    assert after == before


async def test_an_expired_enrolment_still_loads(desk, home):
    await desk.join(home)
    assert load_enrollment(home).svid.not_after < NOW + 10 * 86400  # no clock is asked


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", joining.FILES)
@pytest.mark.parametrize("how", ["gone", "empty", "half", "flipped", "readable", "foreign", "binary"])
async def test_damaged_files_are_named_and_nothing_is_used(desk, home, tmp_path, name, how):
    await desk.join(home)
    path = home / name
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "readable":
        path.chmod(0o644)
    elif how == "foreign":
        async with Desk(Authority.create(tmp_path / "ca2", TD, NOW)).serve() as other:
            await other.join(tmp_path / "b", other.token("web-2"))
        write_file(path, (tmp_path / "b" / name).read_bytes(), 0o600)
    else:
        middle = len(data) // 2
        changed = {
            "empty": b"", "half": data[:middle], "binary": data[:middle] + b"\xff\xfe" + data[middle:],
            "flipped": data[:middle] + (b"A" if data[middle : middle + 1] != b"A" else b"B") + data[middle + 1 :],
        }  # fmt: skip
        path.write_bytes(changed[how])
    with pytest.raises(BadState) as e:
        load_enrollment(home)
    assert e.value.exit == 78
    assert e.value.code.startswith("state.")
    assert e.value.hint
    assert "PRIVATE" not in e.value.message


async def test_a_key_of_another_kind_is_refused(desk, home):
    await desk.join(home)
    for key in (Ed25519PrivateKey.generate(), X25519PrivateKey.generate()):
        write_file(home / "tls.key", private_pem(key), 0o600)
        with pytest.raises(BadState) as e:
            load_enrollment(home)
        assert e.value.code == "state.key"


@pytest.mark.parametrize("field_", ["ca_url", "endpoint", "trust_domain", "root_fingerprint", "verified_at", "kind", "seal"])
async def test_an_edited_endpoint_file_is_noticed(desk, home, field_):
    await desk.join(home)
    about = json.loads((home / "endpoint.json").read_bytes())
    about[field_] = {
        "ca_url": "https://evil.example:1", "endpoint": "web-2", "trust_domain": "evil.example",
        "root_fingerprint": "0" * 64, "verified_at": NOW + 1, "kind": "sidecar", "seal": "A" * 86,
    }[field_]  # fmt: skip
    (home / "endpoint.json").write_text(json.dumps(about))
    with pytest.raises(BadState) as e:
        load_enrollment(home)
    assert e.value.code == "state.altered"


async def test_a_link_in_place_of_a_file_is_refused(desk, home, tmp_path):
    await desk.join(home)
    (tmp_path / "elsewhere").write_bytes((home / "tls.key").read_bytes())
    (home / "tls.key").unlink()
    (home / "tls.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadState):
        load_enrollment(home)


# -- crashes ----------------------------------------------------------------------------------------------------------


def _die_at(step: int) -> None:
    """Let this process end, without any clean-up, at the step-th change of the file system."""
    left = step

    def deadly(real):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return real(*args, **kwargs)

        return call

    for name in ("rename", "fsync", "mkdir", "rmdir", "unlink", "fchmod"):
        setattr(os, name, deadly(getattr(os, name)))


async def test_a_crash_at_any_step_leaves_the_old_enrolment_or_the_new_one(desk, home, tmp_path):
    await desk.join(home)
    old = {n: (home / n).read_bytes() for n in joining.FILES}
    await desk.join(tmp_path / "b", desk.token("web-2"))
    new = {n: (tmp_path / "b" / n).read_bytes() for n in joining.FILES}
    seen = set()
    for step in range(200):
        for name, data in old.items():
            write_file(home / name, data, 0o600)
        child = os.fork()
        if child == 0:
            _die_at(step)
            joining._commit(home, new)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222 - the child never waits for us
        found = load_enrollment(home).endpoint
        held = {n: (home / n).read_bytes() for n in joining.FILES}
        assert held == (old if found == "web-1" else new), f"a mixture at step {step}"
        assert not (home / ".next").exists()
        seen.add(found)
        if status == 0:
            break
    else:
        pytest.fail("the commit never completed")
    assert seen == {"web-1", "web-2"}, "the positive control: both outcomes occur"
    assert step > 20


# -- underlay hints ---------------------------------------------------------------------------------------------------


def test_underlay_hints_have_one_form():
    assert check_underlay(["192.0.2.1:51820", "[2001:DB8:0::1]:7"]) == ["192.0.2.1:51820", "[2001:db8::1]:7"]


@pytest.mark.parametrize(
    "hint",
    ["", "a:1", "192.0.2.1", "192.0.2.1:0", "192.0.2.1:65536", "2001:db8::1:7", "[192.0.2.1]:7", "192.0.2.1:+7",
     "0.0.0.0:7", "[::]:7", "192.0.2.1:7:8", "[2001:db8::1:7", "192.0.2.1:\u0667",
     "[fe80::1%eth0]:7", "224.0.0.1:7"],
)  # fmt: skip
def test_bad_underlay_hints_are_refused(hint):
    with pytest.raises(BadInput) as e:
        check_underlay([hint])
    assert e.value.code == "underlay.form"


def test_too_many_underlay_hints():
    with pytest.raises(BadInput):
        check_underlay(["192.0.2.1:1"] * 17)


async def test_concurrent_readers_never_see_a_mixture(desk, home):
    made = await desk.join(home)
    for _ in range(5):
        desk.now += 60
        made, *_ = await asyncio.gather(
            renew(made, [], [], clock=lambda: desk.now), *(asyncio.to_thread(load_enrollment, home) for _ in range(4))
        )
