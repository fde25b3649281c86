"""The door of the administrators' API: who is it, may they, and does it want a second person.

    unix socket   the kernel's word on the user: root or the CA's own user. It may do everything, alone: break-glass.
                  The first administrator is made here.
    TLS           a certificate of spiffe://TD/admin/NAME. Hosts, sidecars and workloads are refused.

What every route wants stands in ca/roles.py. Refusals are audited; so is what root does alone where two persons are
wanted, once there is anybody else.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import struct
from typing import Any

import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from ca import approvals, audit
from ca.http import BODY_S, Handler, peer_chain
from ca.principals import ACTOR, PRINCIPAL
from ca.roles import Principal, permit, rule_of
from ca.service import Service
from identity.cliout import clean
from identity.errors import BadInput, NoPrivilege, Refused, RetinueError

log = structlog.get_logger("retinue.ca.admin")

PREFIX = "/admin"  # of these routes beside the endpoints' own
_UCRED = struct.Struct("3i")  # pid, uid, gid: struct ucred, unix(7)
_QUIET = frozenset({"approval.pending"})


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end, by the kernel's word."""
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


def audited(service: Service) -> Middleware:
    """Acts are audited where they are done; what was refused, here."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RetinueError as e:
            error, actor, path = e, request.get(ACTOR, "admin:?"), request.path
            denied = error.code.startswith(("admin.", "cert.", "chain."))
            if (request.method != "GET" or denied) and error.code not in _QUIET:
                await service.read(lambda: service.plane.refused("admin", path, error, actor=actor))
            raise

    return middleware


def door(service: Service, max_body: int) -> Middleware:
    """Authentication and permission, before any handler."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        remote = request.transport is not None and request.transport.get_extra_info("ssl_object") is not None
        try:
            who = await _remote(service, request) if remote else _local(request)
        except RetinueError as e:
            log.warning("an administrator was refused", code=e.code, path=request.path, remote=request.remote)
            raise
        request[ACTOR], request[PRINCIPAL] = who.actor, who
        # The endpoints' limit holds for whoever is not known yet.
        asked = request.clone(client_max_size=max_body) if remote else request
        await _check(service, asked, who)
        return await handler(asked)

    return middleware


def _local(request: web.Request) -> Principal:
    connection = request.transport.get_extra_info("socket") if request.transport else None
    uid = peer_uid(connection) if connection is not None else -1
    if uid not in {0, os.geteuid()}:
        raise NoPrivilege(
            "admin.user", f"user id {uid} may not administer this CA",
            hint="run it as root or as the CA's own user, or use --server with an administrator's certificate",
        )  # fmt: skip
    return Principal(user_of(uid), "ca-admin", local=True)


def user_of(uid: int) -> str:
    try:
        return f"admin:{pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"admin:{uid}"


async def _remote(service: Service, request: web.Request) -> Principal:
    chain = peer_chain(request)
    request[ACTOR] = f"address:{request.remote or ''}"
    if not chain:
        raise Refused("admin.anonymous", "this needs an administrator's certificate", hint="give --admin-identity DIR")
    return await service.read(lambda: service.plane.admin_caller(chain))


async def _check(service: Service, request: web.Request, who: Principal) -> None:
    resource = request.match_info.route.resource
    if resource is None:
        return  # there is no such route: the router says so
    path = resource.canonical.removeprefix(PREFIX)
    rule, plane = rule_of(request.method, path), service.plane
    if who.local and not rule.two:
        return
    raw = b"" if request.method in {"GET", "HEAD"} else await _raw(request)
    said = _said(raw)
    permit(who, rule, request.method, said)
    if not rule.wants_two(said, plane.now):
        return
    act = f"{request.method} {path}"
    summary = clean(" ".join(f"{k}={v}" for k, v in said.items() if isinstance(v, str | int) and k != "csr"))

    def decide() -> RetinueError | None:
        with plane.store.write() as tx:
            if who.local:
                if plane.admins.any(tx):
                    audit.append(tx, plane.now, who.actor, "admin.break_glass", act, summary=summary[:200])
                return None
            if approvals.take(tx, who, act, raw, plane.now) is not None:
                return None
            return approvals.waiting(approvals.ask(tx, who, rule, act, raw, summary, plane.now))

    refusal = await service.read(decide)
    if refusal is not None:
        raise refusal


async def _raw(request: web.Request) -> bytes:
    import asyncio

    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise BadInput("api.slow", "the request's body did not arrive in time") from None


def _said(raw: bytes) -> dict[str, Any]:
    """The fields of a body, for the table; what is no object has none, and its handler will say so."""
    try:
        value = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
