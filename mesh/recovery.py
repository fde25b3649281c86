"""Coming back to a CA that this machine has not heard of for long: its trust is brought up to date, then it proves who it is.

    the public bundle, from anybody -> opened by the roots known here, over the roots' word on each other -> newer trust
    that trust -> the server is verified -> proof by enrolment key, tunnel key and newest certificate -> new certificate

Placements are not part of it: they come over the feed afterwards, as they are then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from identity import certs
from identity.bundle import TrustBundle, open_bundle
from identity.enrollment import FINGERPRINT
from identity.errors import BadInput, NotVerified
from identity.keys import b64, ed25519_public, unb64, x25519_public
from identity.recovery import Return, prove
from identity.wire.enroll import Challenge, Cipher, RenewReply
from identity.wire.recovery import BundleReply, RecoverChallengeRequest, RecoverRequest
from mesh.control import ControlClient, Unverified, check_url
from mesh.enroll import Clock, Enrollment, accept_renewal, check_underlay, load_enrollment, renewal_key

# What the CA, or our own check of it, says when the trust held here is too old, or our certificate is of no use.
OF_NO_USE: Final = frozenset({
    "cert.revoked", "cert.expired", "cert.untrusted", "caller.certificate", "ca.tls", "ca.disconnected",
})  # fmt: skip


async def public_bundle(url: str, *, clock: Clock = time.time) -> str:
    """The bundle's envelope as the server shows it to anybody; not verified in any way."""
    async with ControlClient(url, Unverified(), clock=clock) as client:
        return (await client.get("/v1/bundle", BundleReply)).bundle


async def newer_trust(url: str, trust: TrustBundle, *, clock: Clock = time.time) -> TrustBundle:
    """The CA's bundle now, on the strength of the one known here.

    Raises NotVerified ``recover.trust`` when nothing known here vouches for it; Unreachable.
    """
    envelope = await public_bundle(url, clock=clock)
    try:
        return trust.accept_next(envelope, clock())
    except NotVerified as e:
        raise NotVerified(
            "recover.trust", f"the CA's bundle does not follow from the one known here: {e.message}",
            hint="if its root was changed: retinue rebootstrap --root-fp FINGERPRINT, as retinue-ca info prints it",
        ) from None  # fmt: skip


def useless(enrollment: Enrollment, trust: TrustBundle, now: float) -> bool:
    """Is our certificate over, or not believed any more?"""
    try:
        trust.verify_svid(enrollment.svid.chain[:-1], now)
    except NotVerified:
        return True
    return False


async def recover(
    enrollment: Enrollment, trust: TrustBundle, underlay: Sequence[str], ciphers: Sequence[Cipher],
    *, clock: Clock = time.time,
) -> Enrollment:  # fmt: skip
    """A new certificate by the enrolment key. Raises what the CA answered: Refused ``recover.budget``,
    ``caller.quarantined``; NotVerified ``recover.refused``.
    """
    hints = check_underlay(underlay)
    tls = renewal_key(enrollment.directory)
    async with ControlClient(enrollment.ca_url, trust, clock=clock) as client:
        challenge = await client.post(
            "/v1/recover/challenge", RecoverChallengeRequest(endpoint=enrollment.endpoint), Challenge
        )
        said = Return(
            endpoint=enrollment.endpoint, serial=f"{enrollment.svid.serial:x}", nonce=unb64(challenge.nonce),
            server_leaf=client.server_leaf, server_key=unb64(challenge.server_key, length=32), csr=certs.make_csr(tls),
            tunnel_key=x25519_public(enrollment.tunnel_key), enroll_key=ed25519_public(enrollment.enroll_key),
            underlay=tuple(hints), ciphers=tuple(ciphers),
        )  # fmt: skip
        tunnel_proof, enroll_proof = prove(said, enrollment.tunnel_key, enrollment.enroll_key)
        request = RecoverRequest(
            endpoint=said.endpoint, serial=said.serial, nonce=challenge.nonce, csr=said.csr, tunnel_proof=b64(tunnel_proof),
            enroll_proof=b64(enroll_proof), underlay=hints, ciphers=list(ciphers),
        )  # fmt: skip
        reply = await client.post("/v1/recover", request, RenewReply)
    return accept_renewal(enrollment, trust, reply, tls, int(clock()))


async def rebootstrap(
    state_dir: Path, root_fingerprint: str, *, ca_url: str | None = None, clock: Clock = time.time
) -> Enrollment:
    """Believe another root, by a fingerprint that a person brought, and come back under it with the keys held here.

    Raises BadInput ``root.fingerprint``; NotVerified ``bundle.root`` when the CA does not show that root; what `recover`
    raises.
    """
    pin = root_fingerprint.strip().lower().replace(":", "")
    if not FINGERPRINT.fullmatch(pin):
        raise BadInput(
            "root.fingerprint", "not a fingerprint: 64 hexadecimal digits", hint="retinue-ca info prints it"
        )
    enrollment = load_enrollment(state_dir)
    url = check_url(ca_url or enrollment.ca_url)
    envelope = await public_bundle(url, clock=clock)
    trust = open_bundle(envelope, pin, enrollment.trust_domain, clock())
    record = enrollment.record
    return await recover(enrollment, trust, record.underlay, record.ciphers, clock=clock)
