"""Who asks on the administrators' API: keys under which a request carries it."""

from __future__ import annotations

from aiohttp import web

from ca.roles import Principal

ACTOR = web.RequestKey("actor", str)  # as the audit names them
PRINCIPAL = web.RequestKey("principal", Principal)
