"""Root and intermediate keys in a token: SoftHSM stands for the hardware."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from ca import rotation
from ca.authority import Authority
from ca.jwt_authority import AFTER, AHEAD, LIFE, JwtAuthority
from ca.keyring import FileKeys
from ca.keystores import KeyPlace
from identity import certs, jwt
from identity.errors import BadState, Conflict
from identity.names import SpiffeId, TrustDomain

NOW = 1_800_000_000
TD = TrustDomain("prod.example")
MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
MODULE = next((m for m in MODULES if os.path.exists(m)), None)

pkcs11 = pytest.importorskip("ca.pkcs11")
pytestmark = pytest.mark.skipif(
    MODULE is None or pkcs11.pkcs11 is None or shutil.which("softhsm2-util") is None, reason="softhsm2 is not installed"
)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> KeyPlace:
    """One token for all tests: the library reads its configuration once a process."""
    base = tmp_path_factory.mktemp("hsm")
    (base / "tokens").mkdir()
    (base / "conf").write_text(f"directories.tokendir = {base}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(base / "conf")
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "retinue", "--so-pin", "12345678", "--pin", "0000"],
        check=True, capture_output=True,
    )  # fmt: skip
    (base / "pin").write_text("0000\n")
    (base / "pin").chmod(0o600)
    return KeyPlace(backend="pkcs11", module=str(MODULE), token="retinue", pin_file=str(base / "pin"))


def test_an_authority_whose_keys_never_leave_the_token(token: KeyPlace, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", TD, NOW, place=token)
    # Ed25519 record keys are files; the keys of certificates are nowhere on this disk.
    assert {p.name for p in (tmp_path / "ca").glob("*.key")} == {"records.key", "policy.key"}
    start = authority.trust_bundle(1, NOW)
    host = SpiffeId.endpoint(TD, "web-1")
    request = certs.make_csr(ec.generate_private_key(ec.SECP256R1()))
    start.verify_svid(authority.issue_endpoint(request, host, NOW), NOW, expect=host)
    for kind in ("intermediate", "root"):
        rotation.prepare(authority, kind, NOW)
        rotation.activate(authority, kind, NOW)
        rotation.revoke(authority, kind, NOW)
    latest = start.accept_next(authority.bundle(2, NOW), NOW)
    latest.verify_svid(authority.issue_endpoint(request, host, NOW), NOW)
    assert not authority.keys.has("root")
    assert authority.keys.has("root-2")
    key = authority.keys._find("root-2", pkcs11.pkcs11.ObjectClass.PRIVATE_KEY)  # type: ignore[attr-defined]  # TokenKeys
    assert key[pkcs11.pkcs11.Attribute.EXTRACTABLE] is False
    with pytest.raises(pkcs11.pkcs11.exceptions.PKCS11Error):
        _ = key[pkcs11.pkcs11.Attribute.VALUE]
    assert "SoftHSM" not in repr(authority)


def test_a_wrong_pin_token_or_library_is_told(token: KeyPlace, tmp_path: Path) -> None:
    files = FileKeys(tmp_path)
    pin = tmp_path / "pin"
    pin.write_text("0000")
    pin.chmod(0o644)
    for module, label, file, code in (
        (token.module, "retinue", pin, "pkcs11.pin"), (token.module, "retinue", tmp_path / "none", "pkcs11.pin"),
        (token.module, "other", Path(token.pin_file), "pkcs11.token"), ("/nonexistent.so", "retinue", Path(token.pin_file), "pkcs11.token"),
    ):  # fmt: skip
        with pytest.raises(BadState) as e:
            pkcs11.TokenKeys(Path(module), label, file, files)
        assert e.value.code == code
        assert "0000" not in str(e.value)


def test_a_name_is_made_once(token: KeyPlace, tmp_path: Path) -> None:
    keys = pkcs11.TokenKeys(Path(token.module), token.token, Path(token.pin_file), FileKeys(tmp_path))
    keys.make("intermediate-99", "p256")
    with pytest.raises(Conflict):
        keys.make("intermediate-99", "p256")
    keys.destroy("intermediate-99")
    with pytest.raises(BadState) as e:
        keys.open("intermediate-99")
    assert e.value.code == "state.key"


def test_tokens_are_signed_in_the_token(token: KeyPlace, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", TD, NOW, place=token)
    tokens = JwtAuthority.load(tmp_path / "ca", NOW, authority.keys)
    web = SpiffeId.workload(TD, "web")
    text, _ = tokens.sign(web, ["db"], NOW)
    assert jwt.verify(text, "db", {TD.name: tokens.published()}, NOW, own=TD.name).spiffe_id == web
    assert not list((tmp_path / "ca").glob("jwt-*.key"))
    kid = tokens.published()[0].kid
    assert authority.keys.has(f"jwt-{kid}")
    assert tokens.maintain(NOW + LIFE - AHEAD)
    assert tokens.maintain(NOW + LIFE + AFTER)
    assert not authority.keys.has(f"jwt-{kid}")
