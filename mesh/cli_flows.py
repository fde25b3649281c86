"""`retinue flows`: what this host saw pass, saw refused, and lets pass only while something audits."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from identity import cliout
from identity.cliout import Output
from mesh.cli_node import Format, Json, RunDir, age, ask, size

if TYPE_CHECKING:
    from mesh.local_client import LocalClient
    from policy.flows import FlowRecord, ProcessInfo


def register(app: typer.Typer) -> None:
    """Put the commands under `app`."""
    app.command(epilog="Example: retinue flows --denied --follow")(flows)


def flows(
    denied: Annotated[bool, typer.Option("--denied", help="Only refused ones, and those an audit will refuse at its end.")] = False,
    audited: Annotated[bool, typer.Option("--audited", help="Only those that pass while something audits.")] = False,
    since: Annotated[str, typer.Option("--since", metavar="DURATION", help="No older than this, such as 2h or 7d.")] = "24h",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with each change, one JSON object a line.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="At most so many, the newest.")] = 10_000,
    run_dir: RunDir = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Recorded flows: who, whom, port, verdict and rule, how often, how much, and by which process.

    With -o jsonl the lines are what `retinue policy` commands read with --flows.
    """
    from policy.windows import parse_duration

    begin = int(time.time()) - parse_duration(since)
    verdict = "audit" if audited and not denied else "deny,audit" if denied else ""
    chosen = Output.JSON if as_json else output
    found: list[FlowRecord] = []
    losses: dict[str, int] = {}

    async def body(agent: LocalClient) -> None:
        import json

        from policy.flows import dump_flows, read_flows

        params = {"verdict": verdict, "since": str(begin), "limit": str(limit), **({"follow": "1"} if follow else {})}
        async for line in agent.lines("/v1/flows", params):
            if line.startswith(b'{"losses"'):
                losses.update(json.loads(line)["losses"])
                continue
            records = read_flows("the agent", [line.decode()])
            if follow:
                sys.stdout.write(dump_flows(records))
                sys.stdout.flush()
            else:
                found.extend(records)

    try:
        ask(run_dir, body)
    except KeyboardInterrupt:
        return
    if not follow:
        show(found, losses, chosen)


def show(found: list[FlowRecord], losses: Mapping[str, int], output: Output) -> None:
    """Print records in one of the forms."""
    import json

    from policy.flows import dump_flows

    if output is Output.JSONL:
        sys.stdout.write(dump_flows(found))
        return
    data = {"flows": [json.loads(line) for line in dump_flows(found).splitlines()], "losses": dict(losses)}
    cliout.emit(data, output, human=lambda: table(found, losses, time.time()))


def table(found: list[FlowRecord], losses: Mapping[str, int], now: float) -> None:
    """For people: one line a flow, the newest last."""
    from policy.flows import summarize
    from policy.ports import proto_name

    rows = []
    processes = {(r.src, r.dst, r.proto, r.port): r for r in found if r.src_process or r.dst_process}
    for one in sorted(summarize(found), key=lambda r: r.last):
        at = processes.get((one.src, one.dst, one.proto, one.port))
        on = proto_name(one.proto) + (f"/{one.port}" if one.port is not None else "")
        said = {"allow": "allowed", "deny": "DENIED", "audit": "audit: would be denied"}[one.verdict]
        rows.append((
            age(now - one.last), one.src, one.dst, on, said, one.by or "unknown", one.count, size(one.bytes),
            process(at.src_process if at else None), process(at.dst_process if at else None),
        ))  # fmt: skip
    if rows:
        cliout.table(("last", "source", "destination", "on", "verdict", "by", "count", "bytes", "from process", "to process"), rows)
    else:
        print("No such flow was recorded.")
    lost = {name: number for name, number in losses.items() if number}
    if lost:
        cliout.note("not recorded: " + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(lost.items())))


def process(found: ProcessInfo | None) -> str:
    """``/usr/bin/curl (uid 0, x.service)``; ``elsewhere``; ``unknown``."""
    if found is None:
        return "elsewhere"
    more = ([f"uid {found.uid}"] if found.uid is not None else []) + ([found.unit] if found.unit != "unknown" else [])
    return Path(found.executable).name + (f" ({', '.join(more)})" if more else "")
