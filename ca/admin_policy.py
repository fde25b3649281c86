"""Administration of the policy beyond apply and show: identity/wire/policy.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from ca import flow_store, history, policy_authority, rows
from ca.http import body, number, reply, text
from ca.policies import newest, subjects
from ca.policy_plan import make_plan
from ca.principals import ACTOR
from ca.rollouts import SHOWN, Rollout, Who
from ca.service import Service
from identity.errors import BadInput, NotFound
from identity.wire.admin import PolicyFileIn
from identity.wire.policy import (
    AuthorityApply,
    AuthorityReply,
    BundleReply,
    CanaryChoice,
    PolicyPlan,
    PolicyRollback,
    RolloutReply,
    RolloutStart,
    RolloutStep,
)
from policy.evaluate import show_flow
from policy.flows import FlowRecord, dump_flows
from policy.inventory import dump_inventory
from policy.program import Program
from policy.questions import blast_radius, matrix, rows_json, who_can_reach

if TYPE_CHECKING:
    from ca.plane import Plane

CHUNK: Final = 500  # leaves of the log in one answer


def routes(service: Service) -> list[web.RouteDef]:
    """The routes of this part."""
    it = _Policy(service)
    return [
        web.get("/v1/policy/authority", it.authority),
        web.post("/v1/policy/authority", it.set_authority),
        web.get("/v1/policy/bundle", it.bundle),
        web.get("/v1/policy/compare", it.compare),
        web.post("/v1/policy/rollback", it.rollback),
        web.post("/v1/policy/plan", it.plan),
        web.get("/v1/policy/rollout", it.rollout),
        web.post("/v1/policy/rollout/start", it.start),
        web.post("/v1/policy/rollout/promote", it.promote),
        web.post("/v1/policy/rollout/abort", it.abort),
        web.get("/v1/policy/ask", it.ask),
        web.get("/v1/policy/flows", it.flows),
        web.get("/v1/policy/inventory", it.inventory),
        web.get("/v1/policy/export-history", it.export),
    ]


def _files(given: Sequence[PolicyFileIn]) -> list[tuple[str, str]]:
    return [(f.name, f.text) for f in given]


def _who(choice: CanaryChoice) -> Who:
    return Who(choice.labels, choice.percent, tuple(choice.hosts), choice.everybody)


class _Policy:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._plane: Plane = service.plane

    # ---- authority and bundles

    async def authority(self, _: web.Request) -> web.Response:
        return reply(await self._service.read(self._authority))

    def _authority(self) -> AuthorityReply:
        with self._plane.store.read() as tx:
            found = policy_authority.load(tx, str(self._plane.trust_domain))
        if found is None:
            return AuthorityReply(version=0, fingerprint="", chain=[])
        return AuthorityReply(version=found.version, fingerprint=found.fingerprint, chain=found.texts())

    async def set_authority(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, AuthorityApply), request[ACTOR], self._plane
        bundle = (_files(asked.files), asked.parts) if asked.parts else None
        await self._service.change(lambda: plane.policies.set_authority(asked.chain, plane.now, actor, bundle))
        return reply(await self._service.read(self._authority))

    async def bundle(self, _: web.Request) -> web.Response:
        plane = self._plane

        def run() -> BundleReply:
            domain, chain = str(plane.trust_domain), plane.policies.authority_chain()
            with plane.store.read() as tx:
                current = newest(tx)
            if current is None:
                return BundleReply(trust_domain=domain, revision=0, digest="", files=[], parts=[], authority=chain)
            said = current.said(domain)
            files = [PolicyFileIn(name=f.name, text=f.text) for f in said.files]
            return BundleReply(
                trust_domain=domain, revision=said.revision, digest=said.digest, files=files, parts=list(said.parts), authority=chain
            )

        return reply(await self._service.read(run))

    # ---- history

    async def compare(self, request: web.Request) -> web.Response:
        one, other, plane = number(request, "one"), number(request, "other"), self._plane
        if one is None or other is None:
            raise BadInput("api.query", "two revisions are compared")
        return reply(await self._service.read(lambda: plane.policies.compare(one, other, plane.now)))

    async def rollback(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, PolicyRollback), request[ACTOR], self._plane
        done, _ = await self._service.change(
            lambda: plane.policies.rollback(asked.revision, asked.author or actor, plane.now, actor, asked.parts)
        )
        return reply(done)

    async def export(self, request: web.Request) -> web.Response:
        """The head of the log, or a page of it: a history may be larger than memory."""
        after, size, plane = number(request, "after"), number(request, "size"), self._plane
        if after is None or size is None:
            head = await self._service.read(lambda: history.head(plane))
            return web.json_response({"first": head.first, "size": head.size})
        return web.json_response({"lines": await self._service.read(lambda: history.lines(plane, after, CHUNK, size))})

    # ---- the road to enforce

    async def plan(self, request: web.Request) -> web.Response:
        asked, plane = await body(request, PolicyPlan), self._plane
        return reply(
            await self._service.read(lambda: make_plan(plane, _files(asked.files), asked.parts, asked.budget, plane.now))
        )

    async def rollout(self, _: web.Request) -> web.Response:
        return reply(await self._service.read(self._status))

    async def start(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, RolloutStart), request[ACTOR], self._plane
        return await self._step(
            lambda: plane.rollouts.start(
                _files(asked.files), _who(asked.canary), asked.author or actor, plane.now, actor, watch=asked.watch,
                budget=asked.budget, parts=asked.parts, auto=asked.auto, force=asked.force,
            )
        )  # fmt: skip

    async def promote(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, RolloutStep), request[ACTOR], self._plane
        who = _who(asked.canary) if asked.canary is not None else None
        return await self._step(lambda: plane.rollouts.promote(plane.now, actor, who))

    async def abort(self, request: web.Request) -> web.Response:
        asked, actor, plane = await body(request, RolloutStep), request[ACTOR], self._plane
        return await self._step(lambda: plane.rollouts.abort(plane.now, actor, asked.why))

    async def _step(self, job: Callable[[], Rollout]) -> web.Response:
        await self._service.change(job)
        return reply(await self._service.read(self._status))

    def _status(self) -> RolloutReply:
        found = self._plane.rollouts.status(self._plane.now)
        if found is None:
            return RolloutReply(rollout=None)
        one, watched = found
        denials: list[dict[str, Any]] = [
            {
                "src": d.edge[0], "dst": d.edge[1], "flow": show_flow(d.edge[2], d.edge[3]), "count": d.count, "last": d.last,
                "reported_by": list(d.endpoints), "seen_before": d.seen is not None, "not_counted": why,
            }
            for d, why in sorted(watched.denials, key=lambda item: bool(item[1]))[:SHOWN]
        ]  # fmt: skip
        return RolloutReply(rollout=asdict(one), counted=len(watched.counted), denials=denials)

    # ---- questions

    async def ask(self, request: web.Request) -> web.Response:
        question, name, on = text(request, "question"), request.query.get("name", ""), request.query.get("on", "")
        depth = number(request, "depth")
        return web.json_response(await self._service.read(lambda: self._answer(question, name, on, depth)))

    def _answer(self, question: str, name: str, on: str, depth: int | None) -> Any:
        from policy.ports import parse_flow

        plane = self._plane
        with plane.store.read() as tx:
            known = subjects(rows.instances(tx))
            current = newest(tx)
        program = current.staged().program(plane.now, known) if current is not None else Program(())
        everybody = list(known.values())
        if question != "matrix" and name not in known:
            raise NotFound("workload.unknown", f"no workload named {ascii(name)[:80]}", hint="see: retinue-ca workload list")
        match question:
            case "matrix":
                return rows_json(matrix(program, everybody))
            case "who-can-reach":
                proto, port = parse_flow(on) if on else (None, None)
                return rows_json(who_can_reach(program, everybody, known[name], proto, port))
            case "blast-radius":
                found = blast_radius(program, everybody, name, depth)
                return [{"name": r.name, "hops": r.hops, "chain": list(r.chain)} for r in found]
        raise BadInput("api.query", f"not a question: {ascii(question)[:40]}")

    async def flows(self, _: web.Request) -> web.Response:
        plane = self._plane

        def run() -> str:
            with plane.store.read() as tx:
                recorded = flow_store.recording(tx, plane.now)
            return dump_flows(
                FlowRecord(seen.last, src, dst, proto, port, seen.count, 0, "allow")
                for (src, dst, proto, port), seen in sorted(recorded.edges.items(), key=lambda item: item[1].last)
            )

        return web.json_response({"text": await self._service.read(run)})

    async def inventory(self, _: web.Request) -> web.Response:
        plane = self._plane

        def run() -> str:
            with plane.store.read() as tx:
                return dump_inventory(sorted(subjects(rows.instances(tx)).values(), key=lambda s: s.name))

        return web.json_response({"text": await self._service.read(run)})
