"""The transparency log over HTTP: proofs for endpoints; entries and proofs for whoever watches on the admin socket."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from ca import transparency
from ca.http import number, text
from ca.plane import Plane
from ca.service import Service
from ca.transparency import hexes
from identity.errors import BadInput, NotFound
from identity.wire.log import LeafProof, LogReply, LogRequest

MAX_ENTRIES: Final = 1000  # of one answer


def prove(plane: Plane, asked: LogRequest) -> LogReply:
    """The newest head, that it continues the one the asker remembers, and the asked leaves in it. Raises BadInput."""
    with plane.store.read() as tx:
        head = plane.log.head(tx)
        consistency: list[bytes] = []
        if asked.timeline == plane.store.timeline:
            if asked.size <= head.size:
                consistency = plane.log.consistency(tx, asked.size, head.size)
            else:
                raise BadInput(
                    "log.size", f"this log has {head.size} entries, fewer than the {asked.size} that were seen",
                    hint="remember the head you have; it proves that entries are missing here",
                )  # fmt: skip
        proofs = plane.log.inclusions(tx, asked.leaves, head.size)
    return LogReply(
        head=plane.tree_head(head), consistency=hexes(consistency),
        proofs={leaf: LeafProof(index=index, path=hexes(path)) for leaf, (index, path) in proofs.items()},
    )  # fmt: skip


def routes(service: Service) -> list[web.RouteDef]:
    """For administrators: GET /v1/log (entries by place, with the newest head) and GET /v1/log/proof."""
    plane = service.plane

    async def entries(request: web.Request) -> web.Response:
        first, limit = number(request, "first") or 0, number(request, "limit") or MAX_ENTRIES
        if not 1 <= limit <= MAX_ENTRIES:
            raise BadInput("api.query", f"limit is 1 to {MAX_ENTRIES}")

        def run() -> dict[str, object]:
            with plane.store.read() as tx:
                head = plane.log.head(tx)
                found = [e.as_dict() for e in transparency.placed(tx, first, limit) if e.leaf is not None and e.leaf < head.size]
            return {"head": plane.tree_head(head), "size": head.size, "root": head.root, "entries": found, "bundle": plane.bundle}

        return web.json_response(await service.read(run))

    async def proof(request: web.Request) -> web.Response:
        leaf = text(request, "leaf")

        def run() -> dict[str, object]:
            with plane.store.read() as tx:
                head, entry = plane.log.head(tx), plane.log.find(tx, leaf)
                found = plane.log.inclusion(tx, leaf, head.size)
            if found is None:
                raise NotFound("log.waiting", "that entry has no place in the tree yet", hint="ask again after the next heartbeat")
            return {
                "entry": entry.as_dict(), "index": found[0], "path": hexes(found[1]), "size": head.size, "root": head.root,
                "head": plane.tree_head(head), "bundle": plane.bundle,
            }  # fmt: skip

        return web.json_response(await service.read(run))

    return [web.get("/v1/log", entries), web.get("/v1/log/proof", proof)]

