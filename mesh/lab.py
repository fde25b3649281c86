"""A network of hosts on one machine: the demo's stage and the tests' truth.

An underlay switch (a bridge in a namespace of its own), a namespace for the CA and one for each host, joined by veth
pairs with IPv4 (RFC 5737 TEST-NET-2) and IPv6 (RFC 3849) underlay addresses, plus bare namespaces for workloads. No
link, route or table is made outside these namespaces, and all names carry the lab's id, so several labs coexist.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from identity.errors import BadInput, Conflict, NoPrivilege, TimedOut, Unreachable, from_wire
from identity.names import host_name
from identity.wire import Message
from identity.wire.local import Status
from mesh import lab_registry
from mesh.lab_process import PATIENCE, Process, command, ip_batch, run

UNDERLAY_V4: Final = "198.51.100.{}"
UNDERLAY_V6: Final = "2001:db8:51:100::{:x}"
FIRST_NODE: Final = 10
MAX_NODES: Final = 200
CA_PORT: Final = 8443
TUNNEL_PORT: Final = 51820
SWITCH: Final = "switch"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the lab: a namespace with one underlay link ``eth0``, and directories of its own."""

    name: str
    netns: str
    v4: str
    v6: str
    dir: Path

    @property
    def state_dir(self) -> Path:
        return self.dir / "state"

    @property
    def run_dir(self) -> Path:
        return self.dir / "run"

    @property
    def underlay(self) -> list[str]:
        """``address:port`` hints of its tunnel, both families."""
        return [f"{self.v4}:{TUNNEL_PORT}", f"[{self.v6}]:{TUNNEL_PORT}"]

    @property
    def env(self) -> dict[str, str]:
        """What `retinue` on this machine needs to find its agent."""
        return {"RETINUE_RUN_DIR": str(self.run_dir), "RETINUE_STATE_DIR": str(self.state_dir)}


