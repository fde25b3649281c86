"""`retinue policy`: check, test, explain and question policy files, offline.

Exit status: 0 yes, 1 the answer is no (a test failed, a lint found an error, formatting differs), 2 bad input.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput, NotFound

if TYPE_CHECKING:
    from policy.compile import Inactive
    from policy.lint import Flow
    from policy.model import Policy
    from policy.program import Program, Subject
    from policy.questions import Difference, Row

app = typer.Typer(
    no_args_is_help=True, help="Check, test, explain and question policy files.", add_completion=False
)

Policies = Annotated[
    list[Path], typer.Option("--policy", "-p", metavar="FILE", help="Policy file, or folder of .yaml files; may be repeated.")
]
Inventory = Annotated[
    Path, typer.Option("--inventory", "-i", metavar="FILE", help="Inventory file: the workloads and their labels.")
]
Given = Annotated[list[Path] | None, typer.Argument(metavar="FILE...", help="Policy files, or folders of .yaml files.")]
MorePolicies = Annotated[list[Path] | None, typer.Option("--policy", "-p", metavar="FILE", help="The same, as an option.")]
MaybeInventory = Annotated[
    Path | None, typer.Option("--inventory", "-i", metavar="FILE", help="Inventory file: the workloads and their labels.")
]
Format = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]
Json = Annotated[bool, typer.Option("--json", help="The same as -o json.")]
Flows = Annotated[
    list[Path], typer.Option("--flows", metavar="FILE", help="Recorded flows, JSON lines; may be repeated.")
]
At = Annotated[
    str | None,
    typer.Option("--at", metavar="INSTANT", help="Judge as of this instant, such as 2031-02-11T18:00Z (default: now)."),
]

MAX_READ: Final = 64 * 1024 * 1024  # bytes of one file; the limits of each kind are lower


@dataclass(slots=True)
class Loaded:
    """A policy read from files: ours with all its parts, or an imported one with its program only."""

    program: Program
    policy: Policy | None = None
    asleep: tuple[Inactive, ...] = ()
    now: int = 0
    files: list[str] = field(default_factory=list)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_READ + 1)
    except FileNotFoundError:
        raise NotFound("file.missing", f"there is no file {path}", hint="name policy files, or a folder of them") from None
    except OSError as error:
        raise BadInput("file.read", f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_READ:
        raise BadInput("file.large", f"{path} is larger than {MAX_READ} bytes")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise BadInput("file.encoding", f"{path}:{line}:{column}: not UTF-8 text", hint="save it as UTF-8") from None


def _files(paths: list[Path]) -> list[tuple[str, str]]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in {".yaml", ".yml"})
            if not inside:
                raise NotFound("file.missing", f"the folder {path} holds no .yaml file")
            found += inside
        else:
            found.append(path)
    return [(str(path), _text(path)) for path in dict.fromkeys(found)]


def _now(at: str | None) -> int:
    import time

    from policy.windows import parse_instant

    return int(time.time()) if at is None else parse_instant(at)


def _load(paths: list[Path], at: str | None = None) -> Loaded:
    from policy.compile import compile_policy, inactive
    from policy.imported import KEY, load_imported
    from policy.language import load

    files, now = _files(paths), _now(at)
    foreign = [name for name, text in files if re.search(rf'^["\']?{KEY}["\']?\s*:', text, re.MULTILINE)]
    if foreign:
        if len(files) > 1:
            raise BadInput(
                "policy.mixed",
                f"{foreign[0]} is an imported policy; it stands alone",
                hint="give that one file only",
            )
        return Loaded(load_imported(*files[0]).program, now=now, files=foreign)
    policy = load(files)
    return Loaded(
        compile_policy(policy, now), policy, inactive(policy, now), now, [name for name, _ in files]
    )


def _given(files: list[Path] | None, more: list[Path] | None) -> list[Path]:
    given = [*(files or ()), *(more or ())]
    if not given:
        raise BadInput("usage", "no policy file", hint="name one, such as shop.yaml")
    return given


def _own(loaded: Loaded) -> Policy:
    if loaded.policy is None:
        raise BadInput("policy.imported", f"{loaded.files[0]} is an imported policy: it has no tests or lints of its own",
                       hint="ask it with matrix, explain, who-can-reach, blast-radius, what-if or diff")  # fmt: skip
    return loaded.policy


def _subjects(path: Path | None) -> tuple[Subject, ...]:
    from policy.inventory import load_inventory

    return () if path is None else load_inventory(str(path), _text(path))


def _find(subjects: tuple[Subject, ...], name: str) -> Subject:
    from policy import foreign
    from policy.document import nearest

    for one in subjects:
        if one.name == name or (one.spiffe_id and one.spiffe_id == name):
            return one
    if foreign.is_foreign(name):
        return foreign.subject(name)
    raise NotFound(
        "policy.subject",
        f"the inventory has no workload {ascii(name)[:80]}",
        hint=nearest(name, [s.name for s in subjects]),
    )


@app.command(epilog="Example: retinue policy check shop.yaml")
def check(files: Given = None, policy: MorePolicies = None, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Read the files and say whether they are a valid policy, and which."""
    output = Output.JSON if as_json else output
    loaded = _load(_given(files, policy))
    own = loaded.policy
    data: dict[str, Any] = {"valid": True, "digest": loaded.program.digest, "files": loaded.files,
                            "rules": sum(len(t.rules) for t in loaded.program.tiers)}  # fmt: skip
    if own is not None:
        data |= {
            "segments": len(own.segments),
            "groups": len(own.groups),
            "tests": len(own.tests),
            "not_in_force": len(loaded.asleep),
        }
    cliout.emit(data, output, columns=("what", "value"), rows=[(k, _word(v)) for k, v in data.items()])


