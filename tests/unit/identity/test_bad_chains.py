"""Bad chains are refused with the right reason; OpenSSL is asked about each of them too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from identity import certs
from identity.errors import NotVerified
from tests.unit.identity.bad_chains import Case, cases, inside, items, resigned, wrap
from tests.unit.identity.conftest import NOW, Forge

FORGE = Forge()
CASES = list(cases(FORGE))
BAD = [c for c in CASES if c.code is not None]


def judge(case: Case) -> str | None:
    try:
        certs.verify_chain(case.chain, [FORGE.root.cert] if case.roots is None else case.roots, FORGE.trust_domain, case.now)
    except NotVerified as e:
        return e.code
    return None


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_each_chain_is_judged_for_the_right_reason(case: Case) -> None:
    assert judge(case) == case.code


def test_there_are_enough_of_them() -> None:
    assert len(BAD) >= 60
    assert len({c.name for c in CASES}) == len(CASES)
    assert len({c.code for c in BAD}) >= 18


def openssl_accepts(case: Case, directory: Path) -> bool:
    """What `openssl verify` says at the case's time: path, times, constraints; no purpose, which our profile replaces."""

    def write(name: str, several: list[x509.Certificate]) -> str:
        path = directory / name
        path.write_bytes(b"".join(c.public_bytes(Encoding.PEM) for c in several))
        return str(path)

    roots = [FORGE.root.cert] if case.roots is None else case.roots
    argv = ["openssl", "verify", "-attime", str(int(case.now)), "-no-CApath", "-no-CAfile", "-check_ss_sig"]
    if roots:
        argv += ["-CAfile", write("roots", roots)]
    if case.chain[1:]:
        argv += ["-untrusted", write("others", case.chain[1:])]
    done = subprocess.run([*argv, write("leaf", case.chain[:1])], capture_output=True, text=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("case", [c for c in CASES if c.chain], ids=lambda c: c.name)
def test_openssl_agrees_where_the_profile_is_rfc_5280(case: Case, tmp_path: Path) -> None:
    """Never is a chain accepted here that OpenSSL refuses; where it accepts more, the rule is SPIFFE's or ours."""
    theirs = openssl_accepts(case, tmp_path)
    if case.code is None:
        # To OpenSSL the last second of a certificate is already too late.
        assert theirs == (case.openssl == "agrees"), "accepted here, refused by OpenSSL"
    else:
        assert theirs == (case.openssl == "laxer"), case.openssl


def test_unreadable_certificates_are_refused_as_such() -> None:
    leaf = FORGE.leaf().cert
    der = leaf.public_bytes(Encoding.DER)
    parts = items(inside(der))
    long_form = b"\x30\x83\x00" + len(inside(der)).to_bytes(2, "big") + inside(der)
    indefinite = b"\x30\x80" + inside(der) + b"\0\0"
    padded = resigned(FORGE, leaf, lambda p: [p[0], bytes.fromhex("02 02 00 01"), *p[2:]])
    no_serial = resigned(FORGE, leaf, lambda p: [p[0], *p[2:]])
    trailing = der + b"\0"
    for bad in (b"", b"junk", der[:-1], long_form, indefinite, padded, no_serial, trailing, wrap(0x31, inside(der)), parts[0]):
        with pytest.raises(NotVerified) as e:
            certs.verify_chain(certs.parse_der_chain([bad]), [FORGE.root.cert], FORGE.trust_domain, NOW)
        assert e.value.code in {"chain.syntax", "cert.syntax"}, bad[:8]
