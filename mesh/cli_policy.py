"""`retinue policy`: check, test, explain and question policy files, offline.

Exit status: 0 yes, 1 the answer is no (a test failed, a lint found an error, formatting differs), 2 bad input.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput
from mesh.cli_policy_ask import blast_radius, diff, explain, matrix, what_if, who_can_reach
from mesh.policy_files import (
    At,
    Flows,
    Format,
    Given,
    Inventory,
    Json,
    MaybeInventory,
    MorePolicies,
    Policies,
    given_files,
    load_policy,
    own_policy,
    read_inventory,
    read_text,
)

if TYPE_CHECKING:
    from policy.lint import Flow

app = typer.Typer(
    no_args_is_help=True, help="Check, test, explain and question policy files.", add_completion=False
)


@app.command(epilog="Example: retinue policy check shop.yaml")
def check(files: Given = None, policy: MorePolicies = None, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Read the files and say whether they are a valid policy, and which."""
    output = Output.JSON if as_json else output
    loaded = load_policy(given_files(files, policy))
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

    loaded = load_policy(given_files(files, policy), at)
    recording = Recording.of(read_flow_files(flows), loaded.now) if flows else None
    results = run_tests(own_policy(loaded), loaded.program, read_inventory(inventory), None, recording)
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


app.command(epilog="Example: retinue policy explain shop/web shop/api tcp/8080 -p shop.yaml -i inventory.yaml")(explain)
app.command(epilog="Example: retinue policy matrix -p shop.yaml -i inventory.yaml")(matrix)
app.command("who-can-reach", epilog="Example: retinue policy who-can-reach shop/db -p shop.yaml -i inventory.yaml --on tcp/5432")(who_can_reach)
app.command("blast-radius", epilog="Example: retinue policy blast-radius shop/web -p shop.yaml -i inventory.yaml")(blast_radius)
app.command("what-if", epilog="Example: retinue policy what-if shop/web role=batch -p shop.yaml -i inventory.yaml")(what_if)
app.command(epilog="Example: retinue policy diff -p shop.yaml --against old.yaml -i inventory.yaml")(diff)


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

    loaded = load_policy(given_files(files, policy), at)
    found = findings(own_policy(loaded), read_inventory(inventory), loaded.now, _used(flows, inventory))
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

    loaded = load_policy(given_files(files, policy), at)
    before = load_policy(against, at).program if against else None
    found = judge(loaded.program, Recording.of(read_flow_files(flows), loaded.now).edges, read_inventory(inventory), before)
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

    loaded = load_policy(given_files(files, policy), at)
    seen = [(f.src, f.dst, f.proto, f.port) for f in read_flow_files(flows) if f.verdict == "allow"] if flows else None
    found = numbers(own_policy(loaded), loaded.program, read_inventory(inventory), seen)
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
    read_text(path)
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

    summary = export_policy(kind, load_policy(policy, at).program, read_inventory(inventory), inside or [], out)
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
        flows, read_inventory(inventory), by or [], similarity, accept or [], reject or [], decisions, out
    )  # fmt: skip

    def human() -> None:
        if out is None:
            print(found["policy"], end="")
        else:
            rows = [(p["id"], p["kind"], p["state"], " | ".join(p["ends"])) for p in found["proposals"]]
            cliout.table(("id", "kind", "state", "of"), rows)

    cliout.emit(found, output, human=human)
    cliout.note(f"{found['observed']} flows seen, {found['permitted']} permitted; {found['over_permission']:.1%} of those never seen")  # fmt: skip
