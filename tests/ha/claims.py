"""``python -m tests.ha.claims [--rounds 100] [--at-once 50]``: one token, many machines at once, two CA processes.

Every machine has keys of its own and asks one of the two processes; exactly one may get in, and the database must hold
exactly one host and one certificate for it. Prints one line; exit status 1 when any round went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sqlalchemy import func, select

from ca import schema
from ca.store import Store
from identity import certs
from identity.enrollment import JoinToken, Offer, prove
from identity.errors import RetinueError
from identity.keys import b64, ed25519_public, unb64, x25519_public
from identity.wire import Message
from identity.wire.admin import Token, TokenCreate
from identity.wire.enroll import Challenge, ChallengeRequest, EnrollReply, EnrollRequest
from mesh.control import Busy, ControlClient, R, RootPin
from tests.ha.processes import Process, pair
from tests.postgres_server import server


@dataclass
class Machine:
    """One that tries to join: it connects once and keeps its connection."""

    client: ControlClient
    tunnel: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    csr: str = field(default_factory=lambda: certs.make_csr(ec.generate_private_key(ec.SECP256R1())))

    async def enrol(self, token: JoinToken, ready: asyncio.Barrier | None = None) -> str:
        """Its name, or the code of the refusal. `ready`: everybody has a challenge before anybody claims."""
        challenge = await self._ask("/v1/enroll/challenge", ChallengeRequest(token_id=token.id), Challenge)
        offer = Offer(
            token.id, unb64(challenge.nonce), self.client.server_leaf, unb64(challenge.server_key), self.csr,
            x25519_public(self.tunnel), ed25519_public(self.key), (), ("chacha20poly1305",),
        )  # fmt: skip
        proofs = prove(offer, token, self.tunnel, self.key)
        request = EnrollRequest(
            token_id=token.id, nonce=challenge.nonce, csr=offer.csr, tunnel_key=b64(offer.tunnel_key),
            enroll_key=b64(offer.enroll_key), token_proof=b64(proofs.token), tunnel_proof=b64(proofs.tunnel),
            enroll_proof=b64(proofs.enroll), underlay=[], ciphers=["chacha20poly1305"],
        )  # fmt: skip
        if ready is not None:
            await ready.wait()
        try:
            reply = await self._ask("/v1/enroll", request, EnrollReply)
        except RetinueError as e:
            return e.code
        return reply.endpoint


    async def _ask(self, path: str, message: Message, reply: type[R]) -> R:
        """As an honest client: who is told to come back later does."""
        while True:
            try:
                return await self.client.post(path, message, reply)
            except Busy as e:
                await asyncio.sleep(e.retry_after)


async def rounds(processes: list[Process], address: str, count: int, at_once: int) -> list[str]:
    """What went wrong, one line each; empty is good."""
    wrong: list[str] = []
    for n in range(count):
        name = f"h{n}"
        made = await asyncio.to_thread(
            processes[n % len(processes)].admin.post, "/v1/tokens", TokenCreate(host=name), Token
        )
        token = JoinToken.parse(made.token)
        clients = [ControlClient(processes[m % len(processes)].url, RootPin(token.root_fingerprint)) for m in range(at_once)]
        ready = asyncio.Barrier(at_once)
        try:
            outcomes = Counter(await asyncio.gather(*(Machine(c).enrol(token, ready) for c in clients)))
        finally:
            await asyncio.gather(*(c.close() for c in clients))
        if outcomes != Counter({name: 1, "token.used": at_once - 1}):
            wrong.append(f"round {n}: {dict(outcomes)}")
    store = Store.open_shared(address)
    with store.read() as tx:
        hosts = tx.execute(select(func.count()).select_from(schema.endpoints)).scalar_one()
        c = schema.serials.c
        each = tx.execute(select(c.endpoint, func.count()).where(c.profile == "endpoint").group_by(c.endpoint)).all()
    store.close()
    if hosts != count or sorted(each) != sorted((f"h{n}", 1) for n in range(count)):
        wrong.append(f"{hosts} hosts and {sum(n for _, n in each)} certificates for {count} tokens")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=50)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retinue-claims-") as root, server() as postgres:
        address = postgres.database()
        began = time.monotonic()
        with pair(Path(root), address, time.time()) as processes:
            wrong = asyncio.run(rounds(processes, address, asked.rounds, asked.at_once))
    print(f"{asked.rounds} tokens, {asked.at_once} machines each, two processes: {len(wrong)} rounds wrong, {time.monotonic() - began:.0f} s")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
