"""Rows whose truth is held by tests elsewhere: those are run here, so that the table says what was seen, not what is promised."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any, Final

from tests.chaos.registry import Run, row

ROOT: Final = Path(__file__).resolve().parents[2]


async def pytest_of(run: Run, *nodes: str, timeout: float = 900.0) -> None:
    """Run these tests; every one must pass, and there must be some. A file that is not there is said."""
    missing = [n for n in nodes if not (ROOT / n.partition("::")[0]).exists()]
    if missing:
        run.absent = f"no test {', '.join(missing)} in this tree"
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", *nodes, cwd=ROOT, env={**os.environ, "CI": "true"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), timeout)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error|errors|skipped)", out.decode().splitlines()[-1])}
    run.note(**counts)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", out.decode(), re.MULTILINE)
    run.check(f"all of {', '.join(n.split('/')[-1] for n in nodes)} pass {failed[:3] or ''}".strip(), process.returncode == 0)
    run.check("some ran", counts.get("passed", 0) > 0)


async def cargo_of(run: Run, *names: str) -> None:
    """The same for tests of the engine."""
    passed = 0
    for name in names:
        process = await asyncio.create_subprocess_exec(
            "cargo", "test", "--manifest-path", "mesh/engine/Cargo.toml", "--locked", "--no-default-features", "-q", name, cwd=ROOT,
            env={**os.environ, "PATH": f"{Path.home()}/.cargo/bin:{os.environ['PATH']}"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await process.communicate()
        passed += sum(int(n) for n in re.findall(r"(\d+) passed", out.decode()))
        run.check(f"engine: {name}", process.returncode == 0)
    run.note(engine_passed=passed)
    run.check("some ran", passed > 0)


def held(name: str, title: str, passes: str, *nodes: str, caveat: str = "", cargo: tuple[str, ...] = ()) -> None:
    """A row that is these tests."""

    @row(name, title, passes, stage="none")
    async def body(_: Any, run: Run) -> None:
        if nodes:
            await pytest_of(run, *nodes)
        if cargo:
            await cargo_of(run, *cargo)
        if caveat:
            run.caveat(caveat)


FAULTS: Final = "tests/netns/test_attacks_faults.py"
held("F6", "Database lock or timeout during a push", "0 removals without a committed delete",
     "tests/unit/ca/test_mirror.py", "tests/sim/test_faults.py")  # fmt: skip
held("F19a", "Replayed, forged, truncated packets", "0 delivered, 0 bytes answered, 0 crash",
     f"{FAULTS}::test_a_hundred_thousand_bad_datagrams", f"{FAULTS}::test_replayed_packets_deliver_nothing_also_after_a_restart",
     caveat="10^5 malformed datagrams here; the 10^6 mutated ones are the engine's own tests")  # fmt: skip
held("F20a", "Handshake flood, in the engine's own tests", "valid macs are answered with cookies, one limit for all",
     cargo=("a_flood_of_valid_macs", "under_load_a_cookie", "one_limit_for_all"))  # fmt: skip
held("F28", "Tampered state file, rollback", "refused and said, stays deny", "tests/unit/mesh/test_state.py",
     "tests/cli/test_bad_host.py::test_an_altered_state_file", "tests/cli/test_bad_host.py::test_a_truncated_state_file")  # fmt: skip
held("F29", "Wrong file modes", "refused; fixed by the documented command",
     "tests/unit/mesh/test_state.py::test_an_open_directory_is_refused", "tests/unit/mesh/test_state.py::test_a_file_others_can_reach_is_refused",
     "tests/unit/mesh/test_state.py::test_another_owner_is_refused", "tests/unit/ca/test_store.py::test_a_database_others_can_read")  # fmt: skip
held("F31a", "Bodies of every bad kind, floods of connections", "each refused, and the next is served",
     "tests/unit/ca/test_listener.py", "tests/netns/test_attacks_ca.py::test_bodies_of_every_bad_kind",
     "tests/netns/test_attacks_ca.py::test_a_flood_of_connections_keeps_no_member_from_its_changes")  # fmt: skip
held("F32a", "Everything wrecked, in every order", "denied stays denied, permitted comes back", f"{FAULTS}::test_wrecked_and_repaired",
     f"{FAULTS}::test_wrecked_on_both_hosts_while_both_agents_are_stopped", f"{FAULTS}::test_engine_and_agent_killed_in_every_order")  # fmt: skip
held("F33", "One bad record", "all others updated, the row reported", "tests/unit/ca/test_mirror.py::test_a_bad_row_is_reported_and_stops_nobody",
     "tests/netns/test_attacks_database.py")  # fmt: skip
held("F35", "Unprivileged local user", "EACCES 100 %", "tests/netns/test_attacks_workload.py::test_nobody_reaches_no_socket_and_no_file",
     caveat="the kernel refuses before we see it, so there is no audit line")  # fmt: skip
held("F39a", "Hostile names over the command line and the database", "refused by name, nothing changed",
     "tests/netns/test_attacks_database.py::test_names_that_are_no_names", "tests/cli/test_bad_input.py", "tests/unit/identity/test_names.py")  # fmt: skip
held("F41a", "Who may call what, and pinned roots", "strangers get the two calls of enrolment only",
     "tests/netns/test_attacks_ca.py::test_strangers_get_the_two_calls_of_enrolment_only",
     "tests/netns/test_attacks_ca.py::test_a_workload_certificate_is_no_endpoint", "tests/unit/mesh/test_control.py")  # fmt: skip


@row("F21", "Many reconnect at once", "2000 TLS agents back <= 15 s after an outage, administrators answered <= 1 s p99", stage="none")
async def herd(_: Any, run: Run) -> None:
    """Real certificates and TLS 1.3 connections to a real server; both sides' handshakes are on this machine."""
    agents = 2000 if run.seconds is not None else 300
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.ca_herd", "--agents", str(agents), "--changes", "3", cwd=ROOT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 900)
    text = out.decode()
    back = re.search(r"agents back ([0-9.]+) s", text)
    spread = {name: re.search(rf"{name}\s+p50\s+([0-9.]+)\s+p99\s+([0-9.]+)", text) for name in
              ("policy change to every stream", "revocation to all who see it", "admin requests meanwhile")}  # fmt: skip
    run.check(f"it ran {'' if process.returncode == 0 else text[-200:]}".strip(), process.returncode == 0 and back is not None and all(spread.values()))
    if back is None or not all(spread.values()):
        return
    p99 = {name: float(found[2]) for name, found in spread.items() if found}
    run.note(agents=agents, back_s=float(back[1]), policy_p99_ms=p99["policy change to every stream"],
             revocation_p99_ms=p99["revocation to all who see it"], admin_p99_ms=p99["admin requests meanwhile"])  # fmt: skip
    run.check("all back within 15 s", float(back[1]) <= 15)
    run.check("administrators within 1 s", p99["admin requests meanwhile"] <= 1000)
    if agents < 2000:
        run.caveat(f"{agents} agents instead of 2000 (ARGS=\"--seconds 1\")")


@row("F22", "Rotation of the authority under traffic", "peak issuance <= 2x mean, 0 failed handshakes", stage="none")
async def rotation(_: Any, run: Run) -> None:
    await pytest_of(run, "tests/netns/test_rotation.py")


held("F34", "Mixed versions", "the release before and ours, in every order: 0 lost by upgrades; schema one version forth and back",
     "tests/netns/test_versions.py", "tests/unit/ca/test_migrations.py", "tests/netns/test_engine_handover.py")  # fmt: skip
held("F36", "Relay or lighthouse lost", "kill 1 of 2: 0 lost",
     "tests/ha/test_two_processes.py::test_a_killed_process_loses_nobody", caveat=(
         "hosts reach each other directly, so there is no relay to lose; what tells them of each other is the CA: one of two CA processes is killed"))  # fmt: skip