def _word(value: Any) -> str:
    return (
        ", ".join(value)
        if isinstance(value, list)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


@app.command("test", epilog="Example: retinue policy test shop.yaml -i inventory.yaml")
def run_file_tests(
    files: Given = None, policy: MorePolicies = None, inventory: MaybeInventory = None, at: At = None,
    flows: Annotated[
        list[Path] | None, typer.Option("--flows", metavar="FILE", help="Recorded flows, for replay tests; may be repeated.")
    ] = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Run the tests that the policy files hold."""
    output = Output.JSON if as_json else output
    from mesh.cli_export import read_flow_files
    from policy.replay import Recording
    from policy.test import run_tests

    loaded = _load(_given(files, policy), at)
    recording = Recording.of(read_flow_files(flows), loaded.now) if flows else None
    results = run_tests(_own(loaded), loaded.program, _subjects(inventory), None, recording)
    data = [
        {
            "passed": r.passed,
            "where": str(r.where),
            "message": r.message,
            "covers": r.covers,
            "stand_in": r.stand_in,
        }
        for r in results
    ]
    rows = [
        ("pass" if r.passed else "FAIL", str(r.where), r.message + (" (stand-ins)" if r.stand_in else ""))
        for r in results
    ]
    cliout.emit(data, output, columns=("result", "where", "test"), rows=rows)
    failed = sum(not r.passed for r in results)
    cliout.note(f"{len(results) - failed} passed, {failed} failed")
    if failed:
        raise typer.Exit(1)


@app.command(epilog="Example: retinue policy explain shop/web shop/api tcp/8080 -p shop.yaml -i inventory.yaml")
def explain(
    src: Annotated[str, typer.Argument(metavar="SRC", help="The workload that asks, or a SPIFFE ID of another trust domain.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="The workload that is asked.")],
    flow: Annotated[str, typer.Argument(metavar="PORT", help="tcp/443, 443 or icmp.")],
    policy: Policies,
    inventory: Inventory,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Say why SRC may or may not send to DST: the deciding rule, near misses, the smallest change."""
    output = Output.JSON if as_json else output
    from policy.explain import explain as explain_flow
    from policy.explain import to_json

    loaded, subjects = _load(policy, at), _subjects(inventory)
    from policy.ports import parse_flow

    proto, port = parse_flow(flow)
    found = explain_flow(
        loaded.program, _find(subjects, src), _find(subjects, dst), proto, port, asleep=loaded.asleep
    )

    def human() -> None:
        print(f"{found.decision.verdict}: {cliout.clean(found.decision.reason)}")
        for miss in found.near_misses:
            print(
                f"near miss: rule {cliout.clean(miss.rule.id)} ({miss.rule.where}): {cliout.clean(miss.failed)}"
            )
        if found.smallest_change is not None:
            print(f"smallest change: {cliout.clean(found.smallest_change)}")
            for line in found.smallest_change.snippet.splitlines():
                print(f"    {cliout.clean(line)}")
        print(f"policy: {found.decision.digest[:16]}")

    cliout.emit(to_json(found), output, human=human)


def _print_rows(rows: list[Row], output: Output) -> None:
    from policy.questions import rows_json

    cells = [(r.src + _net(r.src_net), r.dst + _net(r.dst_net), r.ports) for r in rows]
    cliout.emit(rows_json(rows), output, columns=("from", "to", "ports"), rows=cells)


def _net(text: str) -> str:
    return f" [{text}]" if text else ""


@app.command(epilog="Example: retinue policy matrix -p shop.yaml -i inventory.yaml")
def matrix(policy: Policies, inventory: Inventory, at: At = None, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """List everything that is allowed between the workloads of the inventory."""
    output = Output.JSON if as_json else output
    from policy.questions import matrix as all_rows

    _print_rows(all_rows(_load(policy, at).program, _subjects(inventory)), output)


@app.command("who-can-reach", epilog="Example: retinue policy who-can-reach shop/db -p shop.yaml -i inventory.yaml --on tcp/5432")
def who_can_reach(
    dst: Annotated[str, typer.Argument(metavar="DST", help="The workload that is asked.")],
    policy: Policies,
    inventory: Inventory,
    flow: Annotated[str | None, typer.Option("--on", metavar="PORT", help="Only on tcp/443, 443, icmp ...")] = None,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """List who may send to DST directly."""
    output = Output.JSON if as_json else output
    from policy.questions import who_can_reach as sources

    subjects = _subjects(inventory)
    from policy.ports import parse_flow

    proto, port = parse_flow(flow) if flow is not None else (None, None)
    _print_rows(sources(_load(policy, at).program, subjects, _find(subjects, dst), proto, port), output)


@app.command("blast-radius", epilog="Example: retinue policy blast-radius shop/web -p shop.yaml -i inventory.yaml")
def blast_radius(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workload in wrong hands.")],
    policy: Policies,
    inventory: Inventory,
    depth: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most so many steps.")] = None,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """List all that whoever holds NAME could reach, step by step."""
    output = Output.JSON if as_json else output
    from policy.questions import blast_radius as reached

    subjects = _subjects(inventory)
    found = reached(_load(policy, at).program, subjects, _find(subjects, name).name, depth)
    data = [{"name": r.name, "hops": r.hops, "chain": list(r.chain)} for r in found]
    cliout.emit(
        data,
        output,
        columns=("name", "hops", "by way of"),
        rows=[(r.name, r.hops, " -> ".join(r.chain)) for r in found],
    )


def _print_differences(found: list[Difference], output: Output) -> None:
    data = [{"kind": d.kind, "src": d.src, "dst": d.dst, "ports": str(d.ports)} for d in found]
    cliout.emit(data, output, columns=("", "from", "to", "ports"),
                rows=[("+" if d.kind == "gains" else "-", d.src, d.dst, d.ports) for d in found])  # fmt: skip


@app.command("what-if", epilog="Example: retinue policy what-if shop/web role=batch -p shop.yaml -i inventory.yaml")
def what_if(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workload, there or not.")],
    labels: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="KEY=VALUE to set, KEY= to take away.")],
    policy: Policies,
    inventory: Inventory,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Show what would change if the workload NAME had these labels; a new NAME is a new workload."""
    output = Output.JSON if as_json else output
    from policy.questions import what_if as changed

    wanted: dict[str, str | None] = {}
    for word in labels:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise BadInput(
                "label.form",
                f"not key=value: {ascii(word)[:60]}",
                hint="write role=web, or role= to take it away",
            )
        wanted[key] = value or None
    _print_differences(changed(_load(policy, at).program, _subjects(inventory), name, wanted), output)


@app.command(epilog="Example: retinue policy diff -p shop.yaml --against old.yaml -i inventory.yaml")
def diff(
    policy: Policies,
    against: Annotated[
        list[Path], typer.Option("--against", "-a", metavar="FILE", help="The policy files as they were before.")
    ],
    inventory: Inventory,
    at: At = None,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Show what the policy gives and takes compared with another one, pair by pair."""
    output = Output.JSON if as_json else output
    from policy.questions import difference

    before, after = _load(against, at), _load(policy, at)
    _print_differences(difference(before.program, after.program, _subjects(inventory)), output)


@app.command(epilog="Example: retinue policy lint shop.yaml -i inventory.yaml --strict")
def lint(
    files: Given = None,
    policy: MorePolicies = None,
    inventory: MaybeInventory = None,
    at: At = None,
    flows: Annotated[
        list[Path] | None,
        typer.Option("--flows", metavar="FILE", help="Recorded flows, for the lints about what is used."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Find what is allowed to be written but probably not meant."""
    output = Output.JSON if as_json else output
    from policy.lint import lint as findings

    loaded = _load(_given(files, policy), at)
    found = findings(_own(loaded), _subjects(inventory), loaded.now, _used(flows, inventory))
    data = [
        {
            "code": f.code,
            "severity": f.severity,
            "where": str(f.where) if f.where else None,
            "message": f.message,
            "fix": f.fix,
        }
        for f in found
    ]
    rows = [(f.code, f.severity, f.where, f.message, f.fix) for f in found]
    cliout.emit(data, output, columns=("code", "severity", "where", "finding", "fix"), rows=rows)
    if any(f.severity == "error" or (strict and f.severity == "warning") for f in found):
        raise typer.Exit(1)


def _used(flows: list[Path] | None, inventory: Path | None) -> list[Flow] | None:
    """The allowed flows of a recording as the lints read them; None where there is no recording."""
    from mesh.cli_export import read_flow_files
    from policy.lint import Flow

    if flows is None:
        return None
    if inventory is None:
        raise BadInput("policy.inventory", "flows are judged with an inventory", hint="add --inventory FILE")
    return [Flow(f.src, f.dst, f.proto, f.port, f.time) for f in read_flow_files(flows) if f.verdict == "allow"]


@app.command(epilog="Example: retinue policy replay shop.yaml -i inventory.yaml --flows flows.jsonl --against old.yaml")
def replay(
    flows: Flows,
    inventory: Inventory,
    files: Given = None, policy: MorePolicies = None,
    against: Annotated[
        list[Path] | None, typer.Option("--against", "-a", metavar="FILE", help="The policy in force: what it denies as well is not new.")
    ] = None,
    budget: Annotated[int, typer.Option(metavar="N", min=0, help="So many flows may be denied.")] = 0,
    at: At = None, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Judge recorded flows by the policy, as it is once its audits have ended. Exit status 1: more denied than the budget."""
    output = Output.JSON if as_json else output
    from mesh.cli_export import read_flow_files
    from policy.evaluate import show_flow
    from policy.replay import Recording
    from policy.replay import replay as judge

    loaded = _load(_given(files, policy), at)
    before = _load(against, at).program if against else None
    found = judge(loaded.program, Recording.of(read_flow_files(flows), loaded.now).edges, _subjects(inventory), before)
    data = {
        "flows": found.flows, "unknown": found.unknown, "broken": len(found.broken), "budget": budget,
        "denied": [
            {"src": b.edge[0], "dst": b.edge[1], "flow": show_flow(b.edge[2], b.edge[3]), "count": b.seen.count, "reason": b.decision.reason}
            for b in found.broken
        ],
    }  # fmt: skip
    rows = [(b.edge[0], b.edge[1], show_flow(b.edge[2], b.edge[3]), b.seen.count, b.decision.reason) for b in found.broken]
    cliout.emit(data, output, columns=("from", "to", "flow", "seen", "why"), rows=rows)
    cliout.note(f"{found.flows} recorded flows, {len(found.broken)} would be denied, budget {budget}; {found.unknown} with an end that is gone")
    if len(found.broken) > budget:
        raise typer.Exit(1)


@app.command(epilog="Example: retinue policy segmentation shop.yaml -i inventory.yaml --flows flows.jsonl")
def segmentation(
    inventory: Inventory,
    files: Given = None, policy: MorePolicies = None,
    flows: Annotated[list[Path] | None, typer.Option("--flows", metavar="FILE", help="Recorded flows, for what is used.")] = None,
    at: At = None, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Say in numbers whether the policy segments too finely or too widely. Exit status 1: a budget is exceeded."""
    output = Output.JSON if as_json else output
    from dataclasses import asdict

    from mesh.cli_export import read_flow_files
    from policy.segmentation import OVER, numbers

    loaded = _load(_given(files, policy), at)
    seen = [(f.src, f.dst, f.proto, f.port) for f in read_flow_files(flows) if f.verdict == "allow"] if flows else None
    found = numbers(_own(loaded), loaded.program, _subjects(inventory), seen)
    rows = [
        (s.name, s.members, f"{s.rules} of {s.rules_budget}", s.pairs, "" if s.unused is None else f"{s.unused:.0%} of {s.unused_budget:.0%}",
         "over budget" if s.over or s.under else "")
        for s in found.segments
    ]  # fmt: skip
    cliout.emit(asdict(found) | {"good": found.good}, output, columns=("segment", "members", "rules", "pairs", "unused", ""), rows=rows)
    cliout.note(f"{found.groups} groups, {found.over:.0%} need not be (budget {OVER:.0%}); {found.rights} different rights; "
                f"one workload reaches {found.reach:.1%} of the others")  # fmt: skip
    if not found.good:
        raise typer.Exit(1)


@app.command(epilog="Example: retinue policy fmt --write shop.yaml")
def fmt(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Policy files.")],
    write: Annotated[bool, typer.Option("--write", "-w", help="Change the files in place.")] = False,
) -> None:
    """Even out the spacing of policy files; comments, order and line breaks stay. Without --write: say which would change."""
    from policy.format import fmt as tidy

    changed = []
    for path in files:
        text = _raw(path)
        tidied = tidy(str(path), text)
        if tidied != text:
            changed.append(path)
            if write:
                _replace(path, tidied)
            print(path)
    if changed and not write:
        raise typer.Exit(1)


def _raw(path: Path) -> str:
    _text(path)
    return path.read_bytes().decode("utf-8")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(text.encode("utf-8"))
        part.chmod(path.stat().st_mode & 0o7777)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadInput("file.write", f"cannot write {path}: {error.strerror}") from None


@app.command(epilog="Example: retinue policy schema > policy.schema.json")
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from policy.schema import schema as json_schema

    cliout.emit(json_schema(), Output.JSON)


@app.command("import", epilog="Example: retinue policy import kubernetes manifests/ --out imported")
def import_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="tailscale, kubernetes, nsx, aws, iptables, nftables or cisco-ios.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file, or a folder of them.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for policy.yaml, inventory.yaml and report.json.")
    ],
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:
    """Translate a foreign configuration; what could not be carried over is in the report."""
    output = Output.JSON if as_json else output
    from mesh.cli_import import import_policy

    summary = import_policy(kind, path, out)
    rules = summary.get("rules", {})
    rows = [("rules read", rules.get("in")), ("rules written", rules.get("out")), ("subjects", summary.get("subjects")),
            ("not translated", len(summary.get("untranslated", ())))]  # fmt: skip
    cliout.emit(summary, output, columns=("what", "count"), rows=rows)


@app.command("export", epilog="Example: retinue policy export kubernetes -p shop.yaml -i inventory.yaml --out native")
def export_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="kubernetes or aws.")],
    policy: Policies,
    inventory: Inventory,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the native rules and report.json.")
    ],
    inside: Annotated[
        list[str] | None,
        typer.Option(
            "--inside", metavar="NET", help="A network of the workloads at the target; may be repeated."
        ),
    ] = None,
    at: At = None,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Write the policy as native rules of another system, read them back and compare every pair."""
    output = Output.JSON if as_json else output
    from mesh.cli_export import export_policy

    summary = export_policy(kind, _load(policy, at).program, _subjects(inventory), inside or [], out)
    rows = [(k.replace("_", " "), _word(summary[k])) for k in ("files", "rules", "workloads", "pairs_compared")]
    cliout.emit(summary, output, columns=("what", "value"), rows=rows)
    for text in summary["notes"]:
        cliout.note(text)
    for one in summary["untranslated"]:
        cliout.note(f"not translated: {one['where']}: {one['why']}")


@app.command(epilog="Example: retinue policy draft --flows flows.jsonl -i inventory.yaml --out draft.yaml")
def draft(
    flows: Flows,
    inventory: Inventory,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the policy to this file.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="KEY", help="Label key to tell workloads apart by (default: all)."),
    ] = None,
    accept: Annotated[
        list[str] | None, typer.Option("--accept", metavar="ID", help="Accept a proposal; may be repeated.")
    ] = None,
    reject: Annotated[
        list[str] | None, typer.Option("--reject", metavar="ID", help="Reject a proposal; may be repeated.")
    ] = None,
    decisions: Annotated[
        Path | None,
        typer.Option("--decisions", metavar="FILE", help="Keeps what was accepted and rejected for the next run."),
    ] = None,
    similarity: Annotated[
        float, typer.Option(metavar="SHARE", help="How alike the members of a proposed group are, up to 1.")
    ] = 0.6,
    output: Format = Output.TABLE,
    as_json: Json = False,
) -> None:
    """Draft the least policy for recorded flows, and propose groups; accept or reject each."""
    output = Output.JSON if as_json else output
    from mesh.cli_export import draft_policy

    found = draft_policy(
        flows, _subjects(inventory), by or [], similarity, accept or [], reject or [], decisions, out
    )  # fmt: skip

    def human() -> None:
        if out is None:
            print(found["policy"], end="")
        else:
            rows = [(p["id"], p["kind"], p["state"], " | ".join(p["ends"])) for p in found["proposals"]]
            cliout.table(("id", "kind", "state", "of"), rows)

    cliout.emit(found, output, human=human)
    cliout.note(f"{found['observed']} flows seen, {found['permitted']} permitted; {found['over_permission']:.1%} of those never seen")  # fmt: skip
