from __future__ import annotations

from pathlib import Path

import pytest

from mesh.devices import DeviceConfig
from mesh.devices import kernel as kernel_device
from mesh.devices.fake import FakeDevice
from mesh.devices.kernel import KernelDevice
from mesh.devices.offers import broken, fast_aes, offers
from mesh.devices.userspace import UserspaceDevice

AES, CHACHA = "aes-256-gcm", "chacha20poly1305"


@pytest.fixture
def config(tmp_path: Path) -> DeviceConfig:
    return DeviceConfig("rtn9", 1420, 51820, lambda: bytes(32), tmp_path, None)


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("processor: 0\nflags\t\t: fpu aes avx2 vaes\n", True),
        ("flags : aes avx2\n", False),
        ("flags : vaesx aes\n", False),
        ("Features : aes pmull\n", False),
        ("", False),
    ],
)
def test_only_vector_aes_counts(text: str, fast: bool) -> None:
    assert fast_aes(text) is fast


@pytest.mark.parametrize(("why_no_kernel", "fast", "want"), [
    ("the kernel has no WireGuard", True, [AES, CHACHA]),
    ("the kernel has no WireGuard", False, [CHACHA]),
    ("", True, [CHACHA]),
])  # fmt: skip
async def test_aes_is_promised_only_by_our_engine_on_a_fast_cpu(
    monkeypatch: pytest.MonkeyPatch, why_no_kernel: str, fast: bool, want: list[str]
) -> None:
    async def probe() -> str:
        return why_no_kernel

    monkeypatch.setattr(kernel_device, "probe", probe)
    monkeypatch.setattr("mesh.devices.offers.fast_aes", lambda _: fast)
    assert await offers() == want


def test_a_promise_the_device_cannot_keep_is_taken_back(config: DeviceConfig) -> None:
    foreign = UserspaceDevice(config)
    ours = UserspaceDevice(config)
    ours.version = "1"
    assert broken([AES, CHACHA], foreign) == [CHACHA]
    assert broken([AES, CHACHA], KernelDevice(config)) == [CHACHA]
    assert broken([AES, CHACHA], ours) is None
    assert broken([CHACHA], foreign) is None
    assert broken([AES, CHACHA], FakeDevice(config)) is None
