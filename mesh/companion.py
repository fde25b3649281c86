"""The sidecar's own part: joining for one workload, telling readiness, keeping the service's SVID files fresh."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from identity.errors import BadInput, Conflict, RetinueError
from identity.wire.enroll import SidecarTokenRequest
from mesh import svid_files
from mesh.endpoint import Agent, AgentConfig, serve
from mesh.enroll import enroll
from mesh.plan import AttachmentPlan

SVID_LOOK: Final = 15.0  # seconds between two looks whether the certificate wants renewal

log = structlog.get_logger("retinue.sidecar")


@dataclass(frozen=True, slots=True)
class SidecarConfig:
    """ready_port 0: no readiness endpoint. underlay: hints for peers, empty to find one out."""

    agent: AgentConfig
    ca: str | None = None
    token_file: str | None = None
    from_agent: Path | None = None
    workload: str | None = None
    underlay: Sequence[str] = ()
    ready_port: int = 15020
    svid_dir: Path | None = None
    reload: str | None = None
    renew_signal: signal.Signals | None = None
    pid_file: Path | None = None


async def serve_sidecar(config: SidecarConfig) -> None:
    """Join at the first start, then be an endpoint until told to end."""
    if not (config.agent.state_dir / "endpoint.json").exists():
        await join(config)
    await serve(config.agent, beside=lambda agent: _beside(agent, config))


async def join(config: SidecarConfig) -> None:
    """Enrol with a token. Raises BadInput when there is none, and what the agent or the CA answered."""
    from mesh.cli_node import read_token
    from mesh.devices.offers import offers

    if config.from_agent is not None:
        if config.workload is None:
            raise BadInput("usage", "--from-agent needs --workload NAME")
        token, ca = await _token_of_agent(config.from_agent, config.workload)
        ca = config.ca or ca
    else:
        if config.ca is None:
            raise BadInput("usage", "the first start needs --ca with a token, or --from-agent", hint="see: retinue-sidecar --help")
        token, ca = read_token(config.token_file), config.ca
    underlay = list(config.underlay) or guess_underlay(ca, config.agent.listen_port)
    done = await enroll(ca, token, config.agent.state_dir, underlay, await offers())
    log.info("enrolled", spiffe_id=str(done.spiffe_id), workload=done.workload, underlay=underlay)


async def _token_of_agent(path: Path, workload: str) -> tuple[str, str]:
    from mesh.local_client import LocalClient

    async with LocalClient(path) as agent:
        reply = await agent.sidecar_token(SidecarTokenRequest(workload=workload))
    return reply.token, reply.ca


def guess_underlay(ca_url: str, port: int) -> list[str]:
    """The address this namespace would send from to reach the CA, as a hint for peers; empty when there is no route."""
    host = urlsplit(ca_url.split(",", maxsplit=1)[0]).hostname or ""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect(address)  # sends nothing: it only chooses the source
            own = str(s.getsockname()[0])
    except OSError:
        return []
    return [f"[{own}]:{port}" if family == socket.AF_INET6 else f"{own}:{port}"]


async def _beside(agent: Agent, config: SidecarConfig) -> None:
    """What runs beside the endpoint, until cancelled."""
    async with contextlib.AsyncExitStack() as stack:
        if config.ready_port:
            await stack.enter_async_context(_readiness(agent, config.ready_port))
        if config.svid_dir is None:
            await asyncio.Event().wait()
        else:
            await _keep_files(agent, config.svid_dir, config)


# ---- readiness


def own_place(agent: Agent) -> AttachmentPlan | None:
    """The instance this sidecar stands for, the active one first; None when none is placed here."""
    found = sorted(agent.in_force.plan.attachments.values(), key=lambda a: not a.active) if agent.in_force else []
    return found[0] if found else None


def not_ready(agent: Agent) -> str | None:
    """Why the service cannot use the mesh yet; None when it can."""
    if not agent.ready or agent.in_force is None:
        return "no state of the control plane was applied yet"
    if "apply.failed" in agent.health:
        return "the newest state could not be applied"
    place = own_place(agent)
    if place is None:
        return "no instance is placed on this sidecar"
    if place.key in agent.in_force.failed:
        return f"{place.key} could not be set up"
    return None if place.active else f"{place.key} is {place.state}: {place.why}"


@contextlib.asynccontextmanager
async def _readiness(agent: Agent, port: int) -> AsyncIterator[None]:
    async def ready(_: web.Request) -> web.Response:
        why = not_ready(agent)
        return web.json_response({"ready": why is None, "reason": why}, status=200 if why is None else 503)

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"live": True})

    app = web.Application(client_max_size=1024)
    app.add_routes([web.get("/readyz", ready), web.get("/livez", live)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    except OSError as e:
        await runner.cleanup()
        raise Conflict("ready.port", f"cannot listen on 127.0.0.1:{port}: {e.strerror}", hint="choose another --ready-port") from None
    try:
        yield
    finally:
        await runner.cleanup()


# ---- SVID files


async def _keep_files(agent: Agent, directory: Path, config: SidecarConfig) -> None:
    """Follow what is in force: files while active, none when the instance is held elsewhere."""
    while True:
        seen = agent.in_force
        try:
            await _write_files(agent, directory, config)
            agent.health.clear("svid.files")
        except RetinueError as e:
            agent.health.put("svid.files", "warning", f"SVID files: {e.message}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SVID_LOOK), agent.changed:
                if agent.in_force is seen:
                    await agent.changed.wait()


def over(agent: Agent) -> bool:
    """Is what this sidecar stands for known to be held elsewhere, by nobody, or at its end?"""
    if agent.in_force is None:
        return False
    view, name = agent.in_force.view, agent.enrollment.workload
    ended = any(key.rpartition("/")[0] == name for key in view.ended)
    return ended or any(r.name == name for r in view.snapshot.placements.values())


async def _write_files(agent: Agent, directory: Path, config: SidecarConfig) -> None:
    place = own_place(agent)
    if place is None:
        if over(agent):
            svid_files.remove(directory)
        return
    if not place.active:
        if place.state == "fenced":
            svid_files.remove(directory)
        return
    name, _, instance = place.key.rpartition("/")
    files = await agent.svids.get(name, int(instance))
    if svid_files.write(directory, files):
        log.info("SVID files written", directory=str(directory), expires=files.expires)
        if config.reload:
            await asyncio.to_thread(svid_files.reload, config.reload)
        if config.renew_signal is not None and config.pid_file is not None:
            svid_files.send(config.pid_file, config.renew_signal)
