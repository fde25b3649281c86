"""`retinue-ca backup` and `restore`: the registry as one file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, app, output_of
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput


@app.command(epilog="Example: retinue-ca backup /backups/ca-2031-02-11.db")
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file; nothing is overwritten.")],
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Copy the registry to one file (0600) while the server runs.

    The file holds no private key: keep a copy of the directory's *.key, *.pem and authority.json in a safe place as well.
    """
    import time

    from ca import backup as backups

    done = backups.backup(directory, file, int(time.time()))

    def human() -> None:
        print(f"{done.file}: {done.trust_domain} at revision {done.revision}, {done.bytes} bytes")
        cliout.note("no private key is in it: copy the directory's *.key, *.pem and authority.json as well")

    cliout.emit(asdict(done), output_of(output, as_json), human=human)


@app.command(epilog="Example: retinue-ca restore /backups/ca-2031-02-11.db --new-timeline")
def restore(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A file that retinue-ca backup made.")] = None,
    new_timeline: Annotated[bool, typer.Option("--new-timeline", help="Give up what was acknowledged after the backup.")] = False,
    in_place: Annotated[bool, typer.Option("--in-place", help="PostgreSQL: the database was put back with its own tools.")] = False,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Put a backup in the place of the database, with the server stopped. The old database is kept beside it.

    The directory must hold the authority's files. With --new-timeline, every record is signed anew above all that was
    given out before, and endpoints follow to the restored state; what was done after the backup must be done again.
    """
    import time

    from ca import backup as backups
    from ca.serve import sole

    with sole(directory):
        if in_place and file is None and new_timeline:
            done = backups.continue_in_place(directory, int(time.time()))
        elif file is not None and not in_place:
            done = backups.restore(directory, file, int(time.time()), new_timeline=new_timeline)
        else:
            raise BadInput("restore.what", "restore a FILE, or with --in-place --new-timeline what is in PostgreSQL")

    def human() -> None:
        lost = "an unknown number of" if done.lost is None else str(done.lost)
        print(f"{done.trust_domain} restored at revision {done.revision}, timeline {done.timeline}; {lost} changes are lost")
        if done.replaced:
            print(f"the database before is kept as {done.replaced}")
        for host in done.revoked_hosts:
            print(f"was revoked, is not now: retinue-ca host revoke {cliout.clean(host)}")
        for key in done.revoked_instances:
            name, _, number = key.rpartition("/")
            print(f"was revoked, is not now: retinue-ca workload revoke {cliout.clean(name)} --instance {number}")
        for key in (*done.gone_hosts, *done.gone_instances):
            print(f"was added since the backup, is gone: {cliout.clean(key)}")
        if done.lost != 0 and not done.compared:
            print("the database before cannot be read: check for revocations made since the backup, and make them again")
        cliout.note(f"next: retinue-ca serve --dir {directory}")

    cliout.emit(asdict(done), output_of(output, as_json), human=human)
