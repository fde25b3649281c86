"""Administrators, approvals, entries and ends on the command line: real processes, a server on TCP, no root where none is needed."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ca.plane import Plane
from identity import jwt
from identity.keys import b64, unb64
from identity.wire.admin import WorkloadAdd
from identity.wire.jwt import JwtRequest
from tests.cli.test_retinue_ca import CA
from tests.unit.ca.conftest import Joined, make_attempt


@pytest.fixture
def ca(tmp_path: Path, pytestconfig) -> Iterator[CA]:
    made = CA(tmp_path / "ca", pytestconfig.rootpath)
    made.json("init", "--trust-domain", "cli.test")
    made.url = f"https://{made.start()['listen']}"
    yield made
    made.server.terminate()
    made.server.communicate(timeout=30)


def admin(ca: CA, name: str, role: str, *more: str) -> list[str]:
    """The words that make a command that administrator's."""
    out = ca.directory.parent / name
    ca.json("admin", "add", name, "--role", role, "--out", str(out), "--server-url", ca.url, *more)
    return ["--admin-identity", str(out)]


def test_two_administrators_over_the_network(ca):
    alice, bob = admin(ca, "alice", "operator"), admin(ca, "bob", "operator")
    for name in ("key.pem", "admin.json"):
        assert stat.S_IMODE((ca.directory.parent / "alice" / name).stat().st_mode) == 0o600
    ca.env.pop("RETINUE_CA_DIR")
    made = ca.json(*alice, "workload", "add", "shop/api", "--label", "role=api", "--ends-at", "+2d")
    assert made["ends_at"] is not None
    status, error = ca.fails(*alice, "workload", "revoke", "shop/api")
    assert (status, error["code"]) == (1, "approval.pending")
    approval = re.search(r"approve (a-\w+)", error["hint"])[1]
    assert ca.fails(*alice, "approve", approval)[1]["code"] == "approval.same"
    assert [a["state"] for a in ca.json(*bob, "approvals")] == ["pending"]
    assert "admin/alice may now" in ca.run(*bob, "approve", approval).stdout
    assert ca.json(*alice, "workload", "revoke", "shop/api")["state"] == "revoked"
    assert {a["name"]: a["role"] for a in ca.json(*bob, "admin", "list")} == {"alice": "operator", "bob": "operator"}
    assert ca.fails(*bob, "admin", "revoke", "alice")[1]["code"] == "admin.role"
    found = ca.run(*bob, "explain", "identity", "shop/api")
    assert found.returncode == 1
    assert "admin/alice revoked it" in found.stdout
    other = ca.fails("--server", "https://127.0.0.1:1", *alice, "info")
    assert (other[0], other[1]["code"]) == (3, "ca.unreachable")
    assert ca.fails("--server", ca.url, "info")[0] == 2
    assert ca.fails("--admin-identity", str(ca.directory.parent), "info")[1]["code"] == "admin.identity"


