"""The CA's network face under attack: members that ask for what is not theirs, strangers, floods, revoked certificates."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gzip
import json
import os
import socket
import ssl
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from identity import certs
from mesh.lab import CA_PORT
from mesh.lab_process import ProcessFailed, in_netns
from tests.netns.attack_tools import until

pytestmark = [pytest.mark.timeout(120)]

POLICY = """\
meshpolicy: 1
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: {role: web}, to: {role: api}, on: tcp/8080}
"""
MINE, THEIRS = "evil", "api"


class Caller:
    """A TLS client on a node: what it shows and says is up to the test."""

    def __init__(self, node: Any, ca: Any, *, chain: Path | None = None, key: Path | None = None, version: ssl.TLSVersion | None = None) -> None:
        self._ns, self._to = node.netns, (ca.v4, CA_PORT)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        if version is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # old versions are what we want
                self._context.minimum_version = self._context.maximum_version = version
        if chain is not None:
            self._context.load_cert_chain(chain, key)

    def tcp(self) -> socket.socket:
        return in_netns(self._ns, lambda: socket.create_connection(self._to, timeout=5))

    def open(self) -> ssl.SSLSocket:
        return self._context.wrap_socket(self.tcp())

    def ask(self, method: str, path: str, body: Any = None, headers: str = "", *, raw: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON body; status 0 when the connection just ended."""
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: ca\r\nConnection: close\r\nContent-Length: {len(data)}\r\n{headers}\r\n"
        return self.say(head.encode() + data)

    def say(self, text: bytes) -> tuple[int, Any]:
        said = b""
        try:
            with self.open() as sock:
                # Early refusals come while we still send.
                with contextlib.suppress(OSError):
                    sock.sendall(text)
                with contextlib.suppress(OSError):
                    while data := sock.recv(65536):
                        said += data
        except OSError:
            return 0, None
        if not said.startswith(b"HTTP/1.1 "):
            return 0, None
        head, _, rest = said.partition(b"\r\n\r\n")
        try:
            return int(head.split()[1]), json.loads(rest)
        except ValueError:
            return int(head.split()[1]), rest


@pytest.fixture(scope="module")
def mesh(make_mesh: Any) -> Any:
    made = make_mesh("host-a", "host-b", "host-m")
    for name, host in (("web", "host-a"), ("api", "host-b"), ("evil", "host-m")):
        made.add(name, host)
    made.apply(POLICY)
    return made


@pytest.fixture(scope="module")
def member(mesh: Any) -> Caller:
    """Root on host-m, with the host's own enrolment."""
    node = mesh.lab.nodes["host-m"]
    return Caller(node, mesh.lab.nodes["ca"], chain=node.state_dir / "chain.pem", key=node.state_dir / "tls.key")


@pytest.fixture(scope="module")
def stranger(mesh: Any) -> Caller:
    return Caller(mesh.lab.nodes["host-m"], mesh.lab.nodes["ca"])


def csr(*, names: list[str] | None = None, authority: bool = False, key: Any = None) -> tuple[str, Any]:
    key = key or ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
    if names:
        kinds: list[x509.GeneralName] = [x509.UniformResourceIdentifier(n) for n in names]
        made = made.add_extension(x509.SubjectAlternativeName([*kinds, x509.DNSName("ca.example")]), critical=True)
    if authority:
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        usage = dict.fromkeys(("digital_signature", "key_cert_sign", "crl_sign"), True)
        rest = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
        )
        made = made.add_extension(x509.KeyUsage(**usage, **rest), critical=True)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode(), key


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], str(answer[1].get("code")) if isinstance(answer[1], dict) else str(answer[1])


# ---- asking for what is not ours


def test_a_host_gets_nothing_for_what_is_placed_elsewhere(member: Caller) -> None:
    request, _ = csr()
    for name, status in ((MINE, 200), (THEIRS, 403), ("web", 403), ("nobody", 404)):
        assert member.ask("POST", "/v1/svid", {"workload": name, "instance": 0, "csr": request})[0] == status, name
    assert member.ask("POST", "/v1/svid", {"workload": MINE, "instance": 1, "csr": request})[0] == 404
    assert member.ask("POST", "/v1/sidecar-token", {"workload": THEIRS})[0] in {403, 409}
    assert member.ask("POST", "/v1/sidecar-token", {"workload": MINE})[0] == 200
    assert member.ask("GET", "/v1/explain?src=web&dst=api&port=8080")[0] == 403
    assert member.ask("GET", f"/v1/explain?src={MINE}&dst=api&port=8080")[0] == 200
    for path in ("/v1/workloads", "/v1/hosts", "/v1/policy", "/v1/audit", "/v1/info", "/v1/tokens", "/", "/metrics", "/debug", "/v1/../v1/info"):
        for method in ("GET", "POST"):
            assert member.ask(method, path, {})[0] in {404, 405}, path


