"""`retinue flows`: what this host saw pass, saw refused, and lets pass only while something audits."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput, Unreachable
from mesh.cli_node import Format, Json, RunDir, age, ask, parse_flow, size

if TYPE_CHECKING:
    from mesh.local_client import LocalClient
    from policy.flows import FlowRecord, ProcessInfo


def register(app: typer.Typer) -> None:
    """Put the commands under `app`."""
    app.command(epilog="Example: retinue flows --denied --follow")(flows)
    app.command(epilog="Example: retinue trace web shop/api tcp/8080 --far there.json")(trace)


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


def trace(
    src: Annotated[str, typer.Argument(metavar="SRC", help="The workload that asks.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="The workload that is asked.")],
    flow: Annotated[str, typer.Argument(metavar="PORT", help="8080, tcp/8080, udp/53 or icmp.")],
    far: Annotated[
        list[Path] | None, typer.Option("--far", metavar="FILE", help="What `retinue trace ... -o json` said on the other host; may be repeated.")
    ] = None,
    run_dir: RunDir = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:  # fmt: skip
    """The path of one flow, step by step: names, policy, placement, tunnel, firewall, records. Exit 1 when a step fails."""
    import json

    from mesh.trace import BAD, join

    proto, port = parse_flow(flow)
    params = {"src": src, "dst": dst, "proto": proto} | ({"port": str(port)} if port is not None else {})

    async def body(agent: LocalClient) -> list[dict[str, object]]:
        return [json.loads(line) async for line in agent.lines("/v1/trace", params)]

    halves: list[dict[str, object]] = []
    try:
        halves += ask(run_dir, body)
    except Unreachable:
        if not far:
            raise
    halves += [half for path in far or () for half in read_halves(path)]
    found = join(halves)
    cliout.emit(found, Output.JSON if as_json else output, human=lambda: show_trace(found))
    if found["result"] == BAD:
        raise typer.Exit(1)


def read_halves(path: Path) -> list[dict[str, object]]:
    """The halves in a file of `retinue trace -o json`. Raises BadInput."""
    import json

    try:
        with open(path, encoding="utf-8") as file:
            data = json.loads(file.read(1 << 20))
        halves = data.get("halves", [data])
        for half in halves:
            for step in half["steps"]:
                if not all(isinstance(step[key], str) for key in ("step", "result", "text")):
                    raise ValueError(step)
            if not isinstance(half["host"], str) or not all(isinstance(r, str) for r in (*half["roles"], *half["hosts"])):
                raise ValueError(half)
    except OSError as e:
        raise BadInput("trace.file", f"cannot read {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput("trace.file", f"{path} is not what `retinue trace -o json` writes") from None
    return list(halves)


def show_trace(found: Mapping[str, Any]) -> None:
    """A trace for people."""
    mark = {"ok": "ok", "no": "NO", "unknown": "?"}
    for half in found["halves"]:
        print(cliout.clean(f"on {half['host']} ({' and '.join(half['roles']) or 'neither end'})"))
        for step in half["steps"]:
            print(cliout.clean(f"  {mark.get(step['result'], '?'):<3} {step['step']:<18} {step['text']}"))
    for text in found["missing"]:
        print(cliout.clean(f"?     {text}"))


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
    from policy.flows import IDLE, summarize
    from policy.ports import proto_name

    rows = []
    processes = {(r.src, r.dst, r.proto, r.port): r for r in found if r.src_process or r.dst_process}
    for one in sorted(summarize(found), key=lambda r: r.last):
        at = processes.get((one.src, one.dst, one.proto, one.port))
        on = proto_name(one.proto) + (f"/{one.port}" if one.port is not None else "")
        said = {"allow": "allowed", "deny": "DENIED", "audit": "audit: would be denied"}[one.verdict]
        said = "ended: idle" if one.by.startswith(IDLE) else said
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
