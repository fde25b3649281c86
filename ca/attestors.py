"""By what a machine may join: one attestor for each kind of evidence, chosen by the request's `attestor`.

A further kind is a class with `attest` (ca/enroll.py, Attestor) and one entry here. What it grants is a token, claimed in the
transaction that inserts the host; so every kind has one winner, a lost reply that can be repeated, and an audit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ca.enroll import Attestor, JoinTokenAttestor
from ca.x509pop import DeviceAttestor
from identity.device import ATTESTOR as DEVICE
from identity.errors import BadInput
from identity.keys import b64
from identity.wire.enroll import EnrollRequest

if TYPE_CHECKING:
    from ca.plane import Plane

TOKEN: Final = "token"
GRANT_S: Final = 60

Make = Callable[["Plane", EnrollRequest], Attestor]


def _token(plane: Plane, request: EnrollRequest) -> Attestor:
    return JoinTokenAttestor(plane.joining.evidence(plane.registry.token(request.token_id)))


def _device(plane: Plane, _: EnrollRequest) -> Attestor:
    def grant(token_id: str, host: str, replace: bool) -> None:
        if plane.registry.token(token_id) is not None:
            return  # a repeated attempt: the claim judges it
        with plane.store.write() as tx:
            granted = plane.registry.grant_host(tx, host, replace=replace, now=plane.now, ttl=GRANT_S)
            # Nobody has the private half: it can be claimed by this attempt and by no token text.
            plane.registry.add_token(token_id, b64(os.urandom(32)), granted, tx, plane.now, "x509pop")

    return DeviceAttestor(plane.directory, grant)


ATTESTORS: Final[dict[str, Make]] = {TOKEN: _token, DEVICE: _device}


def attestor_for(plane: Plane, request: EnrollRequest) -> Attestor:
    """Raises BadInput ``attestor.unknown``."""
    make = ATTESTORS.get(request.attestor)
    if make is None:
        raise BadInput("attestor.unknown", f"no attestor named {ascii(request.attestor)[:40]}", hint=f"known: {', '.join(ATTESTORS)}")
    return make(plane, request)
