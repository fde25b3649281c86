"""Support bundles, the files: keys of a directory are known, logs are read from their end, nothing is overwritten."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from identity.errors import BadInput
from identity.keys import private_pem
from identity.support import Redactor
from mesh.support import listing, secrets_of, tail, write


def test_keys_of_a_directory_are_known(tmp_path: Path) -> None:
    made = {"tls.key": private_pem(ec.generate_private_key(ec.SECP256R1())), "sub/tunnel.key": private_pem(X25519PrivateKey.generate())}
    (tmp_path / "sub").mkdir()
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "not.key").symlink_to("/etc/passwd")
    (tmp_path / "bad.key").write_bytes(b"x" * 50)
    redactor = Redactor(secrets_of(tmp_path))
    for data in made.values():
        assert redactor.holds(data)
    assert redactor.holds(b"x" * 50)
    assert not redactor.holds(b"root:x:0:0:root:/root:/bin/bash")


def test_files(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\nthree\n")
    assert (tail(log), tail(log, 9)) == ("one\ntwo\nthree\n", "three\n")
    assert "log" in listing(tmp_path)
    assert "three" not in listing(tmp_path)
    assert listing(tmp_path / "none") == "\n"
    out = tmp_path / "out.tar.gz"
    write(out, b"data")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    for call in (lambda: write(out, b"again"), lambda: tail(tmp_path / "none")):
        with pytest.raises(BadInput):
            call()
    assert out.read_bytes() == b"data"
