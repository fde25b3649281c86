"""One contract for every device: the engine, wireguard-go, the kernel where it has WireGuard, and the fake."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from identity.errors import NotFound, RetinueError, Unreachable
from identity.keys import b64, x25519_public
from mesh.devices import Device, DeviceConfig, PeerChange, PeerState, choose, peer_changes
from mesh.devices.fake import FakeDevice
from mesh.devices.kernel import KernelDevice, probe
from mesh.devices.userspace import UserspaceDevice
from mesh.plan import AES, PeerPlan
from tests.netns.plane_rig import engine

pytestmark = pytest.mark.netns

KINDS = ("engine", "wireguard-go", "kernel", "fake")


@pytest.fixture
def config(tmp_path: Path) -> DeviceConfig:
    key = X25519PrivateKey.generate()
    return DeviceConfig(f"dv{os.getpid() % 100000}", 1420, 0, key.private_bytes_raw, tmp_path, engine())


@pytest.fixture(params=KINDS)
async def device(request: pytest.FixtureRequest, config: DeviceConfig) -> AsyncIterator[Device]:
    kind = request.param
    made: Device
    if kind == "kernel":
        if why := await probe():
            pytest.skip(why)  # not a privilege: this kernel is built without it
        made = KernelDevice(config)
    elif kind == "fake":
        made = FakeDevice(config)
    else:
        program = engine() if kind == "engine" else Path(shutil.which("wireguard-go") or "/nonexistent")
        made = UserspaceDevice(replace(config, engine=program))
    await made.start()
    yield made
    await made.stop(clean=True)


def key() -> str:
    return b64(x25519_public(X25519PrivateKey.generate()))


def plan(k: str, *allowed: str, underlay: str | None = "127.0.0.1:9", keepalive: int = 0) -> PeerPlan:
    return PeerPlan("e", k, underlay, allowed, keepalive, "chacha20poly1305", "")


async def peers(device: Device) -> dict[str, PeerState]:
    return dict((await device.read()).peers)


async def test_peers_come_change_and_go(device: Device, config: DeviceConfig) -> None:
    a, b = key(), key()
    want = {a: plan(a, "100.64.0.1/32", "fd00::1/128", keepalive=25), b: plan(b, underlay="[::1]:9")}
    await device.apply(peer_changes({}, want))
    have = await peers(device)
    assert have.keys() == {a, b}
    assert have[a].allowed_ips == {"100.64.0.1/32", "fd00::1/128"}
    assert (have[a].underlay, have[a].keepalive, have[b].underlay) == ("127.0.0.1:9", 25, "[::1]:9")
    assert have[b].allowed_ips == frozenset()
    assert peer_changes(have, want) == ()
    want = {b: plan(b, "100.64.0.1/32", underlay="[::1]:9")}
    await device.apply(peer_changes(have, want))
    have = await peers(device)
    assert have.keys() == {b}
    assert have[b].allowed_ips == {"100.64.0.1/32"}
    await device.apply(peer_changes(have, {}))
    assert await peers(device) == {}


async def test_an_address_belongs_to_one_peer_and_moves_in_one_step(device: Device) -> None:
    a, b = key(), key()
    await device.apply(peer_changes({}, {a: plan(a, "100.64.0.1/32", "100.64.0.2/32"), b: plan(b)}))
    changes = peer_changes(await peers(device), {a: plan(a, "100.64.0.2/32"), b: plan(b, "100.64.0.1/32")})
    assert [c.tunnel_key for c in changes] == [b]  # giving it to b takes it from a
    await device.apply(changes)
    have = await peers(device)
    assert (have[a].allowed_ips, have[b].allowed_ips) == ({"100.64.0.2/32"}, {"100.64.0.1/32"})


async def test_a_change_for_a_peer_that_is_not_there_makes_none(device: Device) -> None:
    await device.apply([PeerChange(key(), keepalive=5), PeerChange(key(), remove=True)])
    assert await peers(device) == {}


async def test_it_carries_its_own_key_and_no_secret_in_what_it_tells(device: Device, config: DeviceConfig) -> None:
    if isinstance(device, FakeDevice):
        return
    state = await device.read()
    own = X25519PrivateKey.from_private_bytes(config.private_key())
    assert state.public_key == b64(x25519_public(own))
    assert config.private_key().hex() not in repr(state)
    assert state.fwmark == config.fwmark


async def test_many_peers_in_one_change(device: Device) -> None:
    want = {}
    for n in range(300):
        k = key()
        want[k] = plan(k, f"100.64.{n // 250}.{n % 250 + 1}/32")
    await device.apply(peer_changes({}, want))
    have = await peers(device)
    assert {k: p.allowed_ips for k, p in have.items()} == {k: frozenset(p.allowed_ips) for k, p in want.items()}


async def test_the_engine_survives_its_agent_and_is_taken_over(config: DeviceConfig) -> None:
    first = UserspaceDevice(config)
    assert await first.start() is False
    k = key()
    await first.apply(peer_changes({}, {k: plan(k, "100.64.0.1/32")}))
    await first.stop(clean=False)
    second = UserspaceDevice(config)
    assert await second.start() is True
    assert second.running == first.running
    assert (await peers(second)).keys() == {k}
    assert second.describe() == first.describe()
    await second.stop(clean=True)
    with pytest.raises(Unreachable):
        await second.read()
    assert not list(config.run_dir.glob("*.json")) + list(config.run_dir.glob("*.sock"))


async def test_the_end_of_the_engine_is_noticed_at_once(config: DeviceConfig) -> None:
    ended = asyncio.Event()
    device = UserspaceDevice(config, on_exit=ended.set)
    await device.start()
    assert device.running is not None
    os.kill(device.running.pid, signal.SIGKILL)
    await asyncio.wait_for(ended.wait(), 5)
    assert await device.start() is False  # a new one, although the pid file names the old
    await device.stop(clean=True)


async def test_only_our_engine_is_asked_for_the_other_cipher(config: DeviceConfig) -> None:
    k = key()
    for program, cipher in ((engine(), AES), (Path(shutil.which("wireguard-go") or "/nonexistent"), "chacha20poly1305")):
        device = UserspaceDevice(replace(config, engine=program))
        await device.start()
        ours = device.version is not None
        assert ours == (program.name == "retinue-engine")
        await device.apply([PeerChange(k, create=True, cipher=AES)])
        assert (await peers(device))[k].cipher == (cipher if ours else "chacha20poly1305")
        await device.stop(clean=True)


@pytest.mark.parametrize(("program", "error"), [("/nonexistent/engine", NotFound), ("/bin/false", RetinueError)])
async def test_an_engine_that_does_not_start_says_why(config: DeviceConfig, program: str, error: type[RetinueError]) -> None:
    device = UserspaceDevice(replace(config, engine=Path(program)))
    with pytest.raises(error) as refused:
        await device.start()
    assert refused.value.code in {"device.no_engine", "device.engine_exited"}
    assert program in refused.value.message


async def test_a_bad_change_changes_nothing(config: DeviceConfig) -> None:
    device = UserspaceDevice(config)
    await device.start()
    k = key()
    await device.apply(peer_changes({}, {k: plan(k, "100.64.0.1/32")}))
    before = await peers(device)
    with pytest.raises(RetinueError) as refused:
        await device.apply([PeerChange(k, allowed_ips=("not an address/32",))])
    assert refused.value.code == "device.refused"
    if device.version is not None:  # wireguard-go stops half-way; ours does all or nothing
        assert await peers(device) == before
    await device.stop(clean=True)


async def test_the_choice_is_automatic_and_says_why(config: DeviceConfig) -> None:
    why = await probe()
    device, reason = await choose("auto", config)
    assert device.kind == ("userspace" if why else "kernel")
    assert reason == (why or "the kernel has WireGuard")
    assert (await choose("kernel", config))[0].kind == "kernel"
    assert (await choose("userspace", config))[1] == "asked for"
