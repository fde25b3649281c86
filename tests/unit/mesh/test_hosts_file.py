"""The hosts file of a program: who is named, and how."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from identity.errors import BadState, NotVerified
from identity.records import PlacementRecord, sign
from identity.wire.local import SnapshotReply
from mesh import hosts_file

KEY = Ed25519PrivateKey.generate()


def envelope(name: str, number: int, *, instance: int = 0, state: str = "active", domain: str = "t.example") -> str:
    return sign(
        PlacementRecord(
            trust_domain=domain, spiffe_id=f"spiffe://{domain}/wl/{name}", name=name, instance=instance, endpoint="a",
            tunnel_key="k", epoch=1, state=state, addresses=[f"100.64.0.{number}", f"fd00::{number}"], labels={}, issued=1,
        ),
        KEY,
    )  # fmt: skip


def reply(**objects: str) -> SnapshotReply:
    return SnapshotReply(timeline="t", revision=1, trust_domain="t.example", objects={k.replace("__", "/"): v for k, v in objects.items()})


@pytest.mark.parametrize(("workload", "names"), [
    ("api", ("api", "api.t.example")),
    ("shop/api", ("api.shop", "api.shop.t.example")),
    ("eu/shop/api", ("api.shop.eu", "api.shop.eu.t.example")),
    ("localhost", ("localhost.t.example",)),
    ("localhost/x", ("x.localhost.t.example",)),
])  # fmt: skip
def test_names(workload: str, names: tuple[str, ...]) -> None:
    assert hosts_file.host_names(workload, "t.example") == names


def test_every_active_placement_has_a_line_for_each_address() -> None:
    found = hosts_file.lines(reply(
        placement__b=envelope("shop/api", 3, instance=1), placement__a=envelope("shop/api", 2), placement__c=envelope("gone", 4, state="revoked"),
        prepare__shop=envelope("moving", 5, state="prepare"), bundle="x", policy="y",
    ))  # fmt: skip
    names = "api.shop api.shop.t.example"
    assert found == [f"{address} {names}" for address in ("100.64.0.2", "fd00::2", "100.64.0.3", "fd00::3")]


@pytest.mark.parametrize("text", ["", "x.y.z", envelope("api", 1, domain="other.example")])
def test_what_is_not_a_placement_is_refused(text: str) -> None:
    with pytest.raises(NotVerified):
        hosts_file.lines(reply(placement__api=text))


@pytest.mark.parametrize("own", [b"127.0.0.1 localhost", b"127.0.0.1 localhost\n", b"\xff bytes\n"])
def test_the_lines_of_the_machine_stay_and_ours_come_first(tmp_path, own: bytes) -> None:
    original, path = tmp_path / "original", tmp_path / "sub" / "hosts"
    original.write_bytes(own)
    hosts_file.write(path, ["100.64.0.1 api"], original)
    written = path.read_bytes()
    assert written.index(b"100.64.0.1 api\n") < written.index(own)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o644, 0o700)
    hosts_file.append(path, ["100.64.0.1 api", "100.64.0.2 web"])
    assert path.read_bytes() == written + b"100.64.0.2 web\n"
    hosts_file.append(path, ["100.64.0.2 web"])
    assert path.read_bytes() == written + b"100.64.0.2 web\n"


def test_a_machine_without_a_hosts_file(tmp_path) -> None:
    hosts_file.write(tmp_path / "hosts", [], tmp_path / "missing")
    assert (tmp_path / "hosts").read_text().splitlines()[0] == "# names of the mesh"


def test_a_place_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadState):
        hosts_file.write(tmp_path / "file" / "hosts", [])
