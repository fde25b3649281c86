from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput, BadState, NotVerified, Unreachable
from identity.names import SpiffeId
from identity.records import Taint
from identity.revocation import spki_hash
from identity.wire.enroll import SvidReply
from identity.wire.local import SvidFiles
from mesh import svid_files
from mesh.svid import WorkloadSvids, renew_at, taint_at
from tests.unit.mesh.conftest import DOMAIN, NOW


@given(st.integers(0, 10**9), st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_renewal_is_around_half_of_life(start, life, unit):
    assert 0.4 * life - 1e-3 <= renew_at(start, start + life, unit) - start <= 0.6 * life + 1e-3


@given(st.integers(0, 10**9), st.integers(1, 10**5), st.floats(0, 3), st.floats(0, 1, exclude_max=True))
def test_a_tainted_certificate_is_renewed_in_what_is_left_of_the_span_or_half_of_it(since, spread, late, unit):
    taint = Taint(key="0" * 64, since=since, until=since + spread)
    heard = since + late * spread
    at = taint_at(taint, heard, unit)
    if heard >= taint.until:
        assert at == heard
        return
    assert heard <= at <= max(taint.until, heard + spread / 2) + 1e-3
    assert taint_at(taint, since - 50, unit) == pytest.approx(since + unit * spread, abs=1e-3)


@pytest.mark.parametrize("late", [0.0, 0.5, 0.9])
def test_a_crowd_that_hears_late_together_asks_for_at_most_twice_the_mean(late):
    taint = Taint(key="0" * 64, since=0, until=1000)
    moments = [taint_at(taint, 1000 * late, n / 5000) for n in range(5000)]
    tenths = Counter(int(at // 100) for at in moments)
    assert max(tenths.values()) <= 2 * len(moments) / 10 + 1


class Issuer:
    """Signs with the real authority; `fail` and `name` make it misbehave."""

    def __init__(self, live) -> None:
        self.live, self.count, self.fail, self.name, self.csr = live, 0, None, None, None

    async def __call__(self, request) -> SvidReply:
        self.count += 1
        await asyncio.sleep(0)
        if self.fail:
            raise self.fail
        name = SpiffeId.workload(self.live.trust.trust_domain, self.name or request.workload)
        chain = self.live.authority.issue_workload(self.csr or request.csr, name, [], self.live.now)
        return SvidReply(spiffe_id=str(name), chain=chain, bundle="")


@pytest.fixture
def issuer(live):
    return Issuer(live)


@pytest.fixture
def clock(live):
    return [float(live.now)]


@pytest.fixture
def svids(live, issuer, clock):
    return WorkloadSvids(issuer, lambda: live.trust, lambda: clock[0])


async def test_one_request_serves_many_and_renewal_comes_at_half_life(svids, issuer, clock):
    files = await asyncio.gather(*(svids.get("web", 0) for _ in range(5)))
    assert issuer.count == 1
    assert len({f.key for f in files}) == 1
    assert svids.due() is not None
    clock[0] += 2.5 * 3600
    renewed = await svids.get("web", 0)
    assert issuer.count == 2
    assert renewed.key != files[0].key


async def test_a_failed_renewal_serves_the_old_one_while_it_lasts(svids, issuer, clock):
    first = await svids.get("web", 0)
    issuer.fail = Unreachable("ca.unreachable", "no")
    clock[0] += 3 * 3600
    assert await svids.get("web", 0) == first
    clock[0] += 3600
    with pytest.raises(Unreachable):
        await svids.get("web", 0)


async def test_a_failed_renewal_is_tried_again_later(svids, issuer, clock):
    first = await svids.get("web", 0)
    issuer.fail = Unreachable("ca.unreachable", "no")
    clock[0] += 3 * 3600
    for _ in range(5):
        assert await svids.get("web", 0) == first
    assert issuer.count == 2
    assert 15 <= svids.due() - clock[0] <= 30
    clock[0] += 31
    issuer.fail = None
    assert (await svids.get("web", 0)).key != first.key
    assert issuer.count == 3


async def test_a_new_bundle_keeps_what_it_still_trusts_and_replaces_the_rest(svids, issuer, live, tmp_path):
    from ca.authority import Authority

    first = await svids.get("web", 0)
    live.trust = live.authority.trust_bundle(1, live.now)
    assert await svids.get("web", 0) == first
    assert issuer.count == 1
    live.authority = Authority.create(tmp_path / "other", live.trust.trust_domain, live.now)
    live.trust = live.authority.trust_bundle(2, live.now)
    issuer.fail = Unreachable("ca.unreachable", "no")
    with pytest.raises(Unreachable):  # not the old one: nobody believes it any more
        await svids.get("web", 0)
    issuer.fail = None
    second = await svids.get("web", 0)
    assert second.key != first.key
    assert second.bundle == live.trust.roots_pem()


async def test_certificates_for_others_are_refused(svids, issuer):
    from cryptography.hazmat.primitives.asymmetric import ec

    from identity import certs

    issuer.name = "other"
    with pytest.raises(NotVerified) as caught:
        await svids.get("web", 0)
    assert caught.value.code == "svid.name"
    issuer.name, issuer.csr = None, certs.make_csr(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(NotVerified) as caught:
        await svids.get("web", 0)
    assert caught.value.code == "svid.foreign_key"
    assert svids.due() is None


async def test_keys_go_with_the_instance(svids, issuer):
    await svids.get("web", 0)
    await svids.get("web", 1)
    svids.keep_only(frozenset({"web/1"}))
    assert set(svids._held) == {"web/1"}
    await svids.get("web", 0)
    assert issuer.count == 3
    assert "PRIVATE" not in repr(svids._held["web/0"])


# ---- files

FILES = SvidFiles(spiffe_id="spiffe://x/wl/a", certificate="cert\n", key="key\n", bundle="bundle\n", expires=1)


def test_files_have_their_modes_and_change_only_when_needed(tmp_path):
    directory = tmp_path / "deep" / "svid"
    assert svid_files.write(directory, FILES)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()}
    assert modes == {"cert.pem": 0o644, "key.pem": 0o600, "bundle.pem": 0o644}
    before = {p.name: p.stat().st_ino for p in directory.iterdir()}
    assert not svid_files.write(directory, FILES)
    assert {p.name: p.stat().st_ino for p in directory.iterdir()} == before
    assert svid_files.write(directory, FILES.model_copy(update={"bundle": "new\n"}))
    assert (directory / "bundle.pem").read_text() == "new\n"
    assert (directory / "key.pem").stat().st_ino == before["key.pem"]
    assert svid_files.environment(directory, FILES)["SVID_KEY"] == str(directory / "key.pem")
    (directory / "other").write_text("")
    svid_files.remove(directory)
    assert [p.name for p in directory.iterdir()] == ["other"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("key\n")
    directory = tmp_path / "svid"
    directory.mkdir()
    (directory / "key.pem").symlink_to(victim)
    svid_files.write(directory, FILES.model_copy(update={"key": "secret\n"}))
    assert victim.read_text() == "key\n"
    assert not (directory / "key.pem").is_symlink()


def test_a_place_that_cannot_be_written_is_bad_state(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadState) as caught:
        svid_files.write(tmp_path / "file" / "svid", FILES)
    assert caught.value.code == "svid.write"


def test_the_reload_command(tmp_path):
    svid_files.reload(f"touch {tmp_path}/done")
    assert (tmp_path / "done").exists()
    for command in ("false", "/no/such/command", "'unbalanced"):
        with pytest.raises(BadInput) as caught:
            svid_files.reload(command)
        assert caught.value.code == "svid.reload"


def test_private_directories_of_ended_programs_are_collected(tmp_path):
    alive, dead = svid_files.private_dir(tmp_path, os.getpid()), tmp_path / "run" / "4194000-1"
    svid_files.write(alive, FILES)
    svid_files.write(dead, FILES)
    (tmp_path / "run" / "not-ours").mkdir()
    svid_files.collect(tmp_path)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted([alive.name, "not-ours"])
    (tmp_path / "run" / "not-ours").rmdir()
    svid_files.remove_dir(alive)
    assert not (tmp_path / "run").exists()
    svid_files.collect(tmp_path)




# ---- what the programs of others are used to


def test_modes_and_an_expired_root_that_is_left_out(tmp_path, ca, tmp_path_factory):
    from ca.authority import Authority
    from identity.certs import not_after, pem

    old = Authority.create(tmp_path_factory.mktemp("old") / "ca", DOMAIN, NOW - 10 * 366 * 86400)
    fresh, stale = pem(ca.authority.root), pem(old.root)
    end = not_after(old.root)
    assert svid_files.living(fresh + stale, end - 1) == fresh + stale
    assert svid_files.living(fresh + stale, end) == fresh
    assert svid_files.living(stale, end) == stale  # nothing is no bundle
    svid_files.write(tmp_path / "svid", FILES.model_copy(update={"bundle": fresh}))
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "svid").iterdir()}
    assert modes == {"cert.pem": 0o644, "key.pem": 0o600, "bundle.pem": 0o644}


def test_a_signal_reaches_the_process_of_a_file(tmp_path):
    pid_file = tmp_path / "pid"
    script = "import signal,sys; signal.signal(signal.SIGHUP, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    pid_file.write_text(f"{process.pid}\n")
    svid_files.send(pid_file, svid_files.check_signal("HUP"))
    assert process.wait(10) == 7
    process.stdout.close()
    for text in (f"{process.pid}", "", "x", "1", "-1", "0"):
        pid_file.write_text(text)
        with pytest.raises(BadInput) as caught:
            svid_files.send(pid_file, signal.SIGHUP)
        assert caught.value.code == "svid.pid"
    with pytest.raises(BadInput):
        svid_files.send(tmp_path / "nothing", signal.SIGHUP)
    assert svid_files.check_signal("SIGUSR1") is signal.SIGUSR1
    with pytest.raises(BadInput):
        svid_files.check_signal("KILLALL")


async def test_the_moment_of_a_taint_is_drawn_once(live, monkeypatch):
    issuer = Issuer(live)
    now, trust = [float(live.now)], [live.trust]
    svids = WorkloadSvids(issuer, lambda: trust[0], lambda: now[0])
    await svids.get("cart", 0)
    held = svids.shown("cart/0")
    taint = Taint(key=spki_hash(held.svid.chain[1]), since=live.now, until=live.now + 1000)
    draws = iter([0.5, 0.1])
    monkeypatch.setattr("mesh.svid.random.random", lambda: next(draws))
    for sequence in (1, 2):
        trust[0] = replace(live.trust, sequence=live.trust.sequence + sequence, tainted=(taint,))
        await svids.get("cart", 0)
        assert svids.shown("cart/0").renew_at == live.now + 500