def test_a_request_for_a_certificate_gives_its_key_and_nothing_else(mesh: Any, member: Caller) -> None:
    """A1, A2: other names, the right to sign, another domain in the CSR."""
    td = mesh.lab.trust_domain
    wishes = [f"spiffe://{td}/wl/{THEIRS}", f"spiffe://{td}/cp/ca", f"spiffe://{td}/cp/records", f"spiffe://{td}/ep/host-b", "spiffe://other/x"]
    request, key = csr(names=wishes, authority=True)
    for path, body, name in (
        ("/v1/svid", {"workload": MINE, "instance": 0, "csr": request}, f"spiffe://{td}/wl/{MINE}"),
        ("/v1/renew", {"csr": request, "underlay": mesh.lab.nodes["host-m"].underlay, "ciphers": ["chacha20poly1305"]}, None),
    ):
        status, said = member.ask("POST", path, body)
        assert status == 200, said
        leaf = certs.parse_chain(said["chain"])[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert uris == [name] if name else (len(uris) == 1 and uris[0].endswith("/host-m"))
        assert names.get_values_for_type(x509.DNSName) == []
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        assert leaf.public_key() == key.public_key(), "positive control: it is for the key that asked"


def test_a_workload_certificate_is_no_endpoint(mesh: Any, member: Caller, tmp_path: Path) -> None:
    """A11, and a certificate forged with a workload's key as its issuer."""
    request, key = csr()
    _, said = member.ask("POST", "/v1/svid", {"workload": MINE, "instance": 0, "csr": request})
    key_file, chain_file = tmp_path / "k", tmp_path / "c"
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    chain_file.write_text("".join(said["chain"]))
    node, ca = mesh.lab.nodes["host-m"], mesh.lab.nodes["ca"]
    with_it = Caller(node, ca, chain=chain_file, key=key_file)
    assert code(with_it.ask("GET", "/v1/feed")) == (403, "caller.kind")
    # The workload's certificate as an issuer: it may not sign, whatever it signs.
    issuer = certs.parse_chain(said["chain"])[0]
    forged_key = ec.generate_private_key(ec.SECP256R1())
    forged = (
        x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(issuer.subject).public_key(forged_key.public_key())
        .serial_number(5).not_valid_before(issuer.not_valid_before_utc).not_valid_after(issuer.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{mesh.lab.trust_domain}/ep/host-b")]), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = lambda c: c.public_bytes(serialization.Encoding.PEM).decode()
    chain_file.write_text(pem(forged) + "".join(said["chain"]))
    key_file.write_bytes(forged_key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    assert Caller(node, ca, chain=chain_file, key=key_file).ask("GET", "/v1/feed")[0] in {0, 401, 403}


async def test_a_false_report_wins_no_move(mesh: Any, member: Caller) -> None:
    """host-m says that it has everything attached and is far ahead; a move to host-a still waits for host-a."""
    info = await mesh.lab.aca("info")
    lie = {"timeline": info["timeline"], "revision": 1 << 60, "hash": "0" * 64, "held": {"api/0": 99}, "attached": ["api/0", "web/0"]}
    assert member.ask("POST", "/v1/report", lie)[0] == 200, "it may say so of itself"
    assert member.ask("POST", "/v1/report", lie | {"endpoint": "host-a"})[0] == 400
    assert member.ask("POST", "/v1/report", lie | {"timeline": "other"})[0] == 409
    with pytest.raises(ProcessFailed, match=r"move\.not_ready"):
        await mesh.lab.aca("workload", "move", "api", "--to", "host-a", "--wait", "0.5")
    placed = {w["name"]: (w["host"], w["state"]) for w in await mesh.lab.aca("workload", "list")}
    assert placed["api"] == ("host-b", "active")
    # What it may be lied into: a move to itself, which the operator asked for.
    assert (await mesh.lab.aca("workload", "move", "api", "--to", "host-m", "--dry-run"))["applied"] is False


# ---- strangers


def test_strangers_get_the_two_calls_of_enrolment_only(mesh: Any, stranger: Caller, tmp_path: Path) -> None:
    for method, path in (("GET", "/v1/feed"), ("GET", "/v1/explain?src=web&dst=api"), *(("POST", f"/v1/{p}") for p in ("renew", "svid", "sidecar-token", "underlay", "report"))):
        assert code(stranger.ask(method, path, {})) == (403, "caller.anonymous"), path
    node, ca = mesh.lab.nodes["host-m"], mesh.lab.nodes["ca"]
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1):
        with pytest.raises(OSError), Caller(node, ca, version=version).open():
            pass
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "retinue")])
    theirs = certs.parse_chain((node.state_dir / "chain.pem").read_text())[0]
    own = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(theirs.serial_number)
        .not_valid_before(theirs.not_valid_before_utc).not_valid_after(theirs.not_valid_after_utc)
        .add_extension(theirs.extensions.get_extension_for_class(x509.SubjectAlternativeName).value, critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (tmp_path / "c").write_bytes(own.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "k").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    assert Caller(node, ca, chain=tmp_path / "c", key=tmp_path / "k").ask("GET", "/v1/feed")[0] in {0, 403}, "the same names, another issuer"
    with contextlib.closing(Caller(node, ca).tcp()) as plain:
        plain.sendall(b"GET /v1/feed HTTP/1.1\r\nHost: ca\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert not plain.recv(100).startswith(b"HTTP")


def test_bodies_of_every_bad_kind(member: Caller, stranger: Caller) -> None:
    """A47: too large, too deep, compressed, doubled, cut, never ending. Each is refused, and the next is served."""
    deep = b'{"token_id":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bomb = gzip.compress(bytes(50_000_000))
    for caller, path in ((stranger, "/v1/enroll/challenge"), (stranger, "/v1/enroll"), (member, "/v1/report"), (member, "/v1/svid")):
        assert caller.ask("POST", path, raw=deep)[0] == 400
        assert caller.ask("POST", path, raw=bytes(600_000))[0] in {0, 413}
        for how in ("gzip", "deflate", "br", "gzip, gzip", "GZIP", "zstd"):
            assert caller.ask("POST", path, raw=bomb, headers=f"Content-Encoding: {how}\r\n")[0] in {0, 400, 413}, how
        for raw in (b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"{}" * 2, b"NaN", b'{"a":1e999}', b'{"token_id":"\\ud800"}'):
            assert caller.ask("POST", path, raw=raw)[0] == 400, raw
    assert stranger.ask("POST", "/v1/enroll/challenge", raw=b'{"token_id":"a","token_id":7}')[0] == 400
    heads = (
        b"GET /v1/feed HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/report HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/feed",
        b"POST /v1/report HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/report HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/report HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0" * 70_000 + b"\r\n\r\n",
    )
    for text in heads:
        assert member.say(text)[0] in {0, 400, 403, 413}, text[:40]
    assert member.ask("GET", f"/v1/explain?src={MINE}&dst=api&port=8080")[0] == 200, "positive control"


async def test_a_flood_of_connections_keeps_no_member_from_its_changes(mesh: Any, stranger: Caller) -> None:
    """A47: host-m opens 1500 connections that never finish a handshake, trickles requests, and goes on opening more.

    The CA keeps a bounded part of them; other members get a policy change and answers meanwhile, and it lets go.
    """
    ca, a = mesh.lab.processes["retinue-ca"], mesh.lab.nodes["host-a"]
    other = Caller(a, mesh.lab.nodes["ca"], chain=a.state_dir / "chain.pem", key=a.state_dir / "tls.key")

    def fds() -> int:
        return len(os.listdir(f"/proc/{ca.pid}/fd"))

    before = fds()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            with contextlib.suppress(OSError):  # before the flood, so that they have a place
                one = stack.enter_context(stranger.open())
                one.sendall(b"POST /v1/enroll HTTP/1.1\r\nHost: ca\r\nContent-Length: 400000\r\n\r\n{")

        def half() -> int:
            with contextlib.suppress(OSError):
                sock = stack.enter_context(contextlib.closing(stranger.tcp()))
                sock.send(b"\x16\x03\x01\x02\0\x01")
                return 1
            return 0

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            taken = sum(await asyncio.gather(*(asyncio.wrap_future(pool.submit(half)) for _ in range(1500))))
        assert taken > 500, "positive control: they were opened"
        assert before + 10 < fds() < before + 2000
        path = mesh.lab.dir / "flooded.yaml"
        path.write_text(POLICY.replace("8080", "8081"))
        digest = (await mesh.lab.aca("policy", "apply", str(path)))["digest"]
        for host in ("host-a", "host-b"):
            await mesh.lab.until(host, lambda s: s.policy_digest == digest)
        assert other.ask("GET", "/v1/explain?src=web&dst=api&port=8081")[0] == 200
        assert await asyncio.to_thread(until, lambda: fds() < before + 50, 20.0), "the CA lets go of them"
    await mesh.aapply(POLICY)


async def test_challenges_without_end_are_limited_for_one_address(mesh: Any, stranger: Caller) -> None:
    """The one that asks too often is told so; a machine elsewhere enrols meanwhile."""
    loop = asyncio.get_running_loop()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [loop.run_in_executor(pool, lambda: stranger.ask("POST", "/v1/enroll/challenge", {"token_id": "x"})[0]) for _ in range(400)]
        late = mesh.lab.add_node("host-late")
        await asyncio.to_thread(mesh.lab.enroll, late.name)
        answers = await asyncio.gather(*asked)
    assert set(answers) <= {200, 429}
    assert answers.count(429) > 50, "positive control: the limit was reached"


# ---- revoked


def test_a_revoked_host_is_out_on_every_route_and_its_open_feed_ends(mesh: Any, member: Caller) -> None:
    """A6, A38. Last: host-m does not come back."""
    request, _ = csr()
    with member.open() as feed:
        feed.sendall(b"GET /v1/feed HTTP/1.1\r\nHost: ca\r\n\r\n")
        feed.settimeout(10)
        assert feed.recv(4096).startswith(b"HTTP/1.1 200")
        mesh.lab.processes["agent-host-m"].stop()  # else the two take the seat from each other
        with member.open() as own:
            own.settimeout(10)
            own.sendall(b"GET /v1/feed HTTP/1.1\r\nHost: ca\r\n\r\n")
            assert own.recv(4096).startswith(b"HTTP/1.1 200"), "positive control: it has the feed"
            mesh.lab.ca("host", "revoke", "host-m")
            rest = b""
            with contextlib.suppress(OSError):
                while data := own.recv(65536):
                    rest += data
            assert b'"revoked"' not in rest, "nothing is told after it"
    underlay = mesh.lab.nodes["host-m"].underlay
    routes = [
        ("GET", "/v1/feed", None), ("GET", f"/v1/explain?src={MINE}&dst=api", None), ("POST", "/v1/sidecar-token", {"workload": MINE}),
        ("POST", "/v1/svid", {"workload": MINE, "instance": 0, "csr": request}), ("POST", "/v1/underlay", {"underlay": underlay}),
        ("POST", "/v1/renew", {"csr": request, "underlay": underlay, "ciphers": ["chacha20poly1305"]}),
        ("POST", "/v1/report", {"timeline": "t", "revision": 1, "hash": ""}),
    ]  # fmt: skip
    for method, path, body in routes:
        assert code(member.ask(method, path, body)) == (403, "caller.revoked"), path
    said = mesh.lab.retinue("host-m", "enroll", "--ca", mesh.lab.ca_url, "--token-file", "-", "--replace", "--state-dir",
                            str(mesh.lab.dir / "again"), stdin="rt1.AAAAAAAAAAAA." + "A" * 43 + "." + "0" * 64, codes=range(256))  # fmt: skip
    assert "rt1." not in json.dumps(said)
    assert not (mesh.lab.dir / "again" / "tls.key").exists()


@pytest.fixture(autouse=True)
def _ca_lives(mesh: Any) -> Iterator[None]:
    yield
    assert mesh.lab.processes["retinue-ca"].running
    assert "Traceback" not in mesh.lab.processes["retinue-ca"].err.read_text()
