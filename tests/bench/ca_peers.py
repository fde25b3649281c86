"""Certificates a second of other authorities on this machine: `openssl ca`, `nebula-cert sign`, and step-ca where there is one.

The first two are a program run a certificate, as they are used. step-ca (PATH or STEP_CA; it comes as a Go module:
``CGO_ENABLED=0 go install github.com/smallstep/certificates/cmd/step-ca@latest``) is a server as ours is: P-256 keys, its embedded database,
one-time tokens of a JWK provisioner made beforehand, AT_ONCE clients over kept TLS connections.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from identity.keys import private_pem

AT_ONCE: Final = 8
OPENSSL: Final = """\
[ca]
default_ca = d
[d]
dir = {dir}
database = {dir}/index.txt
rand_serial = yes
new_certs_dir = {dir}/new
certificate = {dir}/ca.pem
private_key = {dir}/ca.key
default_md = sha256
default_days = 1
policy = p
unique_subject = no
[p]
commonName = supplied
"""


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _key_and_csr(directory: Path, name: str) -> str:
    """key.pem and csr.pem of P-256; the CSR's text."""
    key = ec.generate_private_key(ec.SECP256R1())
    (directory / "key.pem").write_bytes(private_pem(key))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    csr = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False).sign(key, hashes.SHA256())
    text = csr.public_bytes(serialization.Encoding.PEM).decode()
    (directory / "csr.pem").write_text(text)
    return text


def openssl(directory: Path, seconds: float) -> tuple[str, float] | None:
    """(version, certificates a second)."""
    program = shutil.which("openssl")
    if program is None:
        return None
    (directory / "new").mkdir(parents=True)
    (directory / "index.txt").touch()
    (directory / "ca.cnf").write_text(OPENSSL.format(dir=directory))
    _run(program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=ca", "-days", "2",
         "-keyout", str(directory / "ca.key"), "-out", str(directory / "ca.pem"))  # fmt: skip
    _key_and_csr(directory, "host-1")
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        _run(program, "ca", "-batch", "-notext", "-config", str(directory / "ca.cnf"), "-in", str(directory / "csr.pem"), "-out", str(directory / "out.pem"))
        count += 1
    return _run(program, "version").split("(")[0].strip(), count / spent


def nebula(directory: Path, seconds: float) -> tuple[str, float] | None:
    """(version, certificates a second)."""
    program = os.environ.get("NEBULA_CERT") or shutil.which("nebula-cert")
    if program is None:
        return None
    directory.mkdir(parents=True)
    ca = ["-ca-crt", str(directory / "ca.crt"), "-ca-key", str(directory / "ca.key")]
    _run(program, "ca", "-name", "bench", "-out-crt", str(directory / "ca.crt"), "-out-key", str(directory / "ca.key"))
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        out = directory / f"{count}"
        _run(program, "sign", *ca, "-name", f"h{count}", "-ip", "10.1.0.1/16", "-out-crt", f"{out}.crt", "-out-key", f"{out}.key")
        count += 1
    return "nebula-cert " + _run(program, "-version").split()[-1], count / spent


# ---- step-ca


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class StepCa:
    """A directory and a server of step-ca."""

    def __init__(self, program: str, directory: Path) -> None:
        self.program, self.directory = program, directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"https://127.0.0.1:{free.getsockname()[1]}"
        self.key = ec.generate_private_key(ec.SECP256R1())

    def configure(self) -> None:
        self.directory.mkdir(parents=True)
        path = self.directory
        root, root_key = self._authority("root", None)
        under, under_key = self._authority("intermediate", (root, root_key))
        self.fingerprint = root.fingerprint(hashes.SHA256()).hex()
        for name, cert, key in (("root", root, root_key), ("intermediate", under, under_key)):
            (path / f"{name}.crt").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
            (path / f"{name}.key").write_bytes(private_pem(key))
        numbers = self.key.public_key().public_numbers()
        x, y = (_b64(n.to_bytes(32, "big")) for n in (numbers.x, numbers.y))
        jwk = {"crv": "P-256", "kty": "EC", "x": x, "y": y}
        self.kid = _b64(hashlib.sha256(json.dumps(jwk, separators=(",", ":"), sort_keys=True).encode()).digest())
        provisioner = {"type": "JWK", "name": "bench", "key": {**jwk, "use": "sig", "alg": "ES256", "kid": self.kid}}
        (path / "ca.json").write_text(json.dumps({
            "root": str(path / "root.crt"), "crt": str(path / "intermediate.crt"), "key": str(path / "intermediate.key"),
            "address": self.url.removeprefix("https://"), "dnsNames": ["127.0.0.1"], "db": {"type": "badgerv2", "dataSource": str(path / "db")},
            "authority": {"provisioners": [provisioner]}, "tls": {"minVersion": 1.3, "maxVersion": 1.3},
        }))  # fmt: skip

    @staticmethod
    def _authority(name: str, by: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject if by is None else by[0].subject)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - dt.timedelta(minutes=1)).not_valid_after(now + dt.timedelta(days=2))
        builder = builder.add_extension(x509.BasicConstraints(True, 1 if by is None else 0), True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        return builder.sign(key if by is None else by[1], hashes.SHA256()), key

    def token(self, name: str) -> str:
        now = int(time.time())
        head = {"alg": "ES256", "kid": self.kid, "typ": "JWT"}
        said = {"aud": f"{self.url}/1.0/sign", "exp": now + 300, "iat": now, "nbf": now - 5, "iss": "bench", "jti": secrets.token_hex(32),
                "sans": [name], "sub": name, "sha": self.fingerprint}  # fmt: skip
        text = ".".join(_b64(json.dumps(part).encode()) for part in (head, said))
        r, s = decode_dss_signature(self.key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{_b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    async def ready(self, session: aiohttp.ClientSession) -> None:
        async with asyncio.timeout(20):
            while True:
                try:
                    async with session.get(f"{self.url}/health") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    await asyncio.sleep(0.1)

    async def measure(self, count: int) -> float:
        """Certificates a second over `count` of them."""
        context = ssl.create_default_context(cafile=str(self.directory / "root.crt"))
        context.check_hostname = False
        csr = _key_and_csr(self.directory, "host-1")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context, limit=AT_ONCE)) as session:
            await self.ready(session)
            bodies = iter([{"csr": csr, "ott": self.token("host-1")} for _ in range(count)])

            async def work() -> None:
                for asked in bodies:
                    async with session.post(f"{self.url}/1.0/sign", json=asked) as answer:
                        reply: dict[str, Any] = await answer.json()
                        if answer.status != 201:
                            raise RuntimeError(f"step-ca: {answer.status} {reply}")

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(AT_ONCE)))
            return count / (time.perf_counter() - began)


def step(directory: Path, count: int) -> tuple[str, float] | None:
    """(version, certificates a second); None where there is no step-ca."""
    program = os.environ.get("STEP_CA") or shutil.which("step-ca")
    if program is None:
        return None
    made = StepCa(program, directory)
    made.configure()
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen([program, str(directory / "ca.json")], stdout=log, stderr=log, env={**os.environ, "STEPPATH": str(directory)})
        try:
            found = asyncio.run(made.measure(count))
        finally:
            server.terminate()
            server.wait(20)
    modules = [line.split() for line in _run("go", "version", "-m", program).splitlines()] if shutil.which("go") else []
    version = next((words[2] for words in modules if words[:1] == ["mod"]), "")
    return f"step-ca {version}".strip(), found
