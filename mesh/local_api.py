"""The agent's local API on RUN_DIR/agent.sock: root and the agent's own user only, asked of the kernel for every call.

A unix socket cannot be reached by a web page, and a request that a browser made (it carries Origin) is refused anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import structlog
from aiohttp import web
from pydantic import BaseModel

from identity.errors import BadInput, BadState, Bug, Conflict, NotFound, Refused, RetinueError
from identity.records import PolicyRecord
from identity.wire import parse
from identity.wire.admin import ExplainReply
from identity.wire.enroll import SidecarTokenRequest
from identity.wire.local import (
    Attach,
    Attachment,
    AttachReply,
    Down,
    InstanceRef,
    PeerStatus,
    SnapshotReply,
    Status,
    SvidFiles,
)
from mesh import flow_api, units
from mesh.compile import running
from mesh.inside import GATEWAY4, GATEWAY6
from mesh.plan import AttachmentPlan, Overlay
from mesh.snapshot import InstanceKey, instance_key
from mesh.uplink import boottime
from policy import foreign
from policy.ports import proto_name, proto_number
from policy.program import Subject
from policy.trust import describe

if TYPE_CHECKING:
    from mesh.endpoint import Agent, InForce

SOCKET: Final = "agent.sock"
MAX_BODY: Final = 64 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
B = TypeVar("B", bound=BaseModel)

log = structlog.get_logger("retinue.local")


def peer_of(request: web.Request) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as the kernel knows it (unix(7), SO_PEERCRED)."""
    connection = request.transport.get_extra_info("socket") if request.transport is not None else None
    if connection is None:
        return -1, -1
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


