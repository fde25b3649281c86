"""The files that the commands of `retinue policy` read, and the options that name them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from identity.cliout import Output
from identity.errors import BadInput, NotFound
from policy.texts import decode

if TYPE_CHECKING:
    from policy.compile import Inactive
    from policy.model import Policy
    from policy.program import Program, Subject

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


def read_text(path: Path) -> str:
    """Its text, line ends as in Unix. Raises NotFound, BadInput ``file.*`` (``file.encoding`` with the position)."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_READ + 1)
    except FileNotFoundError:
        raise NotFound("file.missing", f"there is no file {path}", hint="name policy files, or a folder of them") from None
    except OSError as error:
        raise BadInput("file.read", f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_READ:
        raise BadInput("file.large", f"{path} is larger than {MAX_READ} bytes")
    return decode(data, str(path))


def read_files(paths: list[Path]) -> list[tuple[str, str]]:
    """(name, text) of these files and of the .yaml files in these folders, each once. Raises NotFound, BadInput."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in {".yaml", ".yml"})
            if not inside:
                raise NotFound("file.missing", f"the folder {path} holds no .yaml file")
            found += inside
        else:
            found.append(path)
    return [(str(path), read_text(path)) for path in dict.fromkeys(found)]


def instant(at: str | None) -> int:
    """Seconds since the epoch of the option ``--at``; now without it. Raises BadInput."""
    import time

    from policy.windows import parse_instant

    return int(time.time()) if at is None else parse_instant(at)


def load_policy(paths: list[Path], at: str | None = None) -> Loaded:
    """The policy of these files as of an instant, ours or an imported one. Raises BadPolicy, BadInput, NotFound."""
    from policy.compile import compile_policy, inactive
    from policy.imported import KEY, load_imported
    from policy.language import load

    files, now = read_files(paths), instant(at)
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


def given_files(files: list[Path] | None, more: list[Path] | None) -> list[Path]:
    """Arguments and options together. Raises BadInput ``usage`` without any."""
    given = [*(files or ()), *(more or ())]
    if not given:
        raise BadInput("usage", "no policy file", hint="name one, such as shop.yaml")
    return given


def own_policy(loaded: Loaded) -> Policy:
    """With its tests and lints. Raises BadInput ``policy.imported`` for one that has none."""
    if loaded.policy is None:
        raise BadInput("policy.imported", f"{loaded.files[0]} is an imported policy: it has no tests or lints of its own",
                       hint="ask it with matrix, explain, who-can-reach, blast-radius, what-if or diff")  # fmt: skip
    return loaded.policy


def read_inventory(path: Path | None) -> tuple[Subject, ...]:
    """The workloads of an inventory; none without a file. Raises BadPolicy, BadInput, NotFound."""
    from policy.inventory import load_inventory

    return () if path is None else load_inventory(str(path), read_text(path))


def find_subject(subjects: tuple[Subject, ...], name: str) -> Subject:
    """The workload of this name or SPIFFE ID, or an identity of another trust domain. Raises NotFound ``policy.subject``."""
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