class Lab:
    """`with Lab(["host-a", "host-b"]) as lab:` or `async with`. Leaving it removes everything unless `keep`.

    Building and leaving cost milliseconds and block; what waits for processes has an `a...` twin for asyncio.
    """

    def __init__(
        self, hosts: Sequence[str] = (), *, trust_domain: str = "lab.example", keep: bool = False, ca: bool = True
    ) -> None:
        self.trust_domain = trust_domain
        self.keep = keep
        self.nodes: dict[str, Node] = {}
        self.processes: dict[str, Process] = {}
        self._wanted = ([*hosts], ca)
        self._lock = threading.Lock()
        self._entry: lab_registry.Entry | None = None
        self._workloads: dict[str, str] = {}

    # ---- life

    def start(self) -> Self:
        """Build the namespaces and links. Raises NoPrivilege when not root, ProcessFailed when `ip` refuses."""
        if os.geteuid() != 0:
            raise NoPrivilege("lab.root", "network namespaces need root", hint="run it with sudo")
        self._entry = lab_registry.create()
        try:
            hosts, ca = self._wanted
            for sub in ("logs", "notify", "nodes"):
                (self.dir / sub).mkdir(mode=0o700)
            ip_batch([f"netns add {self.switch}"])
            ip_batch(
                ["link set lo up", "link add br0 type bridge mcast_snooping 0", "link set br0 addrgenmode none up"],
                netns=self.switch,
            )  # fmt: skip
            self.add_nodes([*(["ca"] if ca else []), *hosts])
        except BaseException:
            self.stop(force=True)
            raise
        return self

    def stop(self, *, force: bool = False) -> list[str]:
        """Remove everything and return what is nevertheless left (looked at, not assumed). With `keep`, only say so."""
        if self._entry is None:
            return []
        for process in self.processes.values():
            if self.keep and not force:
                process.close()
            else:
                process.kill()
        self.processes.clear()
        if self.keep and not force:
            self._entry.kept = True
            self._entry.save()
        else:
            lab_registry.remove(self._entry)
        return lab_registry.leftovers(self._entry)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.start)

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    @staticmethod
    def sweep(*, kept: bool = False) -> list[str]:
        """Remove what labs without an owner left behind (also those left up on purpose, with `kept`); their ids."""
        return lab_registry.sweep(kept=kept)

    # ---- names

    @property
    def entry(self) -> lab_registry.Entry:
        if self._entry is None:
            raise Conflict("lab.down", "the lab has not been started")
        return self._entry

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def dir(self) -> Path:
        return self.entry.directory

    @property
    def switch(self) -> str:
        """Namespace of the underlay switch: where a capture sees every underlay frame."""
        return self.netns(SWITCH)

    def netns(self, name: str) -> str:
        """Full namespace name of a node or workload of this lab."""
        return f"{self.entry.prefix}{name}"

    @property
    def ca_url(self) -> str:
        return f"https://{self.nodes['ca'].v4}:{CA_PORT}"

    @property
    def ca_dir(self) -> Path:
        return self.nodes["ca"].state_dir

    # ---- topology

    def add_nodes(self, names: Sequence[str]) -> list[Node]:
        """Machines on the underlay. Raises BadInput for a bad name, Conflict for a taken one."""
        made: list[Node] = []
        for name in names:
            if host_name(name) in self.nodes or name == SWITCH or name in self._workloads:
                raise Conflict("lab.name", f"the lab already has a {name}")
            number = FIRST_NODE + len(self.nodes)
            if number >= FIRST_NODE + MAX_NODES:
                raise BadInput("lab.size", f"a lab has at most {MAX_NODES} nodes")
            node = Node(name, self.netns(name), UNDERLAY_V4.format(number), UNDERLAY_V6.format(number), self.dir / "nodes" / name)
            node.dir.mkdir(mode=0o700)
            node.run_dir.mkdir(mode=0o700)
            self.nodes[name] = node
            made.append(node)
        ip_batch([f"netns add {n.netns}" for n in made])
        ports = {n.name: f"p{list(self.nodes).index(n.name)}" for n in made}
        ip_batch(
            [line for n in made for line in (
                f"link add {ports[n.name]} type veth peer name eth0 netns {n.netns}",
                f"link set {ports[n.name]} addrgenmode none master br0 up",
            )],
            netns=self.switch,
        )  # fmt: skip
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(self._address, made))
        return made

    @staticmethod
    def _address(node: Node) -> None:
        ip_batch(
            [
                "link set lo up",
                f"addr add {node.v4}/24 dev eth0",
                f"addr add {node.v6}/64 dev eth0 nodad",
                "link set eth0 up",
            ],
            netns=node.netns,
        )

    def add_node(self, name: str) -> Node:
        """One more machine."""
        return self.add_nodes([name])[0]

    def add_workload(self, name: str) -> str:
        """A bare namespace (``lo`` only) for a workload; returns its full name."""
        if name in self.nodes or name == SWITCH or name in self._workloads:
            raise Conflict("lab.name", f"the lab already has a {name}")
        full = self.netns(name)
        ip_batch([f"netns add {full}"])
        ip_batch(["link set lo up"], netns=full)
        self._workloads[name] = full
        return full

    # ---- processes

    def spawn(
        self, argv: Sequence[str], *, name: str, netns: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a process (in the namespace with this full name) and register it for removal."""
        with self._lock:
            old = self.processes.pop(name, None)
            if old is not None:
                old.close()  # its notify socket has the name of the new one's
            process = Process(
                argv, name=name, log=self.dir / "logs" / name, notify=self.dir / "notify" / name,
                netns=netns, env=env, cwd=self.dir,
            )  # fmt: skip
            self.processes[name] = process
            self.entry.processes.append((process.pid, process.started or 0))
            self.entry.save()
        return process

    def ca(self, *args: str, stdin: str | None = None) -> Any:
        """`retinue-ca ARGS -o json`: the parsed answer. Raises ProcessFailed with what it said."""
        return self._json([*command("retinue-ca"), *args, "-o", "json"], "ca", {"RETINUE_CA_DIR": str(self.ca_dir)}, stdin)

    def retinue(self, node: str, *args: str, stdin: str | None = None, codes: Sequence[int] = (0,)) -> Any:
        """`retinue ARGS -o json` on a node: the parsed answer. `codes`: exit statuses that are an answer."""
        return self._json([*command("retinue"), *args, "-o", "json"], node, self.nodes[node].env, stdin, codes)

    def _json(
        self, argv: list[str], node: str, env: Mapping[str, str], stdin: str | None, codes: Sequence[int] = (0,)
    ) -> Any:
        done = run(argv, netns=self.nodes[node].netns, env=env, stdin=stdin, cwd=self.dir, codes=codes)
        text = done.stdout.strip()
        try:
            return json.loads(text) if text else None
        except ValueError:
            return [json.loads(line) for line in text.splitlines()]

    def start_ca(self, *, listen: str = f"0.0.0.0:{CA_PORT}", init: bool = True, args: Sequence[str] = ()) -> Process:
        """Initialise and serve the CA; returns when it is ready."""
        if init:
            self.ca("init", "--dir", str(self.ca_dir), "--trust-domain", self.trust_domain)
        process = self.spawn(
            [*command("retinue-ca"), "serve", "--dir", str(self.ca_dir), "--listen", listen, *args],
            name="retinue-ca", netns=self.nodes["ca"].netns, env={"RETINUE_CA_DIR": str(self.ca_dir)},
        )  # fmt: skip
        process.wait_ready()
        return process

    def enroll(self, node: str, *, workload: str | None = None) -> Any:
        """A one-time token, used at once by `retinue enroll` on the node. With `workload`: as its sidecar."""
        created = self.ca("token", "create", *(["--workload", workload] if workload else ["--host", node]))
        return self.use_token(node, created["token"])

    def use_token(self, node: str, token: str) -> Any:
        """`retinue enroll` on a node; the token goes through standard input, never through argv."""
        here = self.nodes[node]
        hints = [word for hint in here.underlay for word in ("--underlay", hint)]
        return self.retinue(
            node, "enroll", "--ca", self.ca_url, "--token-file", "-", "--state-dir", str(here.state_dir), *hints, stdin=token
        )

    def start_agent(self, node: str, *, args: Sequence[str] = (), wait: bool = True) -> Process:
        """The node's agent; returns when it has applied its first state."""
        here = self.nodes[node]
        process = self.spawn(
            [*command("retinue-agent"), "--state-dir", str(here.state_dir), "--run-dir", str(here.run_dir), *args],
            name=f"agent-{node}", netns=here.netns, env=here.env,
        )  # fmt: skip
        if wait:
            process.wait_ready()
        return process

    def bring_up(self, hosts: Sequence[str] | None = None) -> None:
        """The CA, then every host: enrolled, its agent ready. Hosts go in parallel."""
        self.start_ca()
        names = list(hosts) if hosts is not None else [n for n in self.nodes if n != "ca"]

        def one(name: str) -> None:
            self.enroll(name)
            self.start_agent(name)

        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(one, names))

    async def abring_up(self, hosts: Sequence[str] | None = None) -> None:
        await asyncio.to_thread(self.bring_up, hosts)

    async def aca(self, *args: str, stdin: str | None = None) -> Any:
        return await asyncio.to_thread(lambda: self.ca(*args, stdin=stdin))

    async def aretinue(self, node: str, *args: str, stdin: str | None = None, codes: Sequence[int] = (0,)) -> Any:
        return await asyncio.to_thread(lambda: self.retinue(node, *args, stdin=stdin, codes=codes))

    async def admin(self, method: str, path: str, body: Message | None = None, *, timeout: float = 30.0) -> Any:
        """One call of the CA's admin API over its socket, without the cost of a command: for what is timed."""
        import aiohttp

        connector = aiohttp.UnixConnector(str(self.ca_dir / "admin.sock"))
        data = body.model_dump_json().encode() if body is not None else None
        async with aiohttp.ClientSession(connector=connector) as session, session.request(
            method, f"http://ca{path}", data=data, headers={"Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=timeout),
        ) as answer:  # fmt: skip
            said = await answer.json(content_type=None)
            if answer.status != 200:
                raise from_wire(answer.status, said)
            return said

    async def until(self, node: str, holds: Callable[[Status], bool], *, timeout: float = 15.0) -> Status:
        """The agent's status as soon as it fits; looked at after every change it applies. Raises TimedOut."""
        from mesh.local_client import LocalClient

        seen: Status | None = None
        try:
            async with asyncio.timeout(timeout * PATIENCE):
                while True:
                    try:
                        async with LocalClient(self.nodes[node].run_dir / "agent.sock") as agent:
                            async for _ in agent.watch():
                                seen = await agent.status()
                                if holds(seen):
                                    return seen
                    except (Unreachable, TimedOut):  # it is only starting, was killed meanwhile and starts anew, or is slow
                        await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        state = "nothing" if seen is None else f"policy {seen.policy_revision}, " + ", ".join(
            f"{a.name} {a.state}" for a in seen.attachments)  # fmt: skip
        raise TimedOut("lab.until", f"{node} did not come to the expected state within {timeout:g} s; it has {state}")

    def forget(self, name: str) -> None:
        """Stop one process of the lab (SIGTERM, then SIGKILL)."""
        process = self.processes.pop(name, None)
        with contextlib.suppress(ProcessLookupError):
            if process is not None:
                process.stop()
