"""`retinue-ca policy apply`, `show` and `history`: the files in force, and putting others in their place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, client, output_of, policy_app, when
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput

if TYPE_CHECKING:
    from identity.wire.admin import PolicyFileIn, PolicyReply

MAX_POLICY: Final = 12 << 20  # bytes of a file


@policy_app.command("apply", epilog="Example: retinue-ca policy apply shop.yaml --dry-run")
def policy_apply(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Policy files; together they are the policy.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, test and diff it; change nothing.")] = False,
    author: Annotated[str, typer.Option(metavar="NAME", help="Who wrote it, for the history.")] = "",
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Put a policy in force, when its own tests pass. Prints the pairs that gain and lose."""
    from identity.wire.admin import PolicyApply, PolicyReply

    texts, parts = policy_files(files)
    request = PolicyApply(files=texts, dry_run=dry_run, author=author, parts=parts)
    done = client(directory).post("/v1/policy", request, PolicyReply, timeout=120)

    def human() -> None:
        print_difference(done.gained, done.lost)
        print(
            f"{'would be' if not done.applied else 'in force:'} revision {done.revision}, digest {done.digest[:16]}"
        )

    cliout.emit(done, output_of(output, as_json), human=human)


def policy_files(files: list[Path]) -> tuple[list[PolicyFileIn], list[str]]:
    """Policy files as they are, or the files and signed parts of a bundle. Raises BadInput."""
    from identity.wire.admin import PolicyFileIn
    from policy.bundle import is_bundle, read_bundle

    texts = [_read(f) for f in files]
    if any(map(is_bundle, texts)):
        if len(files) != 1:
            raise BadInput("bundle.alone", "a signed bundle stands alone", hint="give the bundle only")
        found = read_bundle(str(files[0]), texts[0])
        return [PolicyFileIn(name=name, text=text) for name, text in found.files], found.texts()
    # The digest covers names: what a file is called counts, not where it lies, unless two are called the same.
    plain = len({f.name for f in files}) == len(files)
    return [PolicyFileIn(name=f.name if plain else f.as_posix(), text=t) for f, t in zip(files, texts, strict=True)], []


def print_difference(gained: list[dict[str, Any]], lost: list[dict[str, Any]]) -> None:
    """Pairs that gain and lose, for people."""
    for sign, pairs in (("+", gained), ("-", lost)):
        for pair in pairs:
            print(f"{sign} {pair['src']} -> {pair['dst']}  {pair['ports']}")
    if not gained and not lost:
        print("no pair gains or loses anything")


def _read(path: Path) -> str:
    from policy.texts import decode

    try:
        with path.open("rb") as f:
            data = f.read(MAX_POLICY + 1)
    except OSError as e:
        raise BadInput("policy.file", f"cannot read {path}: {e.strerror}", hint="name policy files, or one signed bundle") from None
    if len(data) > MAX_POLICY:
        raise BadInput("policy.file", f"{path} is larger than {MAX_POLICY} bytes", hint="split the policy into files by scope")
    return decode(data, str(path))


@policy_app.command("show", epilog="Example: retinue-ca policy show --revision 3")
def policy_show(
    revision: Annotated[int | None, typer.Option(metavar="N", min=1, help="An older revision.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write its files to this folder as well.")] = None,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """The files of the policy in force, or of an older revision."""
    from identity.wire.admin import PolicyReply

    found = client(directory).get("/v1/policy", PolicyReply, {"revision": revision})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for file in found.files:
            (out / Path(file.name).name).write_text(file.text)

    def human() -> None:
        _policy_head(found)
        for file in found.files:
            print(f"# ---- {cliout.clean(file.name)}")
            print("\n".join(cliout.clean(line) for line in file.text.splitlines()))

    cliout.emit(found, output_of(output, as_json), human=human)


def _policy_head(found: PolicyReply) -> None:
    print(
        f"# revision {found.revision}, {when(found.issued)}, by {cliout.clean(found.author)}, digest {found.digest}"
    )


@policy_app.command("history", epilog="Example: retinue-ca policy history")
def policy_history(
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """Every revision, newest first."""
    found = client(directory).raw("GET", "/v1/policy/history")["revisions"]
    cliout.emit(found, output_of(output, as_json), columns=("revision", "issued", "author", "how", "digest"),
                rows=[(r["revision"], when(r["issued"]), r["author"], r["kind"], r["digest"]) for r in found])  # fmt: skip
