"""The demo's five acts: what is done and measured. Each says what it saw as events; mesh/story.py tells them to people.

Nothing here knows a result beforehand: an event's `ok` is the outcome of a comparison with what was seen on the wire.
Administration goes through the CA's admin socket, as `retinue-ca` does, where a command's start would only cost time.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from identity.errors import TimedOut
from identity.wire.admin import PolicyApply, PolicyFileIn, TokenCreate, WorkloadAdd, WorkloadRef
from identity.wire.local import Status
from mesh.capture import Capture, Seen, send_clear
from mesh.lab import Lab
from mesh.lab_process import Process
from mesh.probe_pairs import Receiver, Sender

HOSTS: Final = ("host-a", "host-b", "host-c")
HOMES: Final = {"web": "host-a", "api": "host-b", "batch": "host-c"}
PORT: Final = 8080
NEWS_PORT: Final = 7000
RATE: Final = 100  # requests a second during the move
DENIED_MS: Final = 100.0  # a refusal must be faster
GREETING: Final = "42 orders"
REFUSED: Final = frozenset({"ECONNREFUSED", "EHOSTUNREACH", "EACCES", "EPERM", "ENETUNREACH"})
BEFORE: Final = """\
meshpolicy: 1
groups:
  web:   {role: web}
  api:   {role: api}
  batch: {role: batch}
segments:
  - name: shop
    allow:
      - {id: web-to-api, from: web, to: api, on: tcp/8080, why: the shop front asks the API}
      - {id: api-news, from: api, to: web, on: udp/7000, why: the API tells the shop front what changed}
tests:
  - {from: web, to: api, on: tcp/8080, expect: allow}
  - {from: batch, to: api, on: tcp/8080, expect: deny}
