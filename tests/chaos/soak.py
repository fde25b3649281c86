"""Random chaos by seed: faults of every kind for minutes, then quiet, then every agent has what the control plane says.

The oracle is the database itself, read by a second program of ours: the set each host should have, and its hash. Denied
pairs are tried 200 times a second all the while; one delivery fails the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Final

from ca.mirror import Mirror
from ca.store import Store
from identity.errors import RetinueError
from identity.records import state_hash
from mesh.local_client import LocalClient
from tests.chaos.impair import Profile
from tests.chaos.registry import Run, row
from tests.chaos.stage import POLICY, Stage

BOUT: Final = 25.0  # seconds of faults between two quiet looks
WEIGHTS: Final = {
    "move": 5, "policy": 3, "workload": 3, "revoke": 2, "kill agent": 4, "kill engine": 2, "kill both": 1, "kill ca": 2,
    "stop agent": 3, "stop ca": 2, "cut ca": 3, "cut host": 2, "flush": 2, "routes": 1, "bad network": 2,
}  # fmt: skip


def oracle(stage: Stage) -> dict[str, str]:
    """The state hash every host should have, from a copy of the database."""
    copy = stage.lab.dir / f"oracle-{time.monotonic_ns()}.db"
    stage.lab.ca("backup", str(copy), "--dir", str(stage.lab.ca_dir))
    try:
        store = Store.open(copy)
        try:
            mirror = Mirror(store)
            mirror.load(int(time.time()))
            return {h: state_hash(dict(mirror.world.view(h).objects)) for h in stage.hosts}
        finally:
            store.close()
    finally:
        for path in Path(copy).parent.glob(f"{copy.name}*"):
            path.unlink()


async def states(stage: Stage) -> dict[str, str]:
    """The state hash every agent reports of itself."""
    out = {}
    for host in stage.hosts:
        with contextlib.suppress(RetinueError, OSError, TimeoutError):
            async with asyncio.timeout(3), LocalClient(stage.lab.nodes[host].run_dir / "agent.sock") as agent:
                out[host] = state_hash((await agent.snapshot()).objects)
    return out


class Monkey:
    """Does one random thing after the other; `undo` ends what lasts."""

    def __init__(self, stage: Stage, dice: random.Random) -> None:
        self.stage, self.dice = stage, dice
        self.done: Counter[str] = Counter()
        self.refused = 0
        self.extras: list[str] = []
        self.number = 0
        self.impaired: str | None = None

    async def act(self) -> str:
        what = self.dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        host = self.dice.choice(self.stage.hosts)
        try:
            async with asyncio.timeout(30):
                await getattr(self, "_" + what.replace(" ", "_"))(host)
        except (RetinueError, OSError, TimeoutError):
            self.refused += 1  # the CA may be down or the host cut: a refusal is an answer
        self.done[what] += 1
        return f"{what} {host}"

    async def _move(self, _: str) -> None:
        await self.stage.move(self.dice.choice(["host-b", "host-c"]), "--wait", "1", *(["--force"] if self.dice.random() < 0.3 else []))

    async def _policy(self, _: str) -> None:
        self.number += 1
        path = self.stage.lab.dir / "soak.yaml"
        path.write_text(POLICY.format(more=f"      - {{id: n{self.number}, from: {{role: lone}}, to: {{role: web}}, on: tcp/{1000 + self.number}}}\n"))
        await self.stage.lab.aca("policy", "apply", str(path))

    async def _workload(self, host: str) -> None:
        self.number += 1
        name = f"extra-{self.number}"
        await self.stage.lab.aca("workload", "add", name, "--host", host, "--label", f"role={self.dice.choice(['web', 'lone'])}")
        self.extras.append(name)

    async def _revoke(self, _: str) -> None:
        if self.extras:
            await self.stage.lab.aca("workload", "revoke", self.extras.pop(self.dice.randrange(len(self.extras))))

    async def _kill_agent(self, host: str) -> None:
        self.stage.agent(host).kill()
        await self.stage.restart_agent(host, wait=False)

    async def _kill_engine(self, host: str) -> None:
        os.kill(self.stage.engine_pid(host), signal.SIGKILL)

    async def _kill_both(self, host: str) -> None:
        self.stage.agent(host).kill()
        os.kill(self.stage.engine_pid(host), signal.SIGKILL)
        await self.stage.restart_agent(host, wait=False)

    async def _kill_ca(self, _: str) -> None:
        await self.stage.kill_ca()
        await asyncio.sleep(self.dice.uniform(0, 2))
        await self.stage.start_ca()

    async def _stop_agent(self, host: str) -> None:
        await self._stop(self.stage.agent(host).pid)

    async def _stop_ca(self, _: str) -> None:
        await self._stop(self.stage.lab.processes["retinue-ca"].pid)

    async def _stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self.dice.uniform(0.1, 3))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def _cut_ca(self, host: str) -> None:
        self.stage.cut_ca(host)
        await asyncio.sleep(self.dice.uniform(0.5, 4))
        self.stage.heal(host)

    async def _cut_host(self, host: str) -> None:
        self.stage.cut(host, self.dice.choice(["in", "out", "both"]), only="meta protocol { ip, ip6 }")
        await asyncio.sleep(self.dice.uniform(0.5, 3))
        self.stage.heal(host)

    async def _flush(self, host: str) -> None:
        await asyncio.to_thread(self.stage.sh, self.stage.lab.nodes[host].netns, "nft flush ruleset")

    async def _routes(self, host: str) -> None:
        script = "for t in 21000 21001 21002; do ip -4 route flush table $t; ip -6 route flush table $t; done; true"
        await asyncio.to_thread(self.stage.sh, self.stage.lab.nodes[host].netns, script)

    async def _bad_network(self, host: str) -> None:
        profile = Profile(delay_ms=self.dice.uniform(0, 30), jitter_ms=5, loss=self.dice.uniform(0, 0.1), duplicate=0.02, reorder=0.05)
        self.stage.impair(host, profile, self.dice.randrange(1 << 30))
        await asyncio.sleep(self.dice.uniform(1, 4))
        await self.stage.whole(host)

    async def undo(self) -> None:
        """Nothing is broken on purpose any more; nothing is repaired that should repair itself."""
        for host in self.stage.hosts:
            if f"impair-{host}" in self.stage.lab.processes and self.stage.lab.processes[f"impair-{host}"].running:
                await self.stage.whole(host)
            self.stage.heal(host)
            if not self.stage.agent(host).running:
                await self.stage.restart_agent(host, wait=False)
        if not self.stage.lab.processes["retinue-ca"].running:
            await self.stage.start_ca()


@row("F42", "Convergence after chaos", "every agent's state hash equals the oracle's <= 10 s after quiet; 0 bypasses")
async def soak(stage: Stage, run: Run) -> None:
    seconds = run.lasts(60)
    dice = random.Random(run.seed)
    monkey = Monkey(stage, dice)
    end = time.monotonic() + seconds
    converged: list[float] = []
    last: list[str] = []
    while time.monotonic() < end:
        bout = min(end, time.monotonic() + BOUT)
        while time.monotonic() < bout:
            last = [*last[-11:], await monkey.act()]
            await asyncio.sleep(dice.uniform(0, 0.5))
        await monkey.undo()
        quiet = time.monotonic()
        truth: dict[str, str] = {}
        seen: dict[str, str] = {}
        while time.monotonic() - quiet < 30:
            truth, seen = await asyncio.to_thread(oracle, stage), await states(stage)
            if truth == seen:
                break
            await asyncio.sleep(0.1)
        converged.append(time.monotonic() - quiet)
        if truth != seen:
            run.note(after="; ".join(last), differ=",".join(h for h in truth if seen.get(h) not in {None, truth[h]}),
                     silent=",".join(h for h in truth if h not in seen))  # fmt: skip
            run.check(f"all agents converged (seed {run.seed})", ok=False)
            return
        bypass = stage.bypass()
        if bypass.delivered:
            run.note(after="; ".join(last))
            run.check(f"{bypass.delivered} denied messages delivered (seed {run.seed})", ok=False)
            return
        await stage.flowing("web-api", "web-tcp", timeout=30)
    run.note(minutes=seconds / 60, actions=sum(monkey.done.values()), refused=monkey.refused, bouts=len(converged), converged_max_s=max(converged),
             kinds=dict(monkey.done.most_common()))  # fmt: skip
    run.check("converged within 10 s every time", max(converged) <= 10)
    if seconds < 1800:
        run.caveat(f"{seconds / 60:.1f} min instead of 30 (ARGS=\"--soak 30\")")
