"""The directory of a control plane: making one, which store it names, and whether its database is the newest there was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ca import audit, postgres
from ca.authority import Authority
from ca.highwater import Mark
from ca.keystores import KeyPlace
from ca.store import Store
from identity.errors import BadState, Conflict
from identity.names import TrustDomain

DATABASE: Final = "ca.db"
REPLICA: Final = "replica"  # marks the directory of a further process on a shared database
NOBODY: Final = "ca"  # who acts when nobody asked


def create(
    directory: Path, trust_domain: TrustDomain, now: float, *, address: str | None = None,
    place: KeyPlace | None = None,
) -> Authority:
    """Make a new control plane in an empty or missing directory; with `address` its store is that PostgreSQL database.

    Raises Conflict, BadState, Unreachable.
    """
    if (directory / DATABASE).exists() or (directory / postgres.FILE).exists():
        raise Conflict(
            "ca.exists", f"{directory} already holds a control plane", hint="choose another --dir"
        )
    if (directory / "authority.json").exists():
        raise BadState(
            "ca.partial",
            f"{directory} holds an authority but no {DATABASE}",
            hint="restore the database from a backup, or choose another --dir",
        )
    if directory.is_dir() and any(directory.iterdir()):
        raise Conflict(
            "ca.dir_used", f"{directory} is not empty", hint="choose an empty or a new directory"
        )
    if address is not None:
        return _create_shared(directory, trust_domain, now, address, place)
    authority = Authority.create(directory, trust_domain, now, place=place)
    temporary = directory / f".{DATABASE}.{os.urandom(4).hex()}"
    store = Store.create(temporary, str(trust_domain))
    with store.write() as tx:
        audit.append(tx, int(now), NOBODY, "init", str(trust_domain), root=authority.root_fingerprint)
    store.settle()
    os.rename(temporary, directory / DATABASE)
    return authority


def _create_shared(
    directory: Path, trust_domain: TrustDomain, now: float, address: str, place: KeyPlace | None
) -> Authority:
    store = Store.create_shared(address, str(trust_domain))
    try:
        authority = Authority.create(directory, trust_domain, now, place=place)
        with store.write() as tx:
            audit.append(tx, int(now), NOBODY, "init", str(trust_domain), root=authority.root_fingerprint)
        postgres.write_address(directory, address)
    finally:
        store.close()
    return authority


def open_store(directory: Path) -> Store:
    """The store that a directory names. Raises BadState ``store.*``, Unreachable."""
    address = postgres.address_of(directory)
    return Store.open(directory / DATABASE) if address is None else Store.open_shared(address)


def check_newest(store: Store, mark: Mark | None, directory: Path) -> None:
    """Is the database the newest there was? Raises BadState ``store.backup``, ``store.old``."""
    with store.read() as tx:
        revision, backup = store.revision(tx), store.get(tx, "backup_at")
        supersedes = (store.get(tx, "supersedes"), int(store.get(tx, "supersedes_revision") or 0))
    restore = f"retinue-ca restore {directory / DATABASE} --dir {directory} --new-timeline"
    if backup is not None:
        raise BadState(
            "store.backup", f"{directory / DATABASE} is a backup, put there as it is", hint=f"use: {restore}"
        )
    if mark is None:
        return
    if mark.timeline == store.timeline:
        if revision < mark.revision:
            raise BadState(
                "store.old",
                f"the database ends at revision {revision}, but revision {mark.revision} was acknowledged",
                hint=f"put the newest database back; if it is lost: {restore}",
            )
    elif supersedes[0] != mark.timeline or supersedes[1] < mark.revision:
        raise BadState(
            "store.old",
            "the database is of another timeline than the one that was served here",
            hint=f"put the newest database back; if it is lost: {restore}",
        )
