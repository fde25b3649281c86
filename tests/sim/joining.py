"""Hosts that join a plane without sockets, by the real enrolment."""

from __future__ import annotations

from ca.plane import Plane
from identity.wire.enroll import EnrollReply
from tests.unit.ca.conftest import make_attempt, make_csr

__all__ = ["join", "make_csr"]


def join(plane: Plane, host: str) -> EnrollReply:
    """Token, challenge, proofs, certificate: `host` is enrolled afterwards."""
    return plane.enroll(make_attempt(plane, host).request(plane))
