"""Flows on the agent's local API.

    GET /v1/trace?src=&dst=&proto=&port=  -> this host's half of one flow's path (mesh.trace)
    GET /v1/flows?verdict=&since=&limit=&follow=1  -> JSON lines: first {"losses": {...}}, then one record a line
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Final

from aiohttp import web

from identity.errors import BadInput
from mesh.trace import trace
from policy.flows import VERDICTS, FlowRecord, dump_flows

if TYPE_CHECKING:
    from mesh.endpoint import Agent

LIMIT: Final = 100_000


def routes(agent: Agent) -> list[web.RouteDef]:
    """The routes of this module."""

    async def flows(request: web.Request) -> web.StreamResponse:
        query = request.query
        verdicts = frozenset(v for v in query.get("verdict", "").split(",") if v)
        try:
            since, limit = int(query.get("since", "0")), int(query.get("limit", "10000"))
        except ValueError:
            raise BadInput("flows.form", "since and limit are whole numbers") from None
        if verdicts - set(VERDICTS) or since < 0 or not 0 <= limit <= LIMIT:
            raise BadInput("flows.form", "not a question about flows",
                           hint=f"verdict: {', '.join(VERDICTS)}; limit: up to {LIMIT}")  # fmt: skip

        def wanted(one: FlowRecord) -> bool:
            return not verdicts or one.verdict in verdicts

        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        found = [one for one in await agent.recorder.history(since=since, limit=LIMIT) if wanted(one)]
        kept = found[max(0, len(found) - limit) :]
        text = json.dumps({"losses": agent.recorder.losses}) + "\n" + dump_flows(kept)
        # A reader that went away shows as a ConnectionError at the next write.
        with contextlib.suppress(ConnectionError):
            await response.write(text.encode())
            if query.get("follow"):
                async with contextlib.aclosing(agent.recorder.follow()) as news:
                    async for one in news:
                        if wanted(one):
                            await response.write(dump_flows([one]).encode())
        return response

    async def trace_flow(request: web.Request) -> web.StreamResponse:
        query = request.query
        try:
            src, dst, proto = query["src"], query["dst"], query.get("proto", "tcp")
            port = int(query["port"]) if "port" in query else None
        except (KeyError, ValueError):
            raise BadInput("trace.form", "trace needs src, dst, proto and perhaps a port") from None
        return web.Response(text=json.dumps(await trace(agent, src, dst, proto, port)) + "\n", content_type="application/x-ndjson")

    return [web.get("/v1/flows", flows), web.get("/v1/trace", trace_flow)]
