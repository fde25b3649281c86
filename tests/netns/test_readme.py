"""The README, executed: its blocks as they stand, each on its machine of a lab, with what they promise."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mesh import lab_registry
from mesh.lab import Lab, Node
from mesh.lab_process import Process, base_env, run

BLOCK = re.compile(r"^<!-- run: (\S+) -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?")
HOSTS = ("host-a", "host-b")
PATIENCE = 30.0


@dataclass
class Block:
    """A fenced block: where it runs, its text, and its place in the README."""

    where: str
    text: str
    line: int

    @property
    def nodes(self) -> tuple[str, ...]:
        return HOSTS if self.where == "host" else (self.where,)


def blocks(readme: str) -> list[Block]:
    return [Block(m[1], m[2], readme.count("\n", 0, m.start(2)) + 1) for m in BLOCK.finditer(readme)]


def commands(text: str) -> Iterator[str]:
    """The commands of a block; one that reads a here-document keeps it."""
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        found = HEREDOC.search(line)
        if found:
            body = itertools.takewhile(lambda more, end=found[1]: more.strip() != end, lines)
            yield f"{line}{''.join(body)}{found[1]}\n"
        else:
            yield line


@dataclass
class Machine:
    """A node as a person has it: a shell whose exports stay, and programs in the background."""

    lab: Lab
    node: Node
    env: dict[str, str]
    background: list[tuple[str, Process]] = field(default_factory=list)

    def enter(self, command: str) -> str:
        """Run one command as typed; what it printed. A background command is started and awaited."""
        words = command.strip()
        if words.endswith("&"):
            self.start(words.removesuffix("&").strip())
            return ""
        exported = re.fullmatch(r"export (\w+)=(\S+)", words)
        if exported:
            self.env[exported[1]] = exported[2]
            return ""
        return run(["bash", "-euc", command], netns=self.node.netns, env=self.env, cwd=self.node.dir).stdout

    def start(self, words: str) -> None:
        name = f"{self.node.name}-{len(self.background)}"
        process = self.lab.spawn(["bash", "-euc", f"cd {shlex.quote(str(self.node.dir))}; exec {words}"],
                                 name=name, netns=self.node.netns, env=self.env)  # fmt: skip
        self.background.append((words, process))
        program = words.split()[0]
        if program == "retinue-agent":
            until(lambda: self.answers("retinue status --check"), process)

    def answers(self, command: str) -> bool:
        return run(["bash", "-euc", command], netns=self.node.netns, env=self.env, cwd=self.node.dir, codes=range(256)).returncode == 0

    def serving(self, name: str, port: int) -> bool:
        """Does the program of `retinue run --as NAME` listen? Looked up in its own namespace."""
        for words, process in self.background:
            if f"--as {name} " in words and process.running:
                for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                    return listens(int(child), port)
        return False


def listens(pid: int, port: int) -> bool:
    """proc_net_tcp: state 0A is LISTEN. The program itself must have replaced the waiting child."""
    try:
        rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp6").read_text().splitlines()[1:]]
        rows += [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return False
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def until(holds: Callable[[], bool], process: Process | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert process is None or process.running, process.tail()
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


@pytest.fixture(scope="module")
def played(readme: str) -> Iterator[tuple[dict[str, Machine], list[tuple[str, str, str]], Lab]]:
    """Every block in order: (machines, [(machine, command, output)], lab)."""
    with Lab([*HOSTS], trust_domain="shop.example") as lab:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        machines = {name: Machine(lab, node, base_env({"PATH": path, **(node.env if name != "ca" else {})}))
                    for name, node in lab.nodes.items()}  # fmt: skip
        for name in HOSTS:
            machines[name].env |= {"HOST": name, "CA_ADDRESS": lab.nodes["ca"].v4, "HOST_ADDRESS": lab.nodes[name].v4}
        said: list[tuple[str, str, str]] = []
        serving = ""
        for block in blocks(readme):
            for name in block.nodes:
                machine = machines[name]
                token = machines["ca"].node.dir / f"{name}.token"
                if token.exists():  # carried over by the person who reads this
                    shutil.copy(token, machine.node.dir)
                for command in commands(block.text):
                    if "urlopen" in command:
                        until(lambda at=machines[serving]: at.serving("api", 8080))
                    said.append((name, command.strip(), machine.enter(command)))
                    if "http.server" in command:
                        serving = name  # the newest is the one that is asked next
        yield machines, said, lab


def output(said: list[tuple[str, str, str]], start: str) -> list[str]:
    return [out for _, command, out in said if command.startswith(start)]


def test_the_request_is_answered_by_name_before_and_after_the_move(played) -> None:
    assert output(played[1], "retinue run --as web") == ["200\n", "200\n"]


def test_policy_explains_both_directions(played) -> None:
    allowed, denied = output(played[1], "retinue explain")
    assert allowed.startswith("ALLOWED  web -> api tcp/8080")
    assert "rule web-to-api (shop.yaml:" in allowed
    assert denied.startswith("DENIED  api -> web tcp/8080")
    assert denied.endswith("denied, and the reason stands above\n")
    assert "default deny" in denied


def test_the_policy_and_the_move_say_what_they_did(played) -> None:
    (applied,) = output(played[1], "retinue-ca policy apply")
    assert "+ web -> api  tcp/8080" in applied
    (moved,) = output(played[1], "retinue-ca workload move")
    assert moved.startswith("api/0: host-b -> host-a, epoch 2\n")
    assert "not waited out" not in moved
    assert "not yet reported" not in moved


def test_status_shows_the_host(played) -> None:
    (shown,) = output(played[1], "retinue status")
    assert "spiffe://shop.example/host/host-a" in shown
    assert "host-b" in shown


def test_a_workload_without_a_rule_has_no_name_and_no_answer(played) -> None:
    """Positive control of the block above: the same request the other way round."""
    machine = played[0]["host-b"]
    played[0]["ca"].enter("retinue-ca workload add batch --host host-b --label role=batch")
    ask = """retinue run --as batch --wait 15 -- python3 -c 'import urllib.request as u; u.urlopen("http://api:8080", timeout=5)'"""
    done = run(["bash", "-c", ask], netns=machine.node.netns, env=machine.env, cwd=machine.node.dir, codes=range(256))
    assert done.returncode == 1
    assert "URLError" in done.stderr


def links(machine: Machine) -> set[str]:
    rows = run(["ip", "-o", "link"], netns=machine.node.netns).stdout.splitlines()
    return {row.split(":")[1].strip().partition("@")[0] for row in rows}


def test_down_takes_everything_away(played) -> None:
    for name in HOSTS:
        machine = played[0][name]
        assert "rtn0" in links(machine), "positive control"
        machine.enter("retinue down")
        assert links(machine) == {"lo", "eth0"}
        assert run(["nft", "list", "tables"], netns=machine.node.netns).stdout.strip() == ""


def test_every_block_is_executed_here_or_by_another_test(readme: str) -> None:
    fenced = re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    marked = [block.text for block in blocks(readme)]
    assert len(marked) >= 8
    others = [text for text in fenced if text not in marked]
    # `make demo` is test_demo.py, `make test` is what runs this.
    assert [line.split("#")[0].strip() for text in others for line in text.splitlines()] == ["make demo", "make test"]


def test_nothing_stays(played) -> None:
    lab = played[2]
    lab.stop()
    assert lab_registry.leftovers(lab.entry) == []
