"""`retinue-ca host`: who has enrolled; machines that come back, and identities that two machines use."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, Name, client, host_app, output_of, when
from identity import cliout
from identity.cliout import Output

if TYPE_CHECKING:
    from identity.wire.recovery import HostStanding


@host_app.command("list", epilog="Example: retinue-ca host list -o json")
def host_list(directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Every host and sidecar that is or was enrolled."""
    from identity.wire.admin import HostList

    found = client(directory).get("/v1/hosts", HostList).hosts
    rows = [
        (
            h.name,
            h.kind,
            h.state,
            "yes" if h.connected else "no",
            h.revision,
            ", ".join(h.underlay),
            when(h.svid_expires),
        )
        for h in found
    ]
    cliout.emit(found, output_of(output, as_json),
                columns=("name", "kind", "state", "connected", "revision", "underlay", "svid until"), rows=rows)  # fmt: skip


@host_app.command("revoke", epilog="Example: retinue-ca host revoke web-1")
def host_revoke(
    name: Name, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False
) -> None:
    """Revoke a host with its sidecars: certificates, tunnel keys, placements. Its workloads become unplaced."""
    from identity.wire.admin import Host, HostRef

    done = client(directory).post("/v1/hosts/revoke", HostRef(name=name), Host)
    cliout.emit(done, output_of(output, as_json), human=lambda: print(f"{cliout.clean(done.name)} is revoked"))


@host_app.command("standing", epilog="Example: retinue-ca host standing web-1")
def standing(name: Name, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """Its newest certificate, its recoveries in the last 30 days, and whether it is in quarantine."""
    from identity.wire.recovery import HostStanding

    found = client(directory).get("/v1/hosts/standing", HostStanding, {"name": name})
    _print(found, output_of(output, as_json))


@host_app.command("recover", epilog="Example: retinue-ca host recover web-1 --budget 1")
def recover(
    name: Name,
    budget: Annotated[int, typer.Option(metavar="N", min=0, max=1000, help="How many more times within 30 days.")] = 1,
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Let a machine whose certificate ended come back by itself again. Nothing is to be done on the machine."""
    from identity.wire.recovery import HostRecover, HostStanding

    found = client(directory).post("/v1/hosts/recover", HostRecover(name=name, budget=budget), HostStanding)
    _print(found, output_of(output, as_json))


@host_app.command("unquarantine", epilog="Example: retinue-ca host unquarantine web-1")
def unquarantine(name: Name, directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False) -> None:
    """End a quarantine: the machine with the newest certificate goes on, the other is found again when it renews.

    When it is not known which of the two is the real one, enrol it anew instead: retinue-ca token create --replace.
    """
    from identity.wire.admin import HostRef
    from identity.wire.recovery import HostStanding

    found = client(directory).post("/v1/hosts/unquarantine", HostRef(name=name), HostStanding)
    _print(found, output_of(output, as_json))


def _print(found: HostStanding, chosen: Output) -> None:
    since = found.quarantined_at
    rows = [
        ("name", found.name),
        ("newest certificate", found.serial or "unknown"),
        ("recoveries", f"{len(found.recoveries)} of {found.budget} in 30 days"),
        ("quarantine", "no" if since is None else f"since {time.strftime('%Y-%m-%d %H:%MZ', time.gmtime(since))}: {found.reason}"),
    ]
    cliout.emit(found, chosen, columns=("what", "value"), rows=rows)
