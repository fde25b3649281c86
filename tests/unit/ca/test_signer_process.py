"""The signer process: the authority works through it, and who has the API process gets no more than its own work done."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ca import rotation, signer_process
from ca.authority import Authority
from ca.jwt_authority import AFTER, DAY, JwtAuthority
from ca.keystores import KeyPlace, RemoteSigner, SignerClient, key_place, open_keys
from ca.signer_process import SignerDesk
from identity import certs, jwt, records
from identity.errors import BadInput, BadState, Bug, NoPrivilege, Refused, RetinueError, Unreachable
from identity.names import SpiffeId, TrustDomain
from identity.records import Heartbeat, PolicyRecord

NOW = 1_800_000_000
TD = TrustDomain("prod.example")
HOST = SpiffeId.endpoint(TD, "web-1")


def csr() -> str:
    return certs.make_csr(ec.generate_private_key(ec.SECP256R1()))


class Rig:
    def __init__(self, base: Path) -> None:
        self.keys, self.socket, self.ca = base / "signer", base / "signer.sock", base / "ca"
        self.start(frozenset({os.geteuid()}))

    def start(self, uids: frozenset[int]) -> None:
        self.server = signer_process.serve(self.keys, self.socket, TD, uids)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def place(self) -> KeyPlace:
        return KeyPlace(backend="signer", socket=str(self.socket))

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.keys / "signer.log").read_text().splitlines()]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def authority(rig: Rig) -> Iterator[Authority]:
    made = Authority.create(rig.ca, TD, NOW, place=rig.place)
    yield made
    assert isinstance(made.keys, SignerClient)
    made.keys.close()


def test_the_authority_works_without_a_key_of_its_own(rig: Rig, authority: Authority) -> None:
    assert not list(rig.ca.glob("*.key"))
    assert {p.name for p in rig.keys.glob("*.key")} == {"root.key", "intermediate.key", "records.key", "policy.key"}
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in rig.keys.iterdir())
    bundle = authority.trust_bundle(1, NOW)
    assert bundle.verify_svid(authority.issue_endpoint(csr(), HOST, NOW), NOW, expect=HOST)
    authority.issue_workload(csr(), SpiffeId.workload(TD, "a"), [], NOW)
    authority.issue_admin(csr(), SpiffeId(TD, ("admin", "ann")), NOW)
    authority.server_chain(NOW)
    beat = Heartbeat(trust_domain=TD.name, timeline="t", revision=1, time=NOW)
    assert bundle.verify(Heartbeat, authority.sign_record(beat)) == beat
    again = Authority.load(rig.ca, NOW)
    assert again.trust_bundle(2, NOW).fingerprints() == bundle.fingerprints()
    assert isinstance(again.keys, SignerClient)
    again.keys.close()
    logged = [(e["profile"], e["names"]) for e in rig.log() if e["op"] == "certificate"]
    assert ("endpoint", [str(HOST)]) in logged
    assert {p for p, _ in logged} == {"root", "intermediate", "signer", "endpoint", "workload", "admin", "server"}


def test_the_whole_authority_is_replaced_through_it(rig: Rig, authority: Authority) -> None:
    start = authority.trust_bundle(1, NOW)
    for kind in ("intermediate", "records", "policy", "root"):
        rotation.prepare(authority, kind, NOW)
        rotation.activate(authority, kind, NOW)
        rotation.revoke(authority, kind, NOW)
    latest = start.accept_next(authority.bundle(2, NOW), NOW)
    latest.verify_svid(authority.issue_endpoint(csr(), HOST, NOW), NOW)
    kept = {p.name for p in rig.keys.glob("*.key")}
    # Given up, not gone: the asking process cannot destroy the authority.
    assert len([n for n in kept if n.startswith("retired-")]) == 5
    assert {"root-2.key", "intermediate-3.key", "records-2.key", "policy-2.key"} <= kept


def test_it_comes_back_after_a_restart(rig: Rig, authority: Authority) -> None:
    rig.stop()
    with pytest.raises(Unreachable) as e:
        Authority.load(rig.ca, NOW)
    assert e.value.code == "signer.down"
    assert "retinue-ca signer" in e.value.hint
    rig.start(frozenset({os.geteuid()}))
    assert authority.issue_endpoint(csr(), HOST, NOW)


# ---- attacks: the API process is somebody else's now


def signing(authority: Authority, builder: x509.CertificateBuilder, name: str = "intermediate", issuer: str | None = None) -> str:
    """Ask for a signature over what a builder makes; the code of the refusal."""
    signer = authority.signer(name)
    assert isinstance(signer, RemoteSigner)
    curve = signer.public_key.curve  # type: ignore[union-attr]  # a certificate key
    digest = hashes.SHA384() if isinstance(curve, ec.SECP384R1) else hashes.SHA256()
    draft = builder.sign(ec.generate_private_key(curve), digest)
    with pytest.raises(RetinueError) as e:
        signer.sign_certificate(draft.tbs_certificate_bytes, authority.certificate(issuer or name))
    return e.value.code


def built(authority: Authority, profile: certs.Profile, name: str | None, issuer: str = "intermediate", **more: Any) -> x509.CertificateBuilder:
    key = more.pop("key", None) or ec.generate_private_key(ec.SECP256R1()).public_key()
    return certs.build(
        profile, key=key, trust_domain=TD, spiffe_id=None if name is None else SpiffeId.parse(name), now=NOW,
        issuer=authority.certificate(issuer), serial=1 << 130, **more,
    )  # fmt: skip


def test_no_authority_of_the_thiefs_own(authority: Authority) -> None:
    mine = built(authority, certs.INTERMEDIATE, None, "root")
    assert signing(authority, mine, "root") == "signer.foreign"
    assert signing(authority, built(authority, certs.LINK, None, "root"), "root") == "signer.foreign"
    assert signing(authority, built(authority, certs.INTERMEDIATE, None), "intermediate") == "signer.profile"
    record = built(authority, certs.SIGNER, "spiffe://prod.example/cp/records", key=Ed25519PrivateKey.generate().public_key())
    assert signing(authority, record) == "signer.foreign"
    # An authority's name over one of the leaves' keys, and a leaf by the root.
    assert signing(authority, built(authority, certs.ENDPOINT, str(HOST), "root"), "root") == "signer.profile"


def test_nothing_outside_a_profile(authority: Authority) -> None:
    def add(value: x509.ExtensionType, critical: bool = False) -> x509.CertificateBuilder:
        return built(authority, certs.ENDPOINT, str(HOST)).add_extension(value, critical)

    assert signing(authority, add(x509.OCSPNoCheck())) == "signer.profile"
    long = certs.Profile("endpoint", 400 * 86400, kinds=("host",))
    assert signing(authority, built(authority, long, str(HOST))) == "signer.profile"
    for name in ("spiffe://prod.example/cp/ca/x", "spiffe://prod.example/root/x"):
        profile = certs.Profile("x", 60, kinds=("cp", "root"))
        assert signing(authority, built(authority, profile, name)) in {"signer.profile", "signer.foreign"}
    stranger = certs.build(
        certs.ENDPOINT, key=ec.generate_private_key(ec.SECP256R1()).public_key(), trust_domain=TrustDomain("other.example"),
        spiffe_id=SpiffeId.parse("spiffe://other.example/host/a"), issuer=authority.intermediate, serial=1 << 130, now=NOW,
    )  # fmt: skip
    assert signing(authority, stranger) == "signer.profile"
    # A foreign issuer is none.
    assert signing(authority, built(authority, certs.ENDPOINT, str(HOST)), issuer="root") == "signer.issuer"


def ask(rig: Rig, **request: Any) -> dict[str, Any]:
    client = SignerClient(rig.socket)
    try:
        return client.ask(request.pop("op"), request.pop("name"), **request)
    finally:
        client.close()


def test_no_bytes_no_foreign_records_no_names(rig: Rig, authority: Authority) -> None:
    signer = authority.signer("intermediate")
    with pytest.raises(Bug):
        signer.sign(b"anything")
    good = records.sign(Heartbeat(trust_domain=TD.name, timeline="t", revision=1, time=NOW), Ed25519PrivateKey.generate())
    text = good.rpartition(".")[0]
    assert ask(rig, op="record", name="records", text=text)["signature"]
    other = Heartbeat(trust_domain="other.example", timeline="t", revision=1, time=NOW)
    policy = PolicyRecord(trust_domain=TD.name, revision=1, digest="d", files=[], author="", issued=NOW)
    key = Ed25519PrivateKey.generate()
    for name, bad in (
        ("records", records.sign(other, key).rpartition(".")[0]), ("records", records.sign(policy, key).rpartition(".")[0]),
        ("policy", text), ("intermediate", text), ("records", "junk"), ("records", text + "x"), ("records", text.replace(".", ".a", 1)),
        ("records", ""), ("records", None),
    ):  # fmt: skip
        with pytest.raises(RetinueError):
            ask(rig, op="record", name=name, text=bad)
    for request in (
        {"op": "sign", "name": "root"}, {"op": "public", "name": "../root"}, {"op": "public", "name": "root/../x"},
        {"op": "make", "name": "records-7", "kind": "p256"}, {"op": "make", "name": "records", "kind": "ed25519"},
        {"op": "certificate", "name": "intermediate", "tbs": "AAAA", "issuer": None},
        {"op": "certificate", "name": "intermediate", "tbs": base64.b64encode(os.urandom(300)).decode(), "issuer": "x"},
        {"op": "certificate", "name": "records", "tbs": "AAAA"},
    ):  # fmt: skip
        with pytest.raises(RetinueError):
            ask(rig, **request)
    assert [e for e in rig.log() if e.get("refused")], "refusals are in its log"
    assert "PRIVATE" not in (rig.keys / "signer.log").read_text()


WEB = SpiffeId.workload(TD, "shop/web")


def test_tokens_are_signed_there_and_by_profile_only(rig: Rig, authority: Authority) -> None:
    now = time.time()
    tokens = JwtAuthority.load(rig.ca, now, authority.keys)
    token, _ = tokens.sign(WEB, ["db"], now)
    assert jwt.verify(token, "db", {TD.name: tokens.published()}, now, own=TD.name).spiffe_id == WEB
    assert not list(rig.ca.glob("*.key")), "no key of tokens in the API's directory"
    kid = tokens.published()[0].kid
    assert [e for e in rig.log() if e["op"] == "token"][-1]["subject"] == str(WEB)
    again = JwtAuthority.load(rig.ca, now, authority.keys)
    assert [k.kid for k in again.published()] == [kid]

    def text(head: dict[str, Any] | None = None, drop: str = "", **claims: Any) -> str:
        said = {"sub": str(WEB), "aud": ["db"], "iat": int(now), "exp": int(now) + 300, **claims}
        said.pop(drop, None)
        parts = ({"alg": "ES256", "kid": kid, "typ": "JWT", **(head or {})}, said)
        return ".".join(records.b64(json.dumps(p).encode()) for p in parts)

    name = f"jwt-{kid}"
    assert ask(rig, op="token", name=name, text=text())["signature"]
    for bad in (
        text(exp=int(now) + 301), text(iat=int(now) + 3600, exp=int(now) + 3700), text(iat=int(now) - 3600, exp=int(now) + 9),
        text(exp=int(now) - 1), text(sub=str(HOST)), text(sub="spiffe://other.example/wl/web"), text(sub="spiffe://prod.example"), text(sub=5),
        text(aud=[]), text(aud="db\n"), text(aud=[str(n) for n in range(17)]), text(drop="iat"), text(drop="exp"), text(nbf=1), text(admin=True),
        text({"kid": "0" * 16}), text({"alg": "none"}), text({"alg": "HS256"}), text({"jku": "https://x"}), text() + ".x", "a.b", "", None, 7,
        text(exp=float("nan")), text(iat=True),
    ):  # fmt: skip
        with pytest.raises(RetinueError):
            ask(rig, op="token", name=name, text=bad)
    # keys keep to their kind
    draft = certs.build(
        certs.WORKLOAD, key=ec.generate_private_key(ec.SECP256R1()).public_key(), trust_domain=TD, spiffe_id=WEB, issuer=authority.intermediate,
        serial=5, now=NOW,
    ).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())  # fmt: skip
    tbs = base64.b64encode(draft.tbs_certificate_bytes).decode()
    for op, key, more in (
        ("token", "intermediate", {"text": text()}), ("token", "records", {"text": text()}), ("token", "jwt-0123456789abcdef", {"text": text()}),
        ("certificate", name, {"tbs": tbs, "issuer": certs.pem(authority.intermediate)}), ("certificate", name, {"tbs": tbs, "issuer": None}),
        ("record", name, {"text": text()}), ("make", "jwt-0123456789abcdef", {"kind": "ed25519"}), ("make", "jwt-1", {"kind": "p256"}),
    ):  # fmt: skip
        with pytest.raises(RetinueError):
            ask(rig, op=op, name=key, **more)


def test_a_token_key_of_a_release_before_goes_on_until_its_successor_in_the_signer_is_known(rig: Rig, authority: Authority) -> None:
    now = time.time()
    old = JwtAuthority.load(rig.ca, now)  # as it was: a file beside keys.json
    (file,) = rig.ca.glob("jwt-*.key")
    tokens = JwtAuthority.load(rig.ca, now, authority.keys)
    kids = [k.kid for k in tokens.published()]
    assert (kids[0], len(kids)) == (old.published()[0].kid, 2)
    assert not tokens.maintain(now + 3600)
    for at, kid in ((now + 3600, kids[0]), (now + DAY + 1, kids[1])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rig.server.desk, "_clock", lambda at=at: at)
            token, _ = tokens.sign(WEB, ["db"], at)
        assert jwt._json(token.split(".")[0])["kid"] == kid
        assert jwt.verify(token, "db", {TD.name: tokens.published()}, at).spiffe_id == WEB
    assert tokens.maintain(now + DAY + AFTER + 1)
    assert not file.exists()
    assert [k.kid for k in tokens.published()] == kids[1:]


def raw(path: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect(str(path))
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        return s.makefile("rb").read()


@pytest.mark.parametrize("data", [b"\n", b"junk\n", b"[]\n", b"{}\n", b'{"op":1}\n', b"[" * 100_000 + b"\n", b"\xff\xfe\n", b""])
def test_garbage_is_answered_or_dropped(rig: Rig, authority: Authority, data: bytes) -> None:
    assert b"signature" not in raw(rig.socket, data)
    assert authority.issue_endpoint(csr(), HOST, NOW)


def test_another_user_gets_nothing(rig: Rig, authority: Authority) -> None:
    rig.stop()
    rig.start(frozenset({os.geteuid() + 1}))
    with pytest.raises(NoPrivilege) as e:
        ask(rig, op="public", name="root")
    assert e.value.code == "signer.user"
    assert rig.log()[-1]["refused"] == "signer.user"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_real_other_user_gets_nothing_and_reads_nothing(rig: Rig, authority: Authority) -> None:
    for parent in (rig.socket.parent, *rig.socket.parent.parents):
        if parent != Path("/tmp") and str(parent).startswith("/tmp"):
            parent.chmod(0o755)
    code = (
        "import os,socket,sys\nos.setgid(65534); os.setuid(65534)\n"
        "s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b'{\"op\":\"public\",\"name\":\"root\"}\\n')\n"
        "print(s.makefile().readline())\n"
        "try: open(sys.argv[2]+'/root.key')\nexcept OSError as e: print(type(e).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(rig.socket), str(rig.keys)], capture_output=True, text=True, check=True)
    assert "signer.user" in done.stdout
    assert "PermissionError" in done.stdout


def test_it_is_not_asked_faster_than_it_allows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(signer_process, "BURST", 3.0)
    monkeypatch.setattr(signer_process, "RATE", 0.0)
    keys = signer_process.RetiringKeys(tmp_path)
    keys.make("records", "ed25519")
    desk = SignerDesk(keys, TD, lambda _: None)
    beat = records.sign(Heartbeat(trust_domain=TD.name, timeline="t", revision=1, time=NOW), Ed25519PrivateKey.generate())
    request = {"op": "record", "name": "records", "text": beat.rpartition(".")[0]}
    for _ in range(3):
        desk.handle(request, "x")
    with pytest.raises(Unreachable) as e:
        desk.handle(request, "x")
    assert e.value.code == "signer.rate"


def test_what_cannot_be_logged_is_not_signed(rig: Rig, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise BadState("signer.log", "the disk is full")

    monkeypatch.setattr(rig.server.desk, "log", full)
    with pytest.raises(RetinueError):
        authority.issue_endpoint(csr(), HOST, NOW)


def test_places(tmp_path: Path) -> None:
    assert key_place(None, None, "t", None) is None
    assert key_place(tmp_path, None, "t", None) == KeyPlace(backend="signer", socket=str(tmp_path))
    for args in ((tmp_path, tmp_path, "t", None), (None, tmp_path, "t", None)):
        with pytest.raises(BadInput):
            key_place(*args)
    (tmp_path / "keys.json").write_text('{"backend":"tape"}')
    with pytest.raises(BadState):
        open_keys(tmp_path)
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(BadState) as e:
        signer_process.serve(tmp_path / "open", tmp_path / "s", TD, frozenset())
    assert e.value.code == "signer.mode"
    assert isinstance(Refused("a", "b"), RetinueError)
