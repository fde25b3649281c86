"""mesh.devices: differences of peers, the texts of the userspace API, the kernel's requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import BadInput, BadState, Bug, Conflict, NoPrivilege, NotFound, Unreachable
from identity.keys import b64, unb64, x25519_public
from mesh.devices import DeviceConfig, PeerChange, PeerState, after, peer_changes, uapi
from mesh.devices import kernel as kernel_module
from mesh.devices.fake import FakeDevice
from mesh.devices.kernel import parse_peer, peer_request, peer_requests
from mesh.devices.userspace import UserspaceDevice, find_engine, start_time, version_of
from mesh.plan import AES, CHACHA, PeerPlan
from tests.unit.mesh.plans import tunnel_key

A, B, C = (tunnel_key(x) for x in "abc")


def plan(key: str, *allowed: str, underlay: str | None = None, keepalive: int = 25, cipher: Any = CHACHA) -> PeerPlan:
    return PeerPlan("e", key, underlay, allowed, keepalive, cipher, "")


# ---- differences


def test_an_address_that_changes_hands_is_given_before_it_is_taken() -> None:
    have = after({}, peer_changes({}, {A: plan(A, "100.64.0.1/32"), B: plan(B)}))
    changes = peer_changes(have, {A: plan(A), B: plan(B, "100.64.0.1/32"), C: plan(C)})
    assert [(c.tunnel_key, c.allowed_ips) for c in changes] == [(B, ("100.64.0.1/32",)), (C, ())]  # A loses it thereby
    gone = peer_changes(have, {B: plan(B, "100.64.0.1/32")})
    assert [(c.tunnel_key, c.remove) for c in gone] == [(B, False), (A, True)]


def test_a_peer_that_has_roamed_is_left_where_it_is() -> None:
    roamed = {A: PeerState(underlay="203.0.113.9:1", keepalive=25)}
    assert peer_changes(roamed, {A: plan(A, underlay="192.0.2.1:1")}) == ()
    assert peer_changes({A: PeerState(keepalive=25)}, {A: plan(A, underlay="192.0.2.1:1")})[0].underlay == "192.0.2.1:1"


ADDRESSES = st.sets(st.sampled_from([f"100.64.0.{n}/32" for n in range(1, 6)]))


@st.composite
def peer_plans(draw: st.DrawFn) -> dict[str, PeerPlan]:
    free = draw(st.permutations([f"100.64.0.{n}/32" for n in range(1, 6)]))
    out, at = {}, 0
    for key in draw(st.sets(st.sampled_from([A, B, C]))):
        take = draw(st.integers(0, 2))
        out[key] = plan(key, *free[at : at + take], keepalive=draw(st.sampled_from([0, 25])), cipher=draw(st.sampled_from([CHACHA, AES])))
        at += take
    return out


@given(peer_plans(), peer_plans())
def test_changes_lead_from_one_plan_to_the_other(old: dict[str, PeerPlan], new: dict[str, PeerPlan]) -> None:
    have = after({}, peer_changes({}, old))
    changes = peer_changes(have, new)
    end = after(have, changes)
    assert {k: p.allowed_ips for k, p in end.items()} == {k: frozenset(p.allowed_ips) for k, p in new.items()}
    assert {k: (p.keepalive, p.cipher) for k, p in end.items()} == {k: (p.keepalive, p.cipher) for k, p in new.items()}
    assert peer_changes(end, new) == ()
    # at no step in between does one address have two owners, or one that stays have none
    kept = {a for p in old.values() for a in p.allowed_ips} & {a for p in new.values() for a in p.allowed_ips}
    for n in range(len(changes) + 1):
        owned = [a for p in after(have, changes[:n]).values() for a in p.allowed_ips]
        assert len(owned) == len(set(owned))
        assert kept <= set(owned)


def test_a_change_of_an_unknown_peer_is_nothing() -> None:
    assert after({}, [PeerChange(A, keepalive=1), PeerChange(B, remove=True)]) == {}


# ---- texts


def test_a_set_request() -> None:
    secret = bytes(range(32))
    text = uapi.set_request(
        [
            PeerChange(A, create=True, underlay="[::1]:5", allowed_ips=("100.64.0.1/32", "fd00::1/128"), replace=True,
                       keepalive=25, cipher=AES),
            PeerChange(B, keepalive=0),
            PeerChange(C, remove=True),
        ],
        private_key=secret, listen_port=51820, fwmark=1, ciphers=True,
    )
    assert text.splitlines() == [
        "set=1", f"private_key={secret.hex()}", "listen_port=51820", "fwmark=1",
        f"public_key={unb64(A).hex()}", "retinue_cipher=aes-256-gcm", "endpoint=[::1]:5", "persistent_keepalive_interval=25",
        "replace_allowed_ips=true", "allowed_ip=100.64.0.1/32", "allowed_ip=fd00::1/128",
        f"public_key={unb64(B).hex()}", "update_only=true", "persistent_keepalive_interval=0",
        f"public_key={unb64(C).hex()}", "remove=true", "",
    ]  # fmt: skip
    assert text.endswith("\n\n")
    assert "retinue" not in uapi.set_request([PeerChange(A, create=True, cipher=AES)])
    assert uapi.set_request() == "set=1\n\n"
    with pytest.raises(BadInput):
        uapi.set_request(private_key=b"short")
    with pytest.raises(BadInput):
        uapi.set_request([PeerChange("not a key")])


def test_a_get_answer() -> None:
    private = X25519PrivateKey.generate()
    state = uapi.parse_answer(
        f"private_key={private.private_bytes_raw().hex()}\nlisten_port=51820\nfwmark=0x10\nsomething_new=1\n"
        f"public_key={unb64(A).hex()}\npreshared_key={'0' * 64}\nretinue_cipher=aes-256-gcm\nprotocol_version=1\n"
        "endpoint=[2001:DB8::1]:7\nlast_handshake_time_sec=99\nlast_handshake_time_nsec=1\nrx_bytes=5\ntx_bytes=6\n"
        "persistent_keepalive_interval=25\nallowed_ip=100.64.0.1/32\nallowed_ip=fd00::1/128\n"
        f"public_key={unb64(B).hex()}\nlast_handshake_time_sec=0\nendpoint=odd\nerrno=0\n\nafter=the end\n"
    )
    assert state.public_key == b64(x25519_public(private))
    assert (state.listen_port, state.fwmark) == (51820, 16)
    assert state.peers[A] == PeerState(
        "[2001:db8::1]:7", frozenset({"100.64.0.1/32", "fd00::1/128"}), 25, AES, 99, 5, 6
    )  # fmt: skip
    assert state.peers[B] == PeerState()
    assert private.private_bytes_raw().hex() not in repr(state)
    assert uapi.parse_answer(f"private_key={'0' * 64}\nerrno=0\n\n").public_key is None
    assert uapi.parse_answer(f"public_key={unb64(A).hex()}\nendpoint=192.0.2.1:9\nerrno=0\n\n").peers[A].underlay == "192.0.2.1:9"


@pytest.mark.parametrize(
    "text", ["nonsense\n\n", "listen_port=x\n\n", "public_key=zz\n\n", "public_key=00\n\n", f"private_key={'g' * 64}\n\n"]
)
def test_what_is_no_answer_is_refused(text: str) -> None:
    with pytest.raises(BadState) as refused:
        uapi.parse_answer(text)
    assert refused.value.code == "device.answer"


def test_an_errno_is_told_by_name() -> None:
    with pytest.raises(Bug) as refused:
        uapi.parse_answer("errno=-22\n\n")
    assert "EINVAL" in refused.value.message
    with pytest.raises(Bug, match="9999"):
        uapi.parse_answer("errno=9999\n\n")


@contextlib.asynccontextmanager
async def speaking(path: Path, answer: bytes) -> AsyncIterator[list[bytes]]:
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\n\n"))
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(serve, str(path)):
        yield heard


async def test_requests_over_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    async with speaking(path, b"listen_port=7\nerrno=0\n\n") as heard:
        assert (await uapi.get(path)).listen_port == 7
        await uapi.apply(path, uapi.set_request(listen_port=7))
        assert heard == [b"get=1\n\n", b"set=1\nlisten_port=7\n\n"]
    path.unlink(missing_ok=True)
    async with speaking(path, b"errno=-16\n\n"):
        with pytest.raises(Bug, match="EBUSY"):
            await uapi.apply(path, "set=1\n\n")
    path.unlink(missing_ok=True)
    async with speaking(path, b"cut"):
        with pytest.raises(Unreachable):
            await uapi.get(path)
    with pytest.raises(Unreachable):
        await uapi.get(tmp_path / "none.sock")


# ---- engines


async def test_finding_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "retinue-engine"
    program.write_text("#!/bin/sh\necho retinue-engine 9.8\n")
    program.chmod(0o755)
    assert find_engine(program) == program
    assert await version_of(program) == "9.8"
    program.write_text("#!/bin/sh\necho other 1.0\n")
    assert await version_of(program) is None
    with pytest.raises(NotFound):
        find_engine(tmp_path / "none")
    with pytest.raises(Unreachable):
        await version_of(tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    assert find_engine(None) == program
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NotFound):
        find_engine(None)


def config(directory: Path, engine: Path | None = None) -> DeviceConfig:
    return DeviceConfig("rtnx0", 1420, 0, X25519PrivateKey.generate().private_bytes_raw, directory, engine)


@pytest.mark.parametrize("saved", [None, "{", "[]", '{"pid": 1}', json.dumps({"pid": os.getpid(), "started": 1, "program": "x", "version": None})])
async def test_a_pid_file_that_names_no_engine_is_not_believed(tmp_path: Path, saved: str | None) -> None:
    if saved is not None:
        (tmp_path / "engine-rtnx0.json").write_text(saved)
    device = UserspaceDevice(config(tmp_path))
    assert await device._adopt() is False
    assert device.running is None
    assert device.describe() == "userspace (no engine)"


async def test_an_engine_that_ends_at_once_says_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "cannot open /dev/net/tun" >&2\nexit 3\n')
    program.chmod(0o755)
    with pytest.raises(NoPrivilege, match="cannot open /dev/net/tun") as refused:
        await UserspaceDevice(config(tmp_path, program)).start()
    assert "engine-rtnx0.log" in refused.value.hint
    assert not (tmp_path / "engine-rtnx0.json").exists()


@pytest.mark.parametrize(("name", "words"), [("retinue-engine 9", "-f --low-power rtnx0"), ("another", "-f rtnx0")])
async def test_switches_are_for_an_engine_of_ours(tmp_path: Path, name: str, words: str) -> None:
    program = tmp_path / "engine"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {name} && exit\necho "called with $@" >&2\nexit 3\n')
    program.chmod(0o755)
    with pytest.raises(Unreachable, match=f"called with {words}"):
        await UserspaceDevice(replace(config(tmp_path, program), engine_options=("--low-power",))).start()


def test_start_times() -> None:
    own = start_time(os.getpid())
    assert own is not None
    assert own > 0
    assert start_time(2**22 + 1) is None


async def test_the_fake_keeps_the_contract_of_errors(tmp_path: Path) -> None:
    device = FakeDevice(config(tmp_path))
    assert [await device.start(), await device.start()] == [False, True]
    device.fail = Bug("x", "y")
    with pytest.raises(Bug):
        await device.apply([PeerChange(A, create=True)])
    assert await device.counters() == {}
    await device.apply([PeerChange(A, create=True)])
    assert device.log == [PeerChange(A, create=True)]
    await device.stop(clean=True)
    assert ((await device.read()).peers, device.describe()) == ({}, "fake")


# ---- the kernel's form


def test_requests_to_the_kernel() -> None:
    raw = b64encode(unb64(A)).decode()
    change = PeerChange(A, create=True, underlay="[::1]:5", allowed_ips=("100.64.0.1/32",), keepalive=25, cipher=AES, replace=True)
    assert peer_request(change) == {
        "public_key": raw, "endpoint_addr": "::1", "endpoint_port": 5, "persistent_keepalive": 25,
        "replace_allowed_ips": True, "allowed_ips": ["100.64.0.1/32"],
    }  # fmt: skip
    assert peer_request(PeerChange(A, keepalive=0)) == {"public_key": raw, "update_only": True, "persistent_keepalive": 0}
    assert "replace_allowed_ips" not in peer_request(PeerChange(A, allowed_ips=("100.64.0.1/32",)))
    assert peer_request(PeerChange(A, remove=True)) == {"public_key": raw, "remove": True}


def test_a_long_list_goes_to_the_kernel_in_several_requests() -> None:
    addresses = tuple(f"fd00::{n:x}/128" for n in range(1, 2502))
    whole = PeerChange(A, create=True, underlay="[::1]:5", allowed_ips=addresses, keepalive=25, replace=True)
    first, *more = peer_requests(whole)
    assert first == {**peer_request(whole), "allowed_ips": list(addresses[:1000])}
    assert [set(r) for r in more] == [{"public_key", "update_only", "allowed_ips"}] * 2  # nothing is replaced twice
    assert [a for r in (first, *more) for a in r["allowed_ips"]] == list(addresses)
    assert peer_requests(PeerChange(A, remove=True)) == [peer_request(PeerChange(A, remove=True))]


@pytest.mark.parametrize("change", [
    PeerChange(A, allowed_ips=("not an address/32",)), PeerChange(A, underlay="host:5"), PeerChange(A, underlay="192.0.2.1:http"),
])  # fmt: skip
def test_a_request_the_kernel_could_not_read_is_refused_before(change: PeerChange) -> None:
    with pytest.raises(Bug) as refused:
        peer_request(change)
    assert refused.value.code == "device.refused"


class Attributes(dict[str, Any]):
    def get_attr(self, name: str) -> Any:
        return self.get(name)


def test_answers_of_the_kernel() -> None:
    key, state = parse_peer(Attributes(
        WGPEER_A_PUBLIC_KEY=b64encode(unb64(A)), WGPEER_A_ENDPOINT={"addr": "2001:db8::1", "port": 7},
        WGPEER_A_LAST_HANDSHAKE_TIME={"tv_sec": 9}, WGPEER_A_ALLOWEDIPS=[{"addr": "100.64.0.1/32"}],
        WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL=25, WGPEER_A_RX_BYTES=1, WGPEER_A_TX_BYTES=2,
    ))  # fmt: skip
    assert key == A
    assert state == PeerState("[2001:db8::1]:7", frozenset({"100.64.0.1/32"}), 25, CHACHA, 9, 1, 2)
    key, state = parse_peer(Attributes(WGPEER_A_PUBLIC_KEY=b64encode(unb64(B)), WGPEER_A_ENDPOINT={"addr": "192.0.2.1", "port": 7}))
    assert (key, state) == (B, PeerState("192.0.2.1:7"))
    joined = kernel_module._joined(PeerState(None, frozenset({"a"})), PeerState(None, frozenset({"b"})))
    assert joined.allowed_ips == {"a", "b"}


@pytest.mark.parametrize(("number", "kind"), [(1, NoPrivilege), (19, NotFound), (98, Conflict), (22, Bug)])
def test_errors_of_the_kernel(number: int, kind: type[Exception]) -> None:
    assert type(kernel_module._failed("do it", OSError(number, "x"))) is kind