def certificate(directory: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates((directory / "chain.pem").read_bytes())[0]


def expire(directory: Path) -> None:
    """The administrator comes back after a holiday: their certificate is one that has ended."""
    key = ec.generate_private_key(ec.SECP256R1())
    then = datetime.now(UTC) - timedelta(days=3)
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://cli.test/admin/{directory.name}")])
    nobody = x509.Name([])
    made = (
        x509.CertificateBuilder(nobody, nobody, key.public_key(), 1, then, then + timedelta(hours=8)).add_extension(name, critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (directory / "chain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))


def test_a_certificate_is_renewed_while_it_lasts_and_brought_back_by_root_after(ca):
    alice, home = admin(ca, "alice", "registrar"), ca.directory.parent / "alice"
    first, key = certificate(home), (home / "key.pem").read_bytes()
    done = ca.json(*alice, "admin", "renew")
    assert (done["dir"], done["admin"]["name"]) == (str(home), "alice")
    second = certificate(home)
    assert second.serial_number != first.serial_number
    assert second.public_key() != first.public_key()
    assert (home / "key.pem").read_bytes() != key
    assert ca.json(*alice, "info")["trust_domain"] == "cli.test"
    assert ca.fails("admin", "renew")[1]["code"] == "admin.local"

    expire(home)
    for words in (["admin", "renew"], ["info"]):
        status, error = ca.fails(*alice, *words)
        assert (status, error["code"]) == (78, "admin.expired")
        assert "admin certify alice --csr" in error["hint"]
    request = ca.run("admin", "request", "--out", str(home))
    csr = ca.directory.parent / "alice.csr"
    csr.write_text(request.stdout)
    out = ca.directory.parent / "made"
    assert ca.json("admin", "certify", "alice", "--csr", str(csr), "--out", str(out), "--server-url", ca.url)["admin"]["role"] == "registrar"
    for name in ("chain.pem", "roots.pem", "admin.json"):
        (home / name).write_bytes((out / name).read_bytes())
    assert ca.json(*alice, "workload", "add", "shop/api")["name"] == "shop/api"
    acts = [(e["action"], e["actor"].partition(":")[0]) for e in ca.json("audit", "list")]
    assert [a for a in acts if a[0] in {"admin.renew", "admin.break_glass", "admin.certify"}] == [
        ("admin.renew", "admin/alice"), ("admin.break_glass", "admin"), ("admin.certify", "admin"),
    ]  # fmt: skip


def test_what_the_log_says_is_checked_against_pinned_roots(ca, tmp_path, pytestconfig):
    alice, home = admin(ca, "alice", "viewer"), ca.directory.parent / "alice"
    ca.json("workload", "add", "shop/api")
    token = ca.directory.parent / "memory.json"
    proved = []
    watch = "audit", "watch", "shop/api", "--once"
    for _ in range(50):  # a head is signed once in a while, not for every entry
        if ca.run(*watch).stdout:
            break
    for words in (["--root-fp", ca.json("info")["root_fingerprint"]], [], ["--state", str(token)]):
        for who in ([], alice):
            done = ca.run(*who, *watch, *words)
            assert (done.returncode, "entries hold" in done.stderr) == (0, True), done
            proved.append([json.loads(line)["action"] for line in done.stdout.splitlines()])
    assert proved[:5] == [["workload.add"]] * 5
    assert proved[5] == []  # remembered
    assert json.loads(token.read_text())["trust_domain"] == "cli.test"
    for words in (["audit", "watch", "shop/api", "--once"], ["audit", "prove", "--certificate", str(home / "chain.pem")]):
        for pin, code in (("ab" * 32, "bundle.root"), ("AB", "log.root")):
            done = ca.run(*words, "--root-fp", pin)
            assert (done.returncode != 0, f"[{code}]" in done.stderr) == (True, True), done
    found = ca.json(*alice, "audit", "prove", "--certificate", str(home / "chain.pem"))
    assert found["entry"]["detail"]["spiffe_id"] == "spiffe://cli.test/admin/alice"
    # another CA in the place of the one that the memory is of
    other = CA(tmp_path / "other" / "ca", pytestconfig.rootpath)
    other.directory.parent.mkdir()
    other.json("init", "--trust-domain", "cli.test")
    other.start()
    try:
        assert "[cert.untrusted]" in other.run("audit", "watch", "shop/api", "--once", "--state", str(token)).stderr
    finally:
        other.server.terminate()
        other.server.communicate(timeout=30)


def test_tokens_are_watched_proved_and_none_is_shown(tmp_path, pytestconfig):
    ca = CA(tmp_path / "ca", pytestconfig.rootpath)
    ca.json("init", "--trust-domain", "reg.test")
    with closing(Plane.open(ca.directory, time.time)) as plane:
        joined = Joined(plane.enroll(make_attempt(plane, "a").request(plane)))
        plane.placements.add(WorkloadAdd(name="shop/api", host="a"), plane.now, "t")
        asked = JwtRequest(workload="shop/api", instance=0, audience=["db", "queue"])
        token = plane.jwt_svid(plane.caller(joined.der)[0], asked).token
        plane.seal()
    file = tmp_path / "token.jwt"
    file.write_text(token + "\n")
    ca.start()
    try:
        done = ca.run("audit", "watch", "shop/api", "--once")
        assert done.returncode == 0, done.stderr
        (seen,) = [one for one in map(json.loads, done.stdout.splitlines()) if one["kind"] == "jwt"]
        assert (seen["actor"], seen["action"], seen["subject"]) == ("a", "issue", "spiffe://reg.test/wl/shop/api")
        assert seen["detail"] == jwt.about(token)
        (listed,) = [e for e in ca.json("audit", "list") if e["kind"] == "jwt"]
        assert listed["detail"] == seen["detail"]
        assert ca.json("audit", "verify")["size"] > seen["leaf"]
        proved = ca.json("audit", "prove", "--jwt", str(file))
        assert (proved["entry"]["kind"], proved["index"]) == ("jwt", seen["leaf"])
        assert f"entry {seen['leaf']} of" in ca.run("audit", "prove", "--jwt", str(file)).stdout
        head, body, signature = token.split(".")
        assert signature not in done.stdout + json.dumps([listed, proved]) + ca.log()
        # one that the CA's key signed beside the log
        beside = json.loads(unb64(body)) | {"aud": ["elsewhere"]}
        file.write_text(f"{head}.{b64(json.dumps(beside).encode())}.{signature}")
        assert ca.fails("audit", "prove", "--jwt", str(file))[1]["code"] == "log.unknown"
        file.write_text("not a token")
        assert ca.fails("audit", "prove", "--jwt", str(file))[1]["code"] == "jwt.form"
    finally:
        ca.stop()


def test_an_owner_and_a_key_made_elsewhere(ca):
    out = ca.directory.parent / "pat"
    request = ca.run("admin", "request", "--out", str(out))
    assert request.returncode == 0
    csr = ca.directory.parent / "pat.csr"
    csr.write_text(request.stdout)
    key = (out / "key.pem").read_bytes()
    pat = admin(ca, "pat", "registrar", "--scope", "payments/*", "--csr", str(csr))
    assert (out / "key.pem").read_bytes() == key
    assert ca.json(*pat, "workload", "add", "payments/api")["name"] == "payments/api"
    assert ca.fails(*pat, "workload", "add", "shop/api")[1]["code"] == "admin.scope"
    assert ca.fails(*pat, "token", "create", "--host", "web-1")[1]["code"] == "admin.scope"
    assert ca.fails("admin", "add", "x", "--role", "root", "--out", str(out))[0] == 2
    assert ca.fails("admin", "certify", "ghost", "--out", str(out))[1]["code"] == "admin.unknown"


def test_entries(ca):
    ca.json("workload", "add", "shop/api", "--label", "role=api")
    made = ca.json(
        "entry", "create", "shop/api", "--parent", "web-*", "-s", "uid:33", "-s", "unit:api.service", "--ends-at", "+1h", "--hint", "main"
    )
    assert (made["selectors"], made["hosts"], made["hint"]) == (["uid:33", "unit:api.service"], [], "main")
    assert [e["id"] for e in ca.json("entry", "list")] == [made["id"]]
    assert made["id"] in ca.run("entry", "show", made["id"]).stdout
    for words, code in (
        (["-s", "path:/usr/bin/api"], "entry.selectors"), (["-s", "uid:33"], "entry.selectors"), ([], "entry.selectors"),
        (["-s", "uid:65534", "-s", "unit:a.service"], "entry.nobody"), (["-s", "uid:33", "-s", "unit:a.service", "--ends-at", "soon"], "lease.time"),
        (["-s", "uid:33", "-s", "cgroup:/a\x1b[2J"], "entry.cgroup"),
    ):  # fmt: skip
        assert ca.fails("entry", "create", "shop/api", "--parent", "web-*", *words)[1]["code"] == code
    found = ca.run("explain", "identity", "shop/api")
    assert found.returncode == 1
    assert "uid:33 unit:api.service" in found.stdout
    assert ca.json("entry", "delete", made["id"])["id"] == made["id"]
    assert ca.fails("entry", "show", made["id"])[1]["code"] == "entry.unknown"


def test_ends(ca):
    ca.json("workload", "add", "job")
    helper = ca.json("workload", "add", "helper", "--ends-with", "job")
    assert helper["ends_with"] == "job"
    assert ca.json("workload", "life", "helper", "--forever")["ends_with"] is None
    assert ca.json("workload", "life", "helper", "--ends-at", "2099-01-01T00:00:00Z")["ends_at"] == 4070908800
    for words, code in (
        (["--ends-at", "2001-01-01"], "lease.past"), (["--ends-at", "+1y"], "lease.time"), (["--ends-with", "helper"], "lease.itself"),
        (["--ends-with", "ghost"], "lease.with"), ([], "usage"), (["--forever", "--ends-at", "+1h"], "usage"),
    ):  # fmt: skip
        assert ca.fails("workload", "life", "helper", *words)[1]["code"] == code
    assert "2099-01-01" in ca.run("workload", "list").stdout


def test_the_directory_is_no_argument_of_help(ca):
    for words in (["admin", "--help"], ["entry", "create", "--help"], ["approve", "--help"], ["workload", "life", "--help"]):
        done = ca.run(*words)
        assert (done.returncode, "Usage: retinue-ca" in done.stdout) == (0, True)
    assert os.environ.get("RETINUE_ADMIN_IDENTITY") is None
