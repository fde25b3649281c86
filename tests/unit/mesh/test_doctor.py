"""Each finding of the doctor, with its fault planted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from identity.errors import Unreachable
from identity.wire.local import Condition, PeerStatus, Status
from mesh import doctor


def named(checks) -> dict[str, doctor.Check]:
    return {c.name: c for c in checks}


def status(**changes) -> Status:
    values = {
        "version": "1", "trust_domain": "t", "endpoint": "a", "kind": "host", "spiffe_id": "spiffe://t/host/a", "device": "d",
        "interface": "rtn0", "control": "connected", "timeline": "t", "revision": 1, "policy_revision": 1, "policy_digest": "d",
        "staleness_s": 1.0, "svid_expires": 1, "attachments": [], "peers": [], "firewall_elements": 0, "conditions": [], "ready": True,
    } | changes  # fmt: skip
    return Status.model_validate(values)


def test_our_packages_are_ours_and_foreign_ones_are_seen(monkeypatch, tmp_path):
    assert doctor.own_packages().result == "ok"
    import policy

    monkeypatch.setattr(policy, "__file__", str(tmp_path / "policy" / "__init__.py"))
    found = doctor.own_packages()
    assert found.result == "fail"
    assert str(tmp_path) in found.text


def test_a_machine_without_things(monkeypatch):
    assert {c.name for c in doctor._machine()} >= {"packages", "privilege", "/dev/net/tun", "nft", "engine", "IPv6"}
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    assert doctor._nftables().result == "fail"
    real = os.open

    def no_tun(path, *args):
        if str(path) == "/dev/net/tun":
            raise OSError(19, "No such device")
        return real(path, *args)

    monkeypatch.setattr(doctor.os, "open", no_tun)
    assert (doctor._tun().result, doctor._tun().hint) == ("fail", "modprobe tun")
    monkeypatch.setattr(doctor.os, "open", lambda *_: real("/dev/null", os.O_RDWR))
    assert "not the TUN driver" in doctor._tun().text
    monkeypatch.setattr(Path, "read_text", lambda *_: "CapEff:\t0000000000000000\n")
    assert doctor._privilege().result == "fail"


def test_sysctls(tmp_path):
    (tmp_path / "on").write_text("1\n")
    (tmp_path / "off").write_text("0\n")
    assert [doctor._sysctl("x", str(tmp_path / n)).result for n in ("on", "off", "none")] == ["ok", "warn", "warn"]


async def test_not_enrolled_and_no_agent(tmp_path):
    checks = named(await doctor.examine(tmp_path / "none", tmp_path / "agent.sock"))
    assert checks["enrolment"].result == "fail"
    assert "retinue enroll" in checks["enrolment"].hint
    assert checks["agent"].result == "fail"


@pytest.mark.parametrize(
    ("ahead", "result"), [(3600 * 5, "ok"), (60, "warn"), (-1, "fail")]
)
def test_the_certificate(monkeypatch, enrollment, ahead, result):
    monkeypatch.setattr("mesh.enroll.load_enrollment", lambda _: enrollment)
    monkeypatch.setattr(doctor.time, "time", lambda: enrollment.svid.not_after - ahead)
    checks = named(doctor._enrolled(Path("/x")))
    assert (checks["enrolment"].result, checks["certificate"].result) == ("ok", result)


def test_a_running_agent():
    good = named(doctor._running(status()))
    assert {c.result for c in good.values()} == {"ok"}
    assert set(good) == {"agent", "control", "clock", "policy"}
    peer = PeerStatus(endpoint="b", tunnel_key="k", underlay=None, allowed_ips=["x"], cipher="c", latest_handshake=None, rx_bytes=0, tx_bytes=0)
    conditions = [Condition(code="clock.skew", severity="warning", text="t"), Condition(code="e", severity="error", text="t"),
                  Condition(code="i", severity="info", text="t")]  # fmt: skip
    bad = named(doctor._running(status(control="disconnected", ready=False, peers=[peer], conditions=conditions)))
    assert {n: c.result for n, c in bad.items()} == {
        "agent": "ok", "control": "warn", "policy": "fail", "clock.skew": "warn", "e": "fail", "tunnels": "warn",
    }  # fmt: skip
    assert named(doctor._running(status(policy_digest=None)))["policy"].result == "warn"


async def test_the_address_of_the_ca(monkeypatch, enrollment):
    from dataclasses import replace

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        here = replace(enrollment, ca_url=f"https://127.0.0.1:{s.getsockname()[1]}")
        monkeypatch.setattr("mesh.enroll.load_enrollment", lambda _: here)
        assert (await doctor._ca_address(Path("/x")))[0].result == "ok"
    assert (await doctor._ca_address(Path("/x")))[0].result == "warn"

    async def asked(_: Path) -> Status:
        return status()

    monkeypatch.setattr(doctor, "_agent", asked)
    assert "CA address" in named(await doctor.examine(Path("/x"), Path("/y")))

    def none(_: Path) -> None:
        raise Unreachable("enroll.missing", "no")

    monkeypatch.setattr("mesh.enroll.load_enrollment", none)
    assert (await doctor._ca_address(Path("/x")))[0].result == "warn"
