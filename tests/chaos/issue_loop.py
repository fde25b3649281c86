"""Issues workload certificates and says each serial once it is out of the door: what is killed in row F4."""

from __future__ import annotations

import sys
from pathlib import Path

from ca.plane import Plane
from identity import certs
from identity.wire.enroll import SvidRequest
from tests.sim.joining import make_csr

plane = Plane.open(Path(sys.argv[1]), lambda: 1_800_000_000.0)
caller = next(row for row in plane.registry.all() if row.name == "a")
for _ in range(12):
    reply = plane.svid(caller, SvidRequest(workload="w0", instance=0, csr=make_csr()))
    print(f"{certs.parse_chain(reply.chain)[0].serial_number:x}", flush=True)
plane.close()