def product_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("retinue")
    except PackageNotFoundError:
        return "unknown"


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who may ask, and errors in the one form."""
    try:
        pid, uid = peer_of(request)
        if uid not in {0, os.geteuid()}:
            log.warning("a local request was refused", pid=pid, uid=uid, path=request.path[:80])
            raise Refused("local.uid", "only root and the agent's own user may ask the agent", hint="use sudo")
        if "Origin" in request.headers:
            raise Refused("local.origin", "requests of web pages are refused")
        return await handler(request)
    except RetinueError as e:
        return web.json_response(e.as_dict(), status=e.http)
    except web.HTTPException as e:
        missing = NotFound("api.path", f"the agent has no {request.method} {request.path[:80]}")
        return web.json_response(missing.as_dict(), status=e.status)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("a local request failed")
        return web.json_response(Bug("bug", "the agent failed at this request; its log says how").as_dict(), status=500)


class LocalApi:
    """The server; `stop` is set when a caller asks the agent to end."""

    def __init__(self, agent: Agent, stop: asyncio.Event) -> None:
        self.agent, self.stop = agent, stop
        self.path = agent.config.run_dir / SOCKET
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[guard], client_max_size=MAX_BODY)
        app.add_routes(flow_api.routes(self.agent))
        app.add_routes([
            web.get("/v1/status", self._status),
            web.post("/v1/attach", self._attach),
            web.post("/v1/detach", self._detach),
            web.get("/v1/explain", self._explain),
            web.get("/v1/explain/identity", self._explain_identity),
            web.get("/v1/snapshot", self._snapshot),
            web.get("/v1/watch", self._watch),
            web.post("/v1/svid", self._svid),
            web.post("/v1/sidecar-token", self._sidecar_token),
            web.post("/v1/down", self._down),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.SockSite(self._runner, listen_on(self.path)).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self.path.unlink(missing_ok=True)

    # ---- handlers

    async def _status(self, _: web.Request) -> web.StreamResponse:
        return _reply(await status_of(self.agent))

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        key = self.agent.attach(await _body(request, Attach))
        await self._settled()
        return _reply(AttachReply(attachment=attachment_of(self.agent, key)))

    async def _detach(self, request: web.Request) -> web.StreamResponse:
        ref = await _body(request, InstanceRef)
        self.agent.detach(ref.name, ref.instance)
        await self._settled()
        return _reply(AttachReply(attachment=None))

    async def _settled(self) -> None:
        """Answer once the change is in the data plane; when that fails the reply shows the state as it is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await self.agent.applied()

    async def _explain(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        try:
            src, dst, proto = query["src"], query["dst"], query.get("proto", "tcp")
            port = int(query["port"]) if "port" in query else None
        except (KeyError, ValueError):
            raise BadInput("explain.form", "explain needs src, dst, proto and perhaps a port") from None
        return _reply(await explain(self.agent, src, dst, proto, port))

    async def _explain_identity(self, request: web.Request) -> web.StreamResponse:
        from mesh.explain_identity import explain_identity

        query = request.query
        try:
            name, instance = query["name"], int(query.get("instance", "0"))
            pid = int(query["pid"]) if "pid" in query else None
        except (KeyError, ValueError):
            raise BadInput("explain.form", "explain identity needs a name, and perhaps an instance and a pid") from None
        return _reply(explain_identity(self.agent, name, instance, pid))

    async def _snapshot(self, _: web.Request) -> web.StreamResponse:
        return _reply(snapshot_of(self.agent))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        # A reader that went away shows as a ConnectionError at the next write.
        async with contextlib.aclosing(self.agent.watch()) as changes:
            with contextlib.suppress(ConnectionError):
                async for _ in changes:
                    await response.write(snapshot_of(self.agent).model_dump_json().encode() + b"\n")
        return response

    async def _svid(self, request: web.Request) -> web.StreamResponse:
        ref = await _body(request, InstanceRef)
        return _reply(await svid_of(self.agent, ref))

    async def _sidecar_token(self, request: web.Request) -> web.StreamResponse:
        reply = await self.agent.uplink.sidecar_token(await _body(request, SidecarTokenRequest))
        return _reply(reply.model_copy(update={"ca": self.agent.enrollment.ca_url}))

    async def _down(self, request: web.Request) -> web.StreamResponse:
        self.agent.clean = (await _body(request, Down)).clean
        self.stop.set()
        return web.json_response({})


def listen_on(path: Path, mode: int = 0o600) -> socket.socket:
    """A unix socket with this mode, in place of one a dead agent left. Raises Conflict, BadState."""
    try:
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(os.fspath(path))
            except (FileNotFoundError, ConnectionRefusedError):
                pass
            else:
                raise Conflict("agent.running", f"another agent answers on {path}", hint="give this one its own --run-dir")
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mode has to hold from the first moment; nothing else of this process makes files at this point.
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
    except OSError as e:
        raise BadState("local.socket", f"cannot listen on {path}: {e.strerror or e}", hint="check --run-dir") from None
    return listener


async def _body(request: web.Request, kind: type[B]) -> B:
    try:
        return parse(kind, await request.read())
    except web.HTTPRequestEntityTooLarge:
        raise BadInput("wire.large", f"a request of more than {MAX_BODY} bytes") from None


def _reply(message: BaseModel) -> web.Response:
    return web.Response(body=message.model_dump_json().encode(), content_type="application/json")


# ---- what is told


def snapshot_of(agent: Agent) -> SnapshotReply:
    """The envelopes in force, without what is fenced or has ended."""
    now: InForce | None = agent.in_force
    position = now.position if now else None
    fenced = now.view.fenced | now.view.ended if now else frozenset()
    withheld = {f"{kind}/{key}" for key in fenced for kind in ("placement", "prepare")}
    return SnapshotReply(
        timeline=position.timeline if position else None,
        revision=position.revision if position else None,
        trust_domain=agent.enrollment.trust_domain.name,
        objects={k: v for k, v in agent.machine.objects.items() if k not in withheld} if now else {},
    )


def attachment_of(agent: Agent, key: InstanceKey) -> Attachment | None:
    """One attachment as applied; before that, as waiting. None when it is not attached."""
    plan = agent.in_force.plan.attachments.get(key) if agent.in_force else None
    for attach in agent.attachments.entries():
        if instance_key(attach.name, attach.instance) == key:
            return _attachment(agent, attach, plan)
    if plan is not None:
        name, _, instance = key.rpartition("/")
        return _attachment(agent, Attach(name=name, instance=int(instance), kind=plan.kind, netns=plan.netns,
                                         cgroup=None if plan.unit is None else f"/{plan.unit.path}"), plan)  # fmt: skip
    return None


def _attachment(agent: Agent, attach: Attach, plan: AttachmentPlan | None) -> Attachment:
    failed = agent.in_force is not None and plan is not None and plan.key in agent.in_force.failed
    usable = plan is not None and not failed
    return Attachment(
        name=attach.name, instance=attach.instance, kind=attach.kind, netns=attach.netns,
        state=plan.state if plan is not None and usable else "waiting",
        epoch=plan.epoch if plan is not None and usable else None,
        addresses=list(plan.addresses) if plan is not None and usable else [],
        **({} if attach.kind != "tap" else _for_guest(agent, attach)),
        **({} if attach.kind != "unit" else _for_unit(attach)),
    )  # fmt: skip


def _for_guest(agent: Agent, attach: Attach) -> dict[str, Any]:
    """What the guest behind a tap has to set up."""
    overlay = Overlay.of(agent.enrollment.trust_domain.name)
    return {
        "device": attach.device, "gateways": [GATEWAY4, GATEWAY6], "overlay": [str(overlay.v4), str(overlay.v6)],
        "mtu": agent.config.mtu,
    }  # fmt: skip


def _for_unit(attach: Attach) -> dict[str, Any]:
    return {"cgroup": attach.cgroup, "uid": attach.uid, "running": units.ident_of(attach.cgroup or "") is not None}


async def status_of(agent: Agent) -> Status:
    """Everything `retinue status` shows."""
    now, enrollment = agent.in_force, agent.enrollment
    counters = None
    if now is not None:
        with contextlib.suppress(RetinueError):
            counters = await agent.plane.counters()
    keys = {instance_key(a.name, a.instance) for a in agent.attachments.entries()} | (
        set(now.plan.attachments) if now else set()
    )
    found = [attachment_of(agent, key) for key in sorted(keys)]
    peers = []
    for key, peer in sorted(now.plan.peers.items(), key=lambda item: item[1].endpoint) if now else []:
        state = counters.peers.get(key) if counters else None
        peers.append(PeerStatus(
            endpoint=peer.endpoint, tunnel_key=key, underlay=(state.underlay if state else None) or peer.underlay,
            allowed_ips=list(peer.allowed_ips), cipher=state.cipher if state else peer.cipher,
            latest_handshake=state.latest_handshake if state else None,
            rx_bytes=state.rx_bytes if state else 0, tx_bytes=state.tx_bytes if state else 0,
        ))  # fmt: skip
    policy = now.view.snapshot.policy if now else None
    position = now.position if now else None
    return Status(
        version=product_version(),
        trust_domain=enrollment.trust_domain.name,
        endpoint=enrollment.endpoint,
        kind=enrollment.kind,
        spiffe_id=str(enrollment.spiffe_id),
        device=agent.plane.describe() if now else "not started",
        interface=agent.config.interface,
        control=agent.uplink.control,
        timeline=position.timeline if position else None,
        revision=position.revision if position else None,
        policy_revision=policy.revision if policy else None,
        policy_digest=policy.digest if policy else None,
        policy_signers=describe(agent.machine.policy_trust),
        policy_trial=_trial(policy),
        staleness_s=agent.machine.age(boottime()),
        svid_expires=enrollment.svid.not_after,
        attachments=[a for a in found if a is not None],
        peers=peers,
        firewall_elements=counters.elements if counters else 0,
        conditions=agent.health.conditions(),
        ready=agent.ready,
    )


async def svid_of(agent: Agent, ref: InstanceRef) -> SvidFiles:
    """Key material of an instance that is active here. Raises NotFound, Refused, or what the CA answered."""
    key = instance_key(ref.name, ref.instance)
    plan = agent.in_force.plan.attachments.get(key) if agent.in_force else None
    if plan is None:
        raise NotFound("svid.unknown", f"{key} is not attached here", hint="see: retinue status")
    if not plan.active:
        raise Refused("svid.inactive", f"{key} is {plan.state} here: {plan.why}")
    files = await agent.svids.get(ref.name, ref.instance)
    after = agent.in_force.plan.attachments.get(key) if agent.in_force else None
    if after is None or not after.active:
        agent.svids.drop(key)
        raise Refused("svid.inactive", f"{key} is not active here any more")
    return files


async def explain(agent: Agent, src: str, dst: str, proto: str, port: int | None) -> ExplainReply:
    """From the policy in force here when both are known here; else the CA is asked. Raises NotFound, BadInput."""
    number = proto_number(proto)
    if port is not None and not 1 <= port <= 65535:
        raise BadInput("port.range", f"port out of range: {port}", hint="ports are 1 to 65535")
    now = agent.in_force
    one, other = (_subject(agent, name) for name in (src, dst))
    policy = now.view.snapshot.policy if now else None
    if one is None or other is None or policy is None:
        try:
            asked = (one.name if one else src, other.name if other else dst)
            return await agent.uplink.explain(*asked, proto_name(number), port)
        except (NotFound, BadInput, Refused):
            raise
        except RetinueError:
            unknown = src if one is None else dst
            raise NotFound(
                "explain.unknown", f"{unknown} is not known on this host, and the CA cannot be asked",
                hint="this host knows the workloads that its own may talk to",
            ) from None  # fmt: skip
    from policy.compile import inactive
    from policy.explain import explain as explain_flow
    from policy.explain import to_reply
    from policy.language import load

    loaded = load([(f.name, f.text) for f in policy.files])
    seconds = int(time.time())
    there = running(now.view.snapshot.placements) if now else frozenset[str]()
    program = agent.compiler.classes(policy, seconds, there).program
    found = explain_flow(program, one, other, number, port, asleep=inactive(loaded, seconds, there))
    return to_reply(found, src, dst, number, port)


def _subject(agent: Agent, name: str) -> Subject | None:
    if foreign.is_foreign(name):
        return foreign.subject_beside(name, agent.uplink.trust.trust_domain.name)
    placements = agent.in_force.view.snapshot.placements if agent.in_force else {}
    for key, record in sorted(placements.items()):
        if record.state == "active" and name in {record.name, key}:
            return Subject(name=record.name, labels=record.labels, spiffe_id=record.spiffe_id)
    return None


def _trial(policy: PolicyRecord | None) -> str:
    """A policy that is being rolled out, for people."""
    if policy is None or policy.trial is None:
        return ""
    trial = policy.trial
    who = "everybody" if trial.everybody else f"{len(trial.names)} identities" if trial.names else ", ".join(f"{k}={v}" for k, v in sorted(trial.labels.items()))
    return f"digest {trial.digest[:12]} for {who}"
