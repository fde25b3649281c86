"""`retinue-ca policy ...` beyond its files (ca/cli_policy_files.py): authority, bundles, plan, rollouts, history, questions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ca.cli import (
    DEFAULT_DIR,
    Dir,
    Format,
    Json,
    client,
    output_of,
    policy_app,
    when,
)
from ca.cli_policy_files import policy_files, print_difference
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput

if TYPE_CHECKING:
    from identity.wire.policy import CanaryChoice, RolloutReply

authority_app = typer.Typer(no_args_is_help=True, help="Who may sign policy, outside this CA.", rich_markup_mode=None)
rollout_app = typer.Typer(no_args_is_help=True, help="Roll a policy out: canary, watch, keep or go back.", rich_markup_mode=None)
ask_app = typer.Typer(no_args_is_help=True, help="Questions about what is in force now.", rich_markup_mode=None)

Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Policy files, or one signed bundle.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it there (default: standard output).")]
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def register() -> None:
    """Put the groups beside the commands."""
    policy_app.add_typer(authority_app, name="authority")
    policy_app.add_typer(rollout_app, name="rollout")
    policy_app.add_typer(ask_app, name="ask")


# ---- authority and bundles


@authority_app.command("show", epilog="Example: retinue-ca policy authority show")
def authority_show(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """The policy authority that this CA and its hosts know. With -o json it serves as FILE of `retinue policy`."""
    from identity.wire.policy import AuthorityReply

    found = client(directory).get("/v1/policy/authority", AuthorityReply)

    def human() -> None:
        if found.version:
            print(f"version {found.version}, fingerprint {found.fingerprint}")
        else:
            print("none: the CA's policy key alone signs; make one with: retinue policy authority new")

    cliout.emit(found, output_of(output, as_json), human=human)


@authority_app.command("apply", epilog="Example: retinue-ca policy authority apply authority.json --bundle next.bundle")
def authority_apply(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The chain of documents: retinue policy authority sign.")],
    bundle: Annotated[Path | None, typer.Option("--bundle", metavar="BUNDLE", help="The policy in force, signed for this authority.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Take the first or the next authority documents. From then on no policy passes without its operators' signatures."""
    from identity.wire.policy import AuthorityApply, AuthorityReply

    top = _json(path)
    chain = top if isinstance(top, list) else top.get("authority") or top.get("chain") or []
    files, parts = policy_files([bundle]) if bundle is not None else ([], [])
    texts = [one if isinstance(one, str) else json.dumps(one) for one in chain]
    done = client(directory).post(
        "/v1/policy/authority", AuthorityApply(chain=texts, files=files, parts=parts), AuthorityReply, timeout=120
    )
    cliout.emit(done, output_of(output, as_json), human=lambda: print(f"version {done.version}, fingerprint {done.fingerprint}"))


