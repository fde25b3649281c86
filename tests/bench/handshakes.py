"""Handshakes a second of a responder with many peers: the same recorded initiations, in the same order, for every engine.

The initiations are made before the clock starts (WireGuard paper, section 5.4.2). One sender keeps WINDOW of them on their way and
sends the next for every response, so no engine comes under load and asks for cookies; answers other than responses are not counted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from identity.keys import x25519_public
from tests.bench.measures import Row
from tests.bench.rig import Pair, wait_for
from tests.bench.subjects import UAPI_DIR, engine_program, uapi_set, wireguard_go

PEERS, EACH, WINDOW = 1500, 4, 32
SIZE = 148
PORT = 51990
DRIVE = """
import json, socket, sys, time
data = open(sys.argv[1], "rb").read()
messages = [data[i:i + 148] for i in range(0, len(data), 148)]
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((sys.argv[2], int(sys.argv[3]))); s.settimeout(1)
todo, done, other = iter(messages), 0, 0
start = last = time.perf_counter()
for _ in range(int(sys.argv[4])): s.send(next(todo))
while True:
    try: answer = s.recv(256)
    except TimeoutError: break
    if answer[0] != 2 or len(answer) != 92: other += 1
    else: done += 1; last = time.perf_counter()
    message = next(todo, None)
    if message is not None: s.send(message)
    elif done + other == len(messages): break
print(json.dumps([len(messages), done, other, last - start]))
"""


def _hash(*parts: bytes) -> bytes:
    return hashlib.blake2s(b"".join(parts)).digest()


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.blake2s).digest()


def _kdf2(key: bytes, data: bytes) -> tuple[bytes, bytes]:
    secret = _hmac(key, data)
    first = _hmac(secret, b"\1")
    return first, _hmac(secret, first + b"\2")


def initiation(responder: X25519PrivateKey, initiator: X25519PrivateKey, index: int, stamp: float) -> bytes:
    """A first handshake message, 148 bytes."""
    there, own = responder.public_key(), x25519_public(initiator)
    to = there.public_bytes_raw()
    chain = _hash(b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s")
    digest = _hash(_hash(chain, b"WireGuard v1 zx2c4 Jason@zx2c4.com"), to)
    ephemeral = X25519PrivateKey.generate()
    public = x25519_public(ephemeral)
    chain, digest = _hmac(_hmac(chain, public), b"\1"), _hash(digest, public)
    chain, key = _kdf2(chain, ephemeral.exchange(there))
    static = ChaCha20Poly1305(key).encrypt(bytes(12), own, digest)
    digest = _hash(digest, static)
    chain, key = _kdf2(chain, initiator.exchange(there))
    tai64n = struct.pack(">QI", 2**62 + 10 + int(stamp), int(stamp % 1 * 1e9))
    sealed = ChaCha20Poly1305(key).encrypt(bytes(12), tai64n, digest)
    body = b"\1\0\0\0" + struct.pack("<I", index) + public + static + sealed
    return body + hashlib.blake2s(body, key=_hash(b"mac1----", to), digest_size=16).digest() + bytes(16)


def handshakes(pair: Pair, rounds: int) -> list[tuple[str, Row]]:
    """(subject, row) of every round, engines interleaved; every round meets a fresh engine."""
    responder = X25519PrivateKey.generate()
    peers = [X25519PrivateKey.generate() for _ in range(PEERS)]
    began = time.time() - 60
    recorded = b"".join(
        initiation(responder, peer, number * EACH + turn, began + turn) for turn in range(EACH) for number, peer in enumerate(peers)
    )
    config = f"private_key={responder.private_bytes_raw().hex()}\nlisten_port={PORT}\n"
    config += "".join(
        f"public_key={x25519_public(peer).hex()}\nallowed_ip=100.{64 + n // 65536}.{n // 256 % 256}.{n % 256}/32\n"
        for n, peer in enumerate(peers)
    )  # fmt: skip
    out: list[tuple[str, Row]] = []
    with tempfile.TemporaryDirectory(prefix="retinue-bench-") as directory:
        path = Path(directory, "initiations")
        path.write_bytes(recorded)
        engines = [("retinue bare", engine_program(), Path(directory))]
        engines += [(f"wireguard-go {version.removeprefix('v')}", [program, "-f"], UAPI_DIR) for program, version in wireguard_go()]
        for number in range(rounds):
            for subject, program, where in engines:
                try:
                    out.append((subject, ("handshakes", _round(pair, program, where, f"rbh{number}", config, path), "1/s")))
                except (RuntimeError, OSError, subprocess.TimeoutExpired, ValueError) as e:
                    print(f"  left out handshakes of {subject}: {e}", file=sys.stderr)
    return out


def _round(pair: Pair, program: list[str], where: Path, name: str, config: str, recorded: Path) -> float:
    control = where / f"{name}.sock"
    process = pair.spawn(1, *program, name, env={"WG_UAPI_DIR": str(where), "WG_PROCESS_FOREGROUND": "1"})
    try:
        wait_for(program[0], [control])
        uapi_set(control, config)
        pair.at(1, "ip", "link", "set", name, "up")
        argv = (sys.executable, "-IS", "-c", DRIVE, str(recorded), pair.underlay[1], str(PORT), str(WINDOW))
        sent, done, other, seconds = json.loads(pair.at(0, *argv))
    finally:
        process.terminate()
        process.wait(10)
        pair.processes.remove(process)
    if done < 0.98 * sent:
        raise RuntimeError(f"{done} responses and {other} other answers to {sent} initiations")
    return float(done / seconds)
