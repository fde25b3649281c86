"""The ingress gateway in a lab of network namespaces. Run as root: sudo python3 examples/gateway/run.py

Two partners call from a machine that is no part of the mesh: acme with a bearer token, zeta with a client certificate.
Both are known; policy permits only acme. A third caller is unknown.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from gateway.callers import spki_sha256
from identity.keys import private_pem, write_secret
from mesh.lab import Lab
from mesh.lab_process import command, run

HERE = Path(__file__).parent
TOKEN = "acme-says-open-sesame"
CALL = """
import http.client, ssl, sys
host, path, token, certificate = sys.argv[1:]
tls = ssl.create_default_context(cafile="server.pem"); tls.check_hostname = False
if certificate: tls.load_cert_chain(certificate + ".pem", certificate + ".key")
call = http.client.HTTPSConnection(host, 8443, context=tls, timeout=10)
call.request("GET", path, headers={"Accept": "text/plain"} | ({"Authorization": "Bearer " + token} if token else {}))
answer = call.getresponse(); print(answer.status); print(answer.read().decode(), end="")
"""


def certificate(directory: Path, name: str) -> x509.Certificate:
    """A self-signed certificate NAME.pem with NAME.key, as a partner might bring one."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + dt.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"{name}.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (directory / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))
    write_secret(directory / f"{name}.key", private_pem(key))
    return made


def configure(directory: Path, lab: Lab) -> Path:
    """gateway.toml of this example with the lab's paths and the two proofs filled in."""
    edge, zeta = lab.nodes["edge"], certificate(directory, "zeta")
    certificate(directory, "server")
    (directory / "partners.pem").write_bytes((directory / "zeta.pem").read_bytes())
    text = (HERE / "gateway.toml").read_text()
    for old, new in (
        ("ACME_TOKEN_SHA256", hashlib.sha256(TOKEN.encode()).hexdigest()),
        ("ZETA_SPKI_SHA256", spki_sha256(zeta)),
        ("/run/retinue/agent.sock", str(edge.run_dir / "agent.sock")),
        ("/var/lib/retinue", str(edge.state_dir)),
    ):
        text = text.replace(old, new)
    path = directory / "gateway.toml"
    path.write_text(text)
    return path


def main() -> int:
    with Lab(["edge", "host-b", "outside"], trust_domain="shop.example") as lab:
        lab.bring_up(["edge", "host-b"])
        for name, host, role in (("partner/acme", "edge", "partner"), ("partner/zeta", "edge", "partner"), ("shop/api", "host-b", "api")):
            lab.ca("workload", "add", name, "--host", host, "--label", f"role={role}")
        api = lab.add_workload("api")
        lab.retinue("host-b", "attach", "shop/api", "--netns", api, "--wait", "15")
        lab.spawn([sys.executable, "-m", "mesh.demo_service", "--name", "api"], name="api", netns=api).wait_ready()
        lab.ca("policy", "apply", str(HERE / "policy.yaml"))

        edge, outside = lab.nodes["edge"], lab.nodes["outside"]
        config = configure(outside.dir, lab)
        run([*command("retinue-gateway"), "--config", str(config), "--check"])
        lab.spawn([*command("retinue-gateway"), "--config", str(config)], name="gateway", netns=edge.netns).wait_ready()

        def call(address: str, token: str = "", proof: str = "", *, until: str = "") -> tuple[str, str]:
            """(status, body) of one request from outside; again while the policy is still on its way to both hosts."""
            for _ in range(50):
                done = run([sys.executable, "-c", CALL, address, "/orders", token, proof], netns=outside.netns, cwd=outside.dir)
                status, _, body = done.stdout.partition("\n")
                if status == until or not until:
                    break
            return status, body

        ok = True
        for address in (edge.v4, edge.v6):
            status, body = call(address, TOKEN, until="200")
            seen = json.loads(body) if status == "200" else {}
            print(f"acme, token        {status}  the API saw {seen.get('caller')}, {seen.get('forwarded', {}).get('x-retinue-caller')}")
            denied, why = call(address, proof="zeta")
            print(f"zeta, certificate  {denied}  {why.strip().splitlines()[0]}")
            unknown, _ = call(address, "guess")
            print(f"somebody           {unknown}")
            ok &= (status, denied, unknown) == ("200", "403", "401") and "default deny" in why
            ok &= str(seen.get("forwarded", {}).get("x-retinue-caller")).endswith("/wl/partner/acme")
    print("as promised" if ok else "NOT as promised")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