"""
RULE: Final = "      - {id: batch-to-api, from: batch, to: api, on: tcp/8080, why: the nightly report}\n"
AFTER: Final = BEFORE.replace("tests:\n", RULE + "tests:\n").replace("expect: deny", "expect: allow")

Emit = Callable[..., Awaitable[None]]


class Acts:
    """One performance in a running lab. `emit(event, ok=..., **data)` takes each event; `figures` end in the summary."""

    def __init__(self, lab: Lab, emit: Emit) -> None:
        self.lab, self.emit = lab, emit
        self.figures: dict[str, Any] = {}
        self.addresses: dict[str, list[str]] = {}
        self.spiffe: dict[str, str] = {}
        self.digest = ""

    async def play(self) -> None:
        """All acts in order. Raises what a broken lab raises."""
        for number, (title, act) in enumerate(
            (
                ("Three hosts and three workloads get identities", self.enrol),
                ("The same request, twice", self.ask),
                ("What the network in between can read", self.listen),
                ("api moves to another host while web keeps asking", self.move),
                ("A rule more, and then an identity less", self.change),
            ),
            start=1,
        ):
            await self.emit("act", number=number, title=title)
            await act()

    # ---- I

    async def enrol(self) -> None:
        begin = time.monotonic()
        lab = self.lab
        await asyncio.to_thread(lab.start_ca)
        info = await lab.admin("GET", "/v1/info")
        await self.emit("ca", trust_domain=info["trust_domain"], root_fingerprint=info["root_fingerprint"], ms=_since(begin))
        await asyncio.gather(*(self._host(name) for name in HOSTS))
        await asyncio.gather(*(self._workload(name) for name in HOMES))
        await self._apply(BEFORE, "demo")
        await self.emit("ready", hosts=len(HOSTS), workloads=len(HOMES), ms=_since(begin))

    async def _host(self, name: str) -> None:
        begin = time.monotonic()
        token = await self.lab.admin("POST", "/v1/tokens", TokenCreate(host=name))
        done = await asyncio.to_thread(self.lab.use_token, name, token["token"])
        await asyncio.to_thread(self.lab.start_agent, name)
        device = (await self.lab.until(name, lambda s: s.control == "connected")).device
        await self.emit(
            "enrolled", host=name, spiffe_id=done["spiffe_id"], tunnel_key=done["tunnel_key"],
            underlay=self.lab.nodes[name].v4, device=device, ms=_since(begin),
        )  # fmt: skip

    async def _workload(self, name: str) -> None:
        home = HOMES[name]
        made = await self.lab.admin("POST", "/v1/workloads", WorkloadAdd(name=name, host=home, labels={"role": name}))
        self.addresses[name], self.spiffe[name] = made["addresses"], made["spiffe_id"]
        await self._place(name, home)
        await self.emit("identity", workload=name, spiffe_id=made["spiffe_id"], host=home, addresses=made["addresses"],
                        labels=made["labels"])  # fmt: skip

    async def _place(self, name: str, host: str, *, wait: float = 10.0) -> None:
        """A namespace for the workload on this host, the workload's process in it, attached by the agent."""
        space = self.lab.add_workload(f"{name}-{host}")
        service = self._service(name, host)
        words = ["attach", name, "--netns", space] + (["--wait", str(wait)] if wait else [])
        await asyncio.gather(asyncio.to_thread(service.wait_ready), self.lab.aretinue(host, *words))

    def _service(self, name: str, host: str) -> Process:
        argv = [sys.executable, "-m", "mesh.demo_service", "--name", f"{name}@{host}", "--port", str(PORT)]
        return self.lab.spawn(argv, name=f"{name}-{host}", netns=self.lab.netns(f"{name}-{host}"), env={"GREETING": GREETING})

    async def _apply(self, text: str, author: str) -> dict[str, Any]:
        """Publish a policy and wait until every agent enforces it."""
        request = PolicyApply(files=[PolicyFileIn(name="shop.yaml", text=text)], author=author)
        done: dict[str, Any] = await self.lab.admin("POST", "/v1/policy", request)
        self.digest = done["digest"]
        await asyncio.gather(*(self.lab.until(h, lambda s: s.policy_digest == self.digest) for h in HOSTS))
        await self.emit("policy", revision=done["revision"], digest=done["digest"], rules=_rules(text))
        return done

    # ---- II

    async def ask(self) -> None:
        for family in (0, 1):
            await self._allowed("web", family)
        denied = [await self._denied("batch", family) for family in (0, 1)]
        self.figures["denied_ms"] = max(denied)
        await self._explained("batch", "api")

    def _url(self, name: str, family: int, path: str = "/") -> str:
        address = self.addresses[name][family]
        return f"http://{f'[{address}]' if family else address}:{PORT}{path}"

    def _probe(self, who: str, host: str, name: str, *args: str) -> Process:
        """A real process of a workload, in its namespace."""
        argv = [sys.executable, "-m", "mesh.probe", *args]
        return self.lab.spawn(argv, name=f"{name}-{secrets.token_hex(2)}", netns=self.lab.netns(f"{who}-{host}"))

    async def _get(self, who: str, host: str, url: str, *, timeout: float = 1.0) -> dict[str, Any]:
        process = self._probe(who, host, f"{who}-get", "get", url, "--timeout", str(timeout))
        await asyncio.to_thread(process.wait, timeout + 10)
        found: dict[str, Any] = json.loads(process.output())
        return found

    async def _allowed(self, who: str, family: int, *, patience: float = 5.0) -> None:
        """A request that must be answered. The first one may wait for the tunnel's handshake."""
        url, deadline = self._url("api", family), time.monotonic() + patience
        answer = await self._get(who, HOMES[who], url)
        while not answer["ok"] and time.monotonic() < deadline:
            answer = await self._get(who, HOMES[who], url)
        body = json.loads(answer["body"]) if answer["ok"] else {}
        seen = body.get("caller", "")
        await self.emit(
            "request", ok=bool(answer["ok"]) and seen == self.addresses[who][family], src=who, dst="api", family=_family(family),
            url=url, status=answer["status"], ms=round(answer["ms"], 2), served_by=answer["served_by"], caller_address=seen,
            says=body.get("says", ""), error=answer["error"],
        )  # fmt: skip

    async def _denied(self, who: str, family: int, *, same_host: bool = False) -> float:
        url = self._url("api", family)
        answer = await self._get(who, HOMES[who], url, timeout=2.0)
        ms = round(float(answer["ms"]), 2)
        await self.emit(
            "denied", ok=answer["error"] in REFUSED and ms < DENIED_MS, src=who, dst="api", family=_family(family), url=url,
            error=answer["error"], ms=ms, status=answer["status"], same_host=same_host,
        )  # fmt: skip
        return ms

    async def _explained(self, src: str, dst: str) -> None:
        host = HOMES[src]
        why = await self.lab.aretinue(host, "explain", src, dst, f"tcp/{PORT}", codes=(0, 1))
        await self.emit(
            "explained", ok=why["verdict"] == "deny" and bool(why["reason"]), src=src, dst=dst, port=f"tcp/{PORT}", host=host,
            verdict=why["verdict"], reason=why["reason"], rule=why["rule"], smallest_change=why["smallest_change"],
        )  # fmt: skip

    # ---- III

    async def listen(self) -> None:
        lab, marker = self.lab, f"MARKER-{secrets.token_hex(12)}"
        end = secrets.token_hex(16)
        import ipaddress

        inner = ipaddress.ip_address(self.addresses["api"][1]).packed
        needles = {"marker": marker.encode(), "address": inner, "name": self.spiffe["api"].encode(), "end": end.encode()}
        a, b = lab.nodes["host-a"], lab.nodes["host-b"]
        with Capture(lab.switch, needles) as capture:
            await asyncio.to_thread(send_clear, a.netns, b.v4, marker.encode(), count=5)
            await asyncio.to_thread(send_clear, a.netns, b.v6, marker.encode(), count=5)
            control = await self._sealed(capture, a.netns, b.v4, end)
            await self.emit("control", ok=control.hits["marker"] > 0, marker_frames=control.hits["marker"], marker=marker)
            served = 0
            for family in (0, 1):
                process = self._probe("web", "host-a", "web-marker", "get", self._url("api", family, f"/?q={marker}"), "--count", "20")
                await asyncio.to_thread(process.wait, 30)
                answers = [json.loads(line) for line in process.output().splitlines()]
                served += sum(1 for x in answers if x["ok"] and marker in x["body"])
            seen = await self._sealed(capture, a.netns, b.v4, end)
        self.figures["marker_in_control"] = control.hits["marker"]
        self.figures["marker_on_underlay"] = seen.hits["marker"]
        readable = {k: seen.hits[k] for k in ("marker", "address", "name")}
        await self.emit(
            "capture", ok=not any(readable.values()) and served == 40 and seen.tunnel_frames >= 40 and not seen.dropped,
            answered_with_marker=served, frames=seen.frames, tunnel_frames=seen.tunnel_frames, tunnel_bytes=seen.tunnel_bytes,
            readable=readable, dropped=seen.dropped,
        )  # fmt: skip

    @staticmethod
    async def _sealed(capture: Capture, netns: str, to: str, end: str) -> Seen:
        """What was seen up to a last frame sent now: everything before it has been read."""
        await asyncio.to_thread(send_clear, netns, to, end.encode())
        await asyncio.to_thread(capture.wait_hit, "end")
        return capture.take()

    # ---- IV

    async def move(self) -> None:
        lab = self.lab
        before = await lab.admin("GET", "/v1/policy")
        await self._place("api", "host-c", wait=0)
        await self.emit("prepared_place", host="host-c", netns=lab.netns("api-host-c"))
        web = self.addresses["web"][0]
        async with AsyncExitStack() as stack:
            news = await stack.enter_async_context(
                Receiver("udp", NEWS_PORT, netns=lab.netns("web-host-a"), address=web)
            )
            old = await stack.enter_async_context(
                Sender("udp", web, NEWS_PORT, tag="host-b", rate=50, netns=lab.netns("api-host-b"), bind=self.addresses["api"][0])
            )
            await news.wait("host-b", 20)
            positive = len(news.of("host-b").seqs)
            prober = self._probe("web", "host-a", "web-prober", "http", self._url("api", 0), self._url("api", 1),
                                 "--rate", str(RATE))  # fmt: skip
            await _line(prober, "first")
            await asyncio.sleep(1.0)
            began = time.monotonic()
            moved = await lab.aca("workload", "move", "api", "--to", "host-c", "--wait", "5")
            took = _since(began)
            accepted_at_fence, attempts_at_fence = len(news.of("host-b").seqs), old.attempts
            fresh = await stack.enter_async_context(
                Sender("udp", web, NEWS_PORT, tag="host-c", rate=50, netns=lab.netns("api-host-c"), bind=self.addresses["api"][0])
            )
            await asyncio.sleep(1.2)
            await self._until_news(news, "host-c", 5)
            prober.send(15)
            result = await _line(prober, "result")
            stale = len(news.of("host-b").seqs) - accepted_at_fence
            attempts = old.attempts - attempts_at_fence
            heard = len(news.of("host-c").seqs)
            await fresh.stop()
        after = await lab.admin("GET", "/v1/policy")
        kept = moved["workload"]["addresses"] == self.addresses["api"]
        self.figures["move"] = {"sent": result["sent"], "lost": result["lost"], "gap_ms": result["gap_ms"]}
        await self.emit(
            "moved", ok=result["lost"] == 0 and set(result["served_by"]) == {"api@host-b", "api@host-c"} and kept
            and after["digest"] == before["digest"] and not moved["waiting_for"],
            workload="api", from_host=moved["from_host"], to="host-c", epoch=moved["workload"]["epoch"], ms=took,
            prepared_ms=moved["prepared_ms"], committed_ms=moved["committed_ms"], released_ms=moved["released_ms"],
            sent=result["sent"], answered=result["answered"], retried=result["retried"], lost=result["lost"],
            gap_ms=result["gap_ms"], p50_ms=result["p50_ms"], p99_ms=result["p99_ms"], served_by=result["served_by"],
            errors=result["errors"], address_kept=kept, policy_digest_kept=after["digest"] == before["digest"],
            waiting_for=moved["waiting_for"],
        )  # fmt: skip
        status = await lab.until("host-b", _without_active("api"))
        await self.emit(
            "old_holder", ok=positive > 0 and attempts > 0 and stale == 0 and heard > 0, host="host-b",
            accepted_before=positive, attempts_after=attempts, accepted_after=stale, accepted_from_new=heard,
            state=next((x.state for x in status.attachments if x.name == "api"), "gone"),
        )  # fmt: skip
        for family in (0, 1):
            await self._denied("batch", family, same_host=True)

    @staticmethod
    async def _until_news(news: Receiver, tag: str, more: int) -> None:
        try:
            await news.wait(tag, more, timeout=5)
        except TimeoutError:
            return  # the count tells

    # ---- V

    async def change(self) -> None:
        lab = self.lab
        path = Path(lab.dir) / "shop.yaml"
        path.write_text(AFTER)
        planned = await lab.aca("policy", "apply", str(path), "--dry-run")
        gained, lost = planned["gained"], planned["lost"]
        expected = [("batch", "api", f"tcp/{PORT}")]
        await self.emit(
            "policy_diff", ok=[(g["src"], g["dst"], _ports(g["ports"])) for g in gained] == expected and not lost,
            gained=gained, lost=lost, added=RULE.strip(), applied=planned["applied"],
        )  # fmt: skip
        await self._apply(AFTER, "demo")
        for family in (0, 1):
            await self._allowed("batch", family)
        await self._revoke()

    async def _revoke(self) -> None:
        """Two open connections; the identity behind one of them is revoked; only that one may end."""
        lab = self.lab
        victim = self._probe("batch", "host-c", "batch-stream", "stream", self._url("api", 1, "/stream"), "--silence", "0.6")
        bystander = self._probe("web", "host-a", "web-stream", "stream", self._url("api", 0, "/stream"), "--silence", "3")
        await asyncio.gather(_line(victim, "open"), _line(bystander, "open"))
        await asyncio.sleep(0.5)
        begin = time.monotonic()
        await lab.admin("POST", "/v1/workloads/revoke", WorkloadRef(name="batch"))
        reply_ms = _since(begin)
        ended = await _line(victim, "result", timeout=20)
        bystander.send(15)
        spared = await _line(bystander, "result")
        cut = round(max(0.0, ended["last"] - begin) * 1000, 1)
        self.figures["revoke_cut_ms"] = cut
        await self.emit(
            "revoked", ok=ended["opened"] and ended["first"] < begin and ended["ended"] != "stopped" and cut < 1000
            and spared["ended"] == "stopped" and spared["last"] > ended["last"],
            workload="batch", cut_ms=cut, reply_ms=reply_ms, ticks=ended["ticks"], how=ended["ended"],
            bystander="web", bystander_ticks=spared["ticks"], bystander_gap_ms=spared["longest_gap_ms"],
        )  # fmt: skip
        answer = await self._get("batch", "host-c", self._url("api", 0), timeout=1.0)
        await self.emit("after_revoke", ok=not answer["ok"], src="batch", dst="api", error=answer["error"], ms=round(answer["ms"], 2))


def _since(begin: float) -> float:
    return round((time.monotonic() - begin) * 1000, 1)


def _family(number: int) -> str:
    return ("ipv4", "ipv6")[number]


def _rules(text: str) -> int:
    return sum(1 for line in text.splitlines() if line.strip().startswith("- {id:"))


def _ports(ports: object) -> str:
    return ports if isinstance(ports, str) else " ".join(map(str, ports)) if isinstance(ports, list) else str(ports)


def _without_active(name: str) -> Callable[[Status], bool]:
    return lambda status: all(x.state != "active" for x in status.attachments if x.name == name)


async def _line(process: Process, event: str, *, timeout: float = 15.0) -> dict[str, Any]:
    """The first line with this event on a probe's output. Raises TimedOut or what its end means."""
    deadline = time.monotonic() + timeout
    while True:
        running = process.running
        for line in process.output().splitlines():
            if line.endswith("}") and (found := json.loads(line)).get("event") == event:
                return dict(found)
        if not running:
            raise TimedOut("demo.probe", f"{process.name} ended without saying {event}: {process.tail()}")
        if time.monotonic() > deadline:
            raise TimedOut("demo.probe", f"{process.name} did not say {event} within {timeout:g} s")
        await asyncio.sleep(0.01)