def _json(path: Path) -> Any:
    try:
        top = json.loads(path.read_text())
    except OSError as error:
        raise BadInput("file.read", f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise BadInput("authority.form", f"{path} is not JSON", hint="see: retinue policy authority new") from None
    if not isinstance(top, list | dict):
        raise BadInput("authority.form", f"{path} holds no authority document")
    return top


@policy_app.command("bundle", epilog="Example: retinue-ca policy bundle --out current.bundle")
def bundle(
    out: Out = None, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """The policy in force as a bundle: what `retinue policy sign --base` begins with."""
    from identity.records_policy import parse_sealed
    from identity.wire.policy import BundleReply
    from policy.bundle import Bundle, dump_bundle

    found = client(directory).get("/v1/policy/bundle", BundleReply)
    made = Bundle(
        found.trust_domain, tuple((f.name, f.text) for f in found.files) if found.parts else (),
        tuple(map(parse_sealed, found.parts)), tuple(found.authority),
    )  # fmt: skip
    _write(out, dump_bundle(made), output_of(output, as_json))


def _write(out: Path | None, text: str, output: Output) -> None:
    """The text to its file (then the answer says where), or to standard output: as it is, or in JSON."""
    if out is None:
        cliout.emit({"text": text}, output, human=lambda: print(text, end=""))
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise BadInput("file.write", f"cannot write {out}: {error.strerror}") from None
    cliout.emit({"file": str(out)}, output, human=lambda: print(out))


# ---- plan


@policy_app.command("plan", epilog="Example: retinue-ca policy plan shop.yaml --budget 0")
def plan(
    files: Files,
    budget: Annotated[int, typer.Option(metavar="N", min=0, help="Recorded flows that may be denied from now on.")] = 0,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Tests, lints, difference and a replay of the flows of 30 days, as one report. Exit status 1: not good."""
    from identity.wire.policy import PlanReply, PolicyPlan

    texts, parts = policy_files(files)
    found = client(directory).post("/v1/policy/plan", PolicyPlan(files=texts, parts=parts, budget=budget), PlanReply, timeout=300)

    def human() -> None:
        for test in found.tests:
            print(f"{'pass' if test['passed'] else 'FAIL'}  {cliout.clean(test['where'])}  {cliout.clean(test['message'])}")
        for one in found.lints:
            print(f"{one['code']} {one['severity']}  {cliout.clean(one['where'])}  {cliout.clean(one['message'])} -- {cliout.clean(one['fix'])}")
        print_difference(found.gained, found.lost)
        replayed = found.replayed
        for one in replayed["denied"]:
            print(f"DENIED  {one['src']} -> {one['dst']} {one['flow']}, seen {one['count']} times, last {when(one['last'])}: {cliout.clean(one['reason'])}")
        print(f"replay: {replayed['flows']} recorded flows, {replayed['broken']} would be denied, budget {replayed['budget']}")
        if found.signed:
            print(f"signatures: {cliout.clean(found.signed)}")
        print("good" if found.good else "NOT GOOD")

    cliout.emit(found, output_of(output, as_json), human=human)
    if not found.good:
        raise typer.Exit(1)


# ---- rollouts

CanaryOption = Annotated[list[str] | None, typer.Option("--canary", metavar="KEY=VALUE", help="The canary: workloads with these labels; may be repeated.")]
Percent = Annotated[int | None, typer.Option("--percent", metavar="N", min=1, max=100, help="The canary: so many percent of the workloads.")]
OnHost = Annotated[list[str] | None, typer.Option("--host", metavar="HOST", help="The canary: the workloads that are on HOST now; may be repeated.")]


def _choice(labels: list[str] | None, percent: int | None, hosts: list[str] | None, *, everybody: bool = False) -> CanaryChoice:
    from identity.labels import parse_labels
    from identity.wire.policy import CanaryChoice

    return CanaryChoice(labels=parse_labels(labels or []), percent=percent, hosts=hosts or [], everybody=everybody)


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,8})([smhd])", text)
    if match is None:
        raise BadInput("time.duration", f"not a duration: {ascii(text)[:40]}", hint="write 90s, 30m, 2h or 7d")
    return int(match[1]) * _UNITS[match[2]]


@rollout_app.command("start", epilog="Example: retinue-ca policy rollout start shop.yaml --canary env=staging --watch 2h")
def rollout_start(
    files: Files,
    canary: CanaryOption = None, percent: Percent = None, host: OnHost = None,
    everybody: Annotated[bool, typer.Option("--everybody", help="No canary: all at once, watched.")] = False,
    watch: Annotated[str, typer.Option(metavar="DURATION", help="How long everybody is watched before it is kept.")] = "1h",
    budget: Annotated[int, typer.Option(metavar="N", min=0, help="Denied flows that were seen before, until it goes back.")] = 0,
    author: Annotated[str, typer.Option(metavar="NAME", help="Who wrote it, for the history.")] = "",
    auto: Annotated[bool, typer.Option("--auto", help="From canary to everybody by itself after --watch.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although the replay finds flows that would be denied.")] = False,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Put a policy in force for a canary, beside the one in force for everybody else."""
    from identity.wire.policy import RolloutReply, RolloutStart

    texts, parts = policy_files(files)
    asked = RolloutStart(
        files=texts, parts=parts, author=author, canary=_choice(canary, percent, host, everybody=everybody),
        watch=_seconds(watch), budget=budget, auto=auto, force=force,
    )  # fmt: skip
    _show(client(directory).post("/v1/policy/rollout/start", asked, RolloutReply, timeout=300), output_of(output, as_json))


@rollout_app.command("status", epilog="Example: retinue-ca policy rollout status")
def rollout_status(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Where the rollout stands, and what was denied so far."""
    from identity.wire.policy import RolloutReply

    _show(client(directory).get("/v1/policy/rollout", RolloutReply), output_of(output, as_json))


@rollout_app.command("promote", epilog="Example: retinue-ca policy rollout promote")
def rollout_promote(
    canary: CanaryOption = None, percent: Percent = None, host: OnHost = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """To a larger canary, to everybody (watched), and once more: keep it."""
    from identity.wire.policy import RolloutReply, RolloutStep

    choice = _choice(canary, percent, host) if canary or percent is not None or host else None
    done = client(directory).post("/v1/policy/rollout/promote", RolloutStep(canary=choice), RolloutReply, timeout=120)
    _show(done, output_of(output, as_json))


@rollout_app.command("abort", epilog="Example: retinue-ca policy rollout abort --why 'batch jobs fail'")
def rollout_abort(
    why: Annotated[str, typer.Option(metavar="TEXT", help="For the audit.")] = "",
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Back to the policy before, for everybody, at once."""
    from identity.wire.policy import RolloutReply, RolloutStep

    _show(client(directory).post("/v1/policy/rollout/abort", RolloutStep(why=why), RolloutReply, timeout=120), output_of(output, as_json))


def _show(found: RolloutReply, output: Output) -> None:
    def human() -> None:
        one = found.rollout
        if one is None:
            print("no policy was ever rolled out in steps")
            return
        print(f"{one['id']}: {one['state']} since {when(one['stage'])}, canary {one['canary']}, digest {one['digest'][:16]} after {one['before'][:16]}")
        print(f"denied that was seen before: {found.counted}, budget {one['budget']}; watch {one['watch']} s")
        if one["why"]:
            print(cliout.clean(one["why"]))
        for d in found.denials:
            note = d["not_counted"] or "counts"
            print(f"  {cliout.clean(d['src'])} -> {cliout.clean(d['dst'])} {d['flow']}  {d['count']} times, by {', '.join(d['reported_by'])}: {note}")

    cliout.emit(found, output, human=human)


# ---- history


@policy_app.command("diff", epilog="Example: retinue-ca policy diff 3 5")
def diff(
    one: Annotated[int, typer.Argument(metavar="A", min=1, help="A revision.")],
    other: Annotated[int, typer.Argument(metavar="B", min=1, help="Another one.")],
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """What revision B gives and takes compared with A, over the workloads there are now."""
    from identity.wire.admin import PolicyReply

    found = client(directory).get("/v1/policy/compare", PolicyReply, {"one": one, "other": other})
    cliout.emit(found, output_of(output, as_json), human=lambda: print_difference(found.gained, found.lost))


@policy_app.command("rollback", epilog="Example: retinue-ca policy rollback 3")
def rollback(
    revision: Annotated[int, typer.Argument(metavar="REV", min=1, help="The revision to publish anew.")],
    signed: Annotated[Path | None, typer.Option("--signed", metavar="BUNDLE", help="Its files, signed anew: needed with an authority.")] = None,
    author: Annotated[str, typer.Option(metavar="NAME", help="For the history.")] = "",
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Publish an older revision anew, as a new revision."""
    from identity.wire.admin import PolicyReply
    from identity.wire.policy import PolicyRollback

    _, parts = policy_files([signed]) if signed is not None else ([], [])
    done = client(directory).post("/v1/policy/rollback", PolicyRollback(revision=revision, author=author, parts=parts), PolicyReply, timeout=120)

    def human() -> None:
        print_difference(done.gained, done.lost)
        print(f"in force: revision {done.revision}, digest {done.digest[:16]}")

    cliout.emit(done, output_of(output, as_json), human=human)


@policy_app.command("export-history", epilog="Example: retinue-ca policy export-history history.jsonl")
def export_history(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")], directory: Dir = DEFAULT_DIR,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Every policy, placement and bundle as signed, with the log that proves that none is missing; for `retinue policy as-of`."""
    ca, part = client(directory, 120.0), out.with_name(f".{out.name}.part")
    page = ca.raw("GET", "/v1/policy/export-history")
    size, done = page["size"], 0
    try:
        with part.open("w") as f:
            f.write(page["first"])
            while done < size:
                page = ca.raw("GET", "/v1/policy/export-history", query={"after": done, "size": size})
                f.writelines(page["lines"])
                done += len(page["lines"])
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadInput("file.write", f"cannot write {out}: {error.strerror}") from None
    cliout.emit({"file": str(out), "leaves": done}, output_of(output, as_json), human=lambda: print(f"{done} leaves of the log in {out}"))


# ---- questions


@ask_app.command("matrix", epilog="Example: retinue-ca policy ask matrix")
def ask_matrix(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Everything that is allowed now."""
    _rows(client(directory, 120.0).raw("GET", "/v1/policy/ask", query={"question": "matrix"}), output_of(output, as_json))


@ask_app.command("who-can-reach", epilog="Example: retinue-ca policy ask who-can-reach shop/db --on tcp/5432")
def ask_who(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workload that is asked.")],
    on: Annotated[str | None, typer.Option("--on", metavar="PORT", help="Only on tcp/443, 443, icmp ...")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Who may send to NAME now."""
    _rows(client(directory).raw("GET", "/v1/policy/ask", query={"question": "who-can-reach", "name": name, "on": on}), output_of(output, as_json))


@ask_app.command("blast-radius", epilog="Example: retinue-ca policy ask blast-radius shop/web")
def ask_radius(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workload in wrong hands.")],
    depth: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most so many steps.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """All that whoever holds NAME could reach now, step by step."""
    found = client(directory).raw("GET", "/v1/policy/ask", query={"question": "blast-radius", "name": name, "depth": depth})
    rows = [(r["name"], r["hops"], " -> ".join(r["chain"])) for r in found]
    cliout.emit(found, output_of(output, as_json), columns=("name", "hops", "by way of"), rows=rows)


def _rows(found: Any, output: Output) -> None:
    rows = [(r["src"], r["dst"], f"{r['proto']}/{r['ports']}" if r.get("ports") else r["proto"]) for r in found["allow"]]
    cliout.emit(found, output, columns=("from", "to", "ports"), rows=rows)


@policy_app.command("flows", epilog="Example: retinue-ca policy flows --out flows.jsonl")
def flows(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write them there, as JSON lines.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """What the hosts reported as forwarded, for `retinue policy draft`, `lint`, `replay` and `test --flows`."""
    text = client(directory, 120.0).raw("GET", "/v1/policy/flows")["text"]
    if out is not None:
        _write(out, text, output_of(output, as_json))
        return
    found = [json.loads(line) for line in text.splitlines()]
    rows = [(r["src"], r["dst"], r["proto"], r.get("port", ""), r.get("count", 1), when(r["time"])) for r in found]
    cliout.emit(found, output_of(output, as_json), columns=("from", "to", "proto", "port", "seen", "last"), rows=rows)


@policy_app.command("inventory", epilog="Example: retinue-ca policy inventory --out inventory.yaml")
def inventory(
    out: Out = None, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """The workloads there are, as an inventory for the questions of `retinue policy`."""
    _write(out, client(directory).raw("GET", "/v1/policy/inventory")["text"], output_of(output, as_json))
