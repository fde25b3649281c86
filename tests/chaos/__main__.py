"""`make chaos`: the failure table with measured figures. Writes out/chaos.json (`row, verdict, figures`).

    make chaos ARGS="--rows F1,F11 --seconds N --seed S"     --fast, --soak MINUTES, --list, --publish

Without arguments every row in its short form: about half an hour on two cores. `--seconds 300` makes rows full-sized (five
minutes without a CA, 100 kills, 500 damaged databases): about two hours. `--publish` writes docs/FAILURES.md from the file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from identity.errors import NoPrivilege
from mesh.lab import Lab
from tests.chaos.registry import Result, Row, Run, order, play, table
from tests.chaos.rows import ROWS
from tests.chaos.rows_crowd import Crowd
from tests.chaos.stage import Stage

OUT = Path(__file__).resolve().parents[2] / "out" / "chaos.json"
DOC = OUT.parents[1] / "docs" / "FAILURES.md"
CROWD = 50


async def go(rows: Sequence[Row], seed: int, seconds: float | None) -> list[Result]:
    """Play the rows, stage by stage, in the order of the table. Each is on disk when it is over."""
    results: list[Result] = []

    async def each(stage: object, kind: str) -> None:
        for one in sorted(rows, key=lambda r: r.final):
            if one.stage == kind:
                results.append(await play(one, stage, Run(seed, seconds)))
                print(table(results[-1:]).splitlines()[0], flush=True)
                save(results[-1:], seed)

    await each(None, "none")
    if any(r.stage == "small" for r in rows):
        async with Stage() as stage:
            await stage.begin()
            await each(stage, "small")
    if any(r.stage == "crowd" for r in rows):
        async with Crowd(CROWD) as crowd:
            await crowd.settle()
            await each(crowd, "crowd")
    return sorted(results, key=lambda r: order(r.row))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when a row fails."""
    parser = argparse.ArgumentParser(prog="chaos", description="Break everything on purpose and print what came of it.")
    parser.add_argument("--rows", default="", help="comma-separated; without: all")
    parser.add_argument("--fast", action="store_true", help="only the rows that also run in continuous integration")
    parser.add_argument("--seconds", type=float, help="length of rows that last; also makes them full-sized")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="random chaos only")
    parser.add_argument("--prefer", action="store_true", help="on a machine that does other things too: the lab gets most of the processor")
    parser.add_argument("--publish", action="store_true", help="write docs/FAILURES.md from out/chaos.json")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    chosen = sorted(ROWS.values(), key=lambda r: order(r.name))
    if args.publish:
        return publish()
    if args.list:
        print("\n".join(f"{r.name:<5} {'fast' if r.fast else '    '} {r.title}: {r.passes}" for r in chosen))
        return 0
    if args.rows:
        wanted = args.rows.split(",")
        if unknown := [w for w in wanted if w not in ROWS]:
            parser.error(f"no row {', '.join(unknown)}; see --list")
        chosen = [r for r in chosen if r.name in wanted]
    elif args.soak is not None:
        chosen, args.seconds = [ROWS["F42"]], args.soak * 60
    elif args.fast:
        chosen = [r for r in chosen if r.fast]
    if os.geteuid() != 0:
        print(f"error[{NoPrivilege.__name__}]: the chaos lab needs root\nhint: run it with sudo", file=sys.stderr)
        return 4
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 20)
    print(f"seed {seed}", flush=True)
    Lab.sweep()
    if args.prefer:
        prefer()
    results = asyncio.run(go(chosen, seed, args.seconds))
    print("\n" + table(results))
    return int(any(r.verdict in {"fail", "error"} for r in results))


def prefer() -> None:
    """This process and all it starts in a control group of its own with forty times the usual share (cgroup v1 and v2).

    Nice values do not do it: with autogroups they count within one session only.
    """
    for root, file, share in ((Path("/sys/fs/cgroup/cpu"), "cpu.shares", "40960"), (Path("/sys/fs/cgroup"), "cpu.weight", "4000")):
        group = root / f"retinue-chaos-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            (group / file).write_text(share)
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return
    print("no control group can be made here: the lab shares the processor", file=sys.stderr)


def save(results: Sequence[Result], seed: int) -> None:
    """Write out/chaos.json: these rows are replaced, the others stay as they were measured (each row says when)."""
    OUT.parent.mkdir(exist_ok=True)
    with OUT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of different rows may go on at once
        known = {r["row"]: r for r in json.loads(OUT.read_text())["rows"]} if OUT.exists() else {}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        known |= {r.row: r.json() | {"seed": seed, "at": stamp} for r in results}
        machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}
        rows = sorted((r for n, r in known.items() if n in ROWS), key=lambda r: order(r["row"]))
        OUT.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


HEAD = """\
# What was broken on purpose, and what came of it

Generated by `make chaos ARGS=--publish` from out/chaos.json, the file that `make chaos` writes; each row says when it was
measured and how busy the machine was, for figures of a machine that does other things say little ({cpus} cores, Linux {kernel}, Python {python}). Hosts are network namespaces with real
processes; probes run 200 times a second on permitted and denied pairs, UDP and TCP, over IPv4 and IPv6. A row fails when
anything is delivered on a denied pair while it runs. `partial`: everything checked held, but less was done than asked, as said.

| row | what is broken | passes when | verdict | figures | measured, load, time in which something waited for a processor |
|---|---|---|---|---|---|
"""


def publish() -> int:
    """Write the table for readers. Exit status 1 when nothing was measured yet."""
    if not OUT.exists():
        print("nothing was measured yet: make chaos", file=sys.stderr)
        return 1
    data = json.loads(OUT.read_text())
    lines = []
    for r in sorted(data["rows"], key=lambda r: order(r["row"])):
        figures = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in r["figures"].items() if k not in {"trace", "bridge", "kinds"})
        why = f"{figures}. {r['reason']}" if r["reason"] else figures
        cells = (r["row"], r["title"], r["pass"], r["verdict"], why, f"{r['at'][:16]}Z, {r.get('load', '?')}, {r.get('pressure', '?')} %")
        lines.append("| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for c in cells) + " |")
    missing = sorted((n for n in ROWS if n not in {r["row"] for r in data["rows"]}), key=order)
    text = HEAD.format(**data["machine"]) + "\n".join(lines) + "\n"
    if missing:
        text += f"\nNot measured since: {', '.join(missing)}.\n"
    DOC.write_text(text)
    print(f"{DOC}: {len(lines)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
