"""`retinue-ca migrate`, `replica`, `processes`: the database, its schema, and who works on it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, output_of
from identity import cliout
from identity.cliout import Output
from identity.errors import BadState


def register(app: typer.Typer) -> None:
    """Hang the commands into the program."""
    app.command("migrate", epilog="Example: retinue-ca migrate --dry-run")(migrate)
    app.command("replica", epilog="Example: retinue-ca replica /srv/retinue-ca-2")(replica)
    app.command("processes", epilog="Example: retinue-ca processes -o json")(processes)


def migrate(
    directory: Dir = DEFAULT_DIR,
    to: Annotated[int | None, typer.Option("--to", metavar="VERSION", min=1, help="Another version than this program's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Bring the database to this program's schema version, or one step back for the program before.

    Stop every server on it first. An SQLite database is copied before anything changes.
    """
    from ca import migrations, postgres
    from ca.directory import DATABASE
    from ca.schema import SCHEMA_VERSION
    from ca.serve import sole
    from ca.store import Store

    target = SCHEMA_VERSION if to is None else to
    with sole(directory):
        address = postgres.address_of(directory)
        path = directory / DATABASE
        version = migrations.version_of(path if address is None else address)
        steps = migrations.plan(version, target)
        copy = None
        if steps and not dry_run:
            store = Store.open(path, version=version) if address is None else Store.open_shared(address, version=version)
            try:
                if store.shared:
                    _alone(store)
                else:
                    copy = str(migrations.copy_aside(path, version))
                migrations.migrate(store, target)
            finally:
                store.settle()
    data = {"from": version, "to": target, "steps": [s.what for s in steps], "applied": bool(steps) and not dry_run, "copy": copy}

    def human() -> None:
        for step in steps:
            print(f"{step.source} -> {step.target}: {step.what}")
        print(f"schema version {version}, nothing to do" if not steps else "nothing was changed" if dry_run else f"now at version {target}")
        if copy is not None:
            cliout.note(f"the database as it was: {copy}")

    cliout.emit(data, output_of(output, as_json), human=human)


def _alone(store: object) -> None:
    from ca import processes as living_ones
    from ca.store import Store

    assert isinstance(store, Store)
    if living := living_ones.living(store):
        raise BadState(
            "store.in_use", f"{len(living)} CA processes work on that database", hint="stop all of them first"
        )


def replica(
    target: Annotated[Path, typer.Argument(metavar="NEWDIR", help="The directory of the further process; copy it to its machine.")],
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Make the directory of a further CA process on the same PostgreSQL database, without the root key.

    After a rotation of keys run it again with the same NEWDIR and restart that process.
    """
    from ca import replica as replicas

    done = replicas.copy(directory, target)

    def human() -> None:
        print(f"{len(done.files)} files in {done.directory}")
        cliout.note(f"it holds private keys: move it over a safe way, then: retinue-ca serve --dir {done.directory}")

    cliout.emit(asdict(done), output_of(output, as_json), human=human)


def processes(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """The CA processes on the database of this one, and when each was last seen."""
    from ca import processes as known
    from ca.directory import open_store

    store = open_store(directory)
    try:
        if not store.shared:
            raise BadState("replica.store", "this control plane is one process with SQLite", hint="see: retinue-ca info")
        with store.read() as tx:
            found = known.all_of(tx)
    finally:
        store.close()
    cliout.emit(
        [asdict(p) for p in found], output_of(output, as_json), columns=("id", "listen", "started", "seen", "revision"),
        rows=[
            (p.id, p.listen, time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(p.started)), f"{p.seen_ago} s ago", p.revision)
            for p in found
        ],
    )  # fmt: skip
