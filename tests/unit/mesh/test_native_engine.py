"""The native module: its primitives against other implementations, and the engine's command line."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from mesh import _native, engine_daemon


def run(*args: str, uapi_dir: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    if uapi_dir is not None:
        env["WG_UAPI_DIR"] = str(uapi_dir)
    return subprocess.run(
        [sys.executable, "-m", "mesh.engine_daemon", *args],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        check=False,
    )


@given(st.binary(max_size=400))
def test_blake2s_agrees_with_hashlib(data: bytes) -> None:
    assert bytes(_native.blake2s(data)) == hashlib.blake2s(data).digest()


@given(st.binary(min_size=32, max_size=32))
def test_public_keys_agree_with_cryptography(private: bytes) -> None:
    expected = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    assert bytes(_native.x25519_public(private)) == expected


def test_help_names_every_switch_and_shows_examples() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    switches = ("--foreground", "--workers", "--poll-us", "--low-power", "--mtu", "--no-tun-offload")
    for word in (*switches, "--no-udp-gso", "--no-udp-gro", "--log-level", "Examples:", "WG_UAPI_DIR"):
        assert word in done.stdout


def test_version_is_the_module_s() -> None:
    version, _, ciphers = run("--version").stdout.partition(" (")
    assert version == f"retinue-engine {_native.VERSION}"
    assert ciphers in ("ciphers: AVX-512)\n", "ciphers: AWS-LC)\n")  # which code does it depends on the processor


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ((), "interface name"),
        (("a/b",), "interface name"),
        (("wg0", "wg1"), "wg1"),
        (("--no-such", "wg0"), "--no-such"),
        (("--workers", "0", "wg0"), "--workers"),
        (("--mtu", "70000", "wg0"), "--mtu"),
        (("--log-level", "loud", "wg0"), "--log-level"),
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(args: tuple[str, ...], word: str) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert word in done.stderr
    assert "(hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unusable_socket_directory_is_status_4(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    done = run("--foreground", "ret-test0", uapi_dir=blocker)
    assert done.returncode == 4
    assert "UAPI socket" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_console_script_hands_over_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def fake(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    monkeypatch.setattr(engine_daemon, "engine_main", fake)
    monkeypatch.setattr(sys, "argv", ["retinue-engine", "-f", "wg0"])
    assert engine_daemon.main() == 7
    assert seen == [["-f", "wg0"]]
