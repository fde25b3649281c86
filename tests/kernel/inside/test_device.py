"""What only a real kernel can say about mesh/devices/kernel.py; the contract for all devices is in tests/netns."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from identity.errors import Bug, Conflict, NotFound
from identity.keys import b64, x25519_public
from mesh.devices import DeviceConfig, PeerChange, choose, peer_changes
from mesh.devices.kernel import KernelDevice, probe
from mesh.devices.userspace import UserspaceDevice
from mesh.plan import PeerPlan
from tests.netns.plane_rig import engine

pytestmark = pytest.mark.netns


def key() -> str:
    return b64(x25519_public(X25519PrivateKey.generate()))


def wg(*argv: str) -> str:
    """The kernel's state as its own tool reads it."""
    return subprocess.run(["wg", *argv], check=True, capture_output=True, text=True).stdout.strip()


def ip(*argv: str) -> str:
    return subprocess.run(["ip", *argv], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def config(tmp_path: Path) -> DeviceConfig:
    private = X25519PrivateKey.generate()
    return DeviceConfig(f"kd{os.getpid() % 100000}", 1420, 51822, private.private_bytes_raw, tmp_path)


@pytest.fixture
async def device(config: DeviceConfig) -> AsyncIterator[KernelDevice]:
    made = KernelDevice(config)
    assert await made.start() is False
    yield made
    await made.stop(clean=True)
    assert config.interface not in ip("-br", "link")


async def test_the_kernel_is_found_and_chosen_and_the_probe_leaves_nothing(config: DeviceConfig) -> None:
    before = ip("-br", "link")
    assert await probe() == ""
    assert ip("-br", "link") == before
    device, why = await choose("auto", config)
    assert (device.kind, why) == ("kernel", "the kernel has WireGuard")


async def test_the_kernels_own_tool_agrees(device: KernelDevice, config: DeviceConfig) -> None:
    a, b = key(), key()
    await device.apply([
        PeerChange(a, create=True, underlay="192.0.2.1:7", allowed_ips=("100.64.0.1/32", "fd00::1/128"), keepalive=25),
        PeerChange(b, create=True, underlay="[2001:db8::1]:9"),
    ])  # fmt: skip
    assert wg("show", config.interface, "listen-port") == "51822"
    assert int(wg("show", config.interface, "fwmark"), 16) == config.fwmark
    shown = dict(line.split("\t", 1) for line in wg("show", config.interface, "endpoints").splitlines())
    assert sorted(shown.values()) == ["192.0.2.1:7", "[2001:db8::1]:9"]
    assert wg("show", config.interface, "public-key") != "(none)"
    assert "100.64.0.1/32 fd00::1/128" in wg("show", config.interface, "allowed-ips")


async def test_it_outlives_its_agent_and_is_taken_over_with_its_peers(device: KernelDevice, config: DeviceConfig) -> None:
    k = key()
    await device.apply([PeerChange(k, create=True, underlay="192.0.2.1:7", allowed_ips=("100.64.0.1/32",))])
    index, before = socket.if_nametoindex(config.interface), await device.read()
    await device.stop(clean=False)
    second = KernelDevice(config)
    assert await second.start() is True
    assert socket.if_nametoindex(config.interface) == index
    assert await second.read() == before


async def test_a_link_of_another_kind_is_not_taken_for_it(config: DeviceConfig) -> None:
    """What an engine that was killed leaves, or somebody's own device: said by name and not touched."""
    ip("link", "add", config.interface, "type", "veth", "peer", "name", "kdpeer")
    try:
        with pytest.raises(Conflict) as refused:
            await KernelDevice(config).start()
        assert refused.value.code == "device.taken"
        assert config.interface in refused.value.message
        await KernelDevice(config).stop(clean=True)
        assert f"{config.interface}@" in ip("-br", "link")
    finally:
        ip("link", "del", config.interface)


async def test_a_taken_port_is_said(device: KernelDevice, config: DeviceConfig) -> None:
    ip("link", "set", config.interface, "up")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("0.0.0.0", 51833))
        with pytest.raises(Conflict) as refused:
            await KernelDevice(replace(config, listen_port=51833)).start()
    assert refused.value.code == "device.port_taken"


async def test_a_peer_with_very_many_addresses(device: KernelDevice) -> None:
    """More than one netlink attribute can hold (64 KiB), and more than one answer message."""
    a, b = key(), key()
    addresses = ["100.64.0.1/32", *(f"fd00::{n:x}/128" for n in range(1, 1750))]
    await device.apply([PeerChange(a, create=True, allowed_ips=tuple(addresses), keepalive=7), PeerChange(b, create=True)])
    have = (await device.read()).peers
    assert have[a].allowed_ips == frozenset(addresses)
    assert have[a].keepalive == 7
    want = {a: PeerPlan("e", a, None, (addresses[0],), 7, "chacha20poly1305", ""),
            b: PeerPlan("e", b, None, tuple(addresses[1:]), 0, "chacha20poly1305", "")}  # fmt: skip
    await device.apply(peer_changes(have, want))
    have = (await device.read()).peers
    assert {k: have[k].allowed_ips for k in (a, b)} == {k: frozenset(want[k].allowed_ips) for k in (a, b)}
    await device.apply([PeerChange(b, allowed_ips=tuple(addresses[1:1200]), replace=True)])
    assert (await device.read()).peers[b].allowed_ips == frozenset(addresses[1:1200])


async def test_a_bad_change_is_refused_before_anything_is_done(device: KernelDevice) -> None:
    k = key()
    await device.apply([PeerChange(k, create=True, allowed_ips=("100.64.0.1/32",))])
    before = await device.read()
    with pytest.raises(Bug) as refused:
        await device.apply([PeerChange(k, remove=True), PeerChange(k, create=True, allowed_ips=("not an address/32",))])
    assert refused.value.code == "device.refused"
    assert await device.read() == before


async def test_a_device_that_is_gone_is_said(config: DeviceConfig) -> None:
    device = KernelDevice(config)
    await device.start()
    await device.stop(clean=True)
    for call in (device.read, lambda: device.apply([PeerChange(key(), create=True)])):
        with pytest.raises(NotFound) as refused:
            await call()
        assert refused.value.code == "device.gone"
    await device.stop(clean=True)  # nothing to remove is no error


async def test_an_engine_that_runs_is_kept_and_found_when_it_has_to_go(config: DeviceConfig) -> None:
    """On a kernel with WireGuard too: who asked for userspace must not lose the engine to the automatic choice."""
    first = UserspaceDevice(replace(config, engine=engine()))
    await first.start()
    await first.stop(clean=False)
    with pytest.raises(Conflict):
        await KernelDevice(config).start()
    device, why = await choose("auto", config)
    assert (device.kind, why) == ("userspace", "an engine is running already")
    await device.stop(clean=True)
    assert config.interface not in ip("-br", "link")
    assert (await choose("auto", config))[0].kind == "kernel"
