"""Who asks on the administrators' API: keys under which a request carries it."""

from __future__ import annotations

from aiohttp import web

ACTOR = web.RequestKey("actor", str)  # as the audit names them
