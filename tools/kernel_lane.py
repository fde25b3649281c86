"""Run tests/kernel against the distribution's kernel, booted under software emulation.

Debian's kernel package is downloaded and unpacked, never installed; the guest's root is this machine's file system,
read-only, under a layer in the guest's memory. Everything made here is in out/kernel.

Usage: python tools/kernel_lane.py [pytest arguments]
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "out/kernel"
INIT = ROOT / "tests/kernel/init.sh"
META = "linux-image-amd64"  # depends on the current kernel of the distribution
QEMU = ("qemu-system-x86_64", "qemu-system-x86")
APT = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", "-o", "APT::Sandbox::User=root"]
# What the guest may load by itself; what these depend on comes along. Directories count without subdirectories.
MODULES = (
    "arch/x86/crypto", "crypto", "lib", "lib/crypto",
    "drivers/virtio", "drivers/net/wireguard", "drivers/net/virtio_net.ko", "drivers/net/tun.ko", "drivers/net/veth.ko",
    "fs/9p", "fs/overlayfs", "net/9p",
    "net/netfilter", "net/ipv4", "net/ipv6", "net/ipv4/netfilter", "net/ipv6/netfilter",
    "net/bridge", "net/unix", "net/packet", "net/netlink",
)  # fmt: skip


class Missing(Exception):
    """What the lane needs and cannot have: code, message, hint."""


def say(text: str) -> None:
    print(f"\033[2m{text}\033[0m", file=sys.stderr, flush=True)


def run(*argv: str, cwd: Path | None = None) -> str:
    """Output of a command. Raises CalledProcessError."""
    return subprocess.run(argv, cwd=cwd, check=True, capture_output=True, text=True).stdout


def words_of(e: subprocess.CalledProcessError) -> str:
    lines = (e.stderr or e.stdout or "").strip().splitlines()
    return lines[-1][:200] if lines else f"exit status {e.returncode}"


def with_update(*argv: str, cwd: Path | None = None) -> str:
    """An apt command; once more with fresh package lists where it fails. Raises CalledProcessError."""
    try:
        return run(*argv, cwd=cwd)
    except subprocess.CalledProcessError:
        run(*APT, "update")
        return run(*argv, cwd=cwd)


def emulator() -> None:
    """Make sure there is qemu. Raises Missing."""
    program, package = QEMU
    if shutil.which(program):
        return
    hint = f"apt-get install --no-install-recommends {package}"
    if not shutil.which("apt-get"):
        raise Missing("kernel.qemu", f"{program} is not on the PATH", "install it with your distribution's package manager")
    if os.geteuid() != 0:
        raise Missing("kernel.qemu", f"{program} is not on the PATH", f"run as root, or: {hint}")
    say(f"installing system package: {package}")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    try:
        with_update(*APT, "install", "-y", "--no-install-recommends", package)
    except subprocess.CalledProcessError as e:
        raise Missing("kernel.qemu", f"apt-get could not install {package}: {words_of(e)}", hint) from None


def kernel_package() -> str:
    """Name of the distribution's current kernel package. Raises CalledProcessError, Missing."""
    for attempt in range(2):
        if attempt:
            run(*APT, "update")
        # Without package lists it knows no package and fails.
        known = subprocess.run(["apt-cache", "depends", META], check=False, capture_output=True, text=True).stdout
        found = re.search(r"Depends: (linux-image-\S+-amd64)$", known, re.MULTILINE)
        if found:
            return found[1]
    raise Missing("kernel.package", f"no package source here has {META}", "the lane needs Debian's package sources")


def packages() -> tuple[Path, Path]:
    """The kernel and busybox as .deb files, downloaded where they are not there yet. Raises Missing."""
    debs = CACHE / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []
    for pattern in ("linux-image-*_amd64.deb", "busybox-static_*_amd64.deb"):
        there = sorted(debs.glob(pattern), key=lambda p: p.stat().st_mtime)
        if not there:
            if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
                raise Missing("kernel.package", "apt-get and dpkg-deb are needed to fetch Debian's kernel", f"or put {pattern} into {debs}")
            try:
                name = kernel_package() if pattern.startswith("linux") else "busybox-static"
                say(f"downloading {name}")
                with_update(*APT, "download", name, cwd=debs)
            except subprocess.CalledProcessError as e:
                raise Missing("kernel.package", f"apt-get could not fetch {pattern}: {words_of(e)}", f"or put {pattern} into {debs}") from None
            there = sorted(debs.glob(pattern))
        found.append(there[-1])
    return found[0], found[1]


# ---- the image


def wanted(tree: Path) -> list[Path]:
    """MODULES and what they depend on, as files of an unpacked ``lib/modules/VERSION/kernel``."""
    by_name = {p.stem.replace("-", "_"): p for p in tree.rglob("*.ko")}
    chosen: dict[str, Path] = {}

    def choose(name: str) -> None:
        path = by_name.get(name)
        if path is None or name in chosen:
            return
        chosen[name] = path
        depends = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in depends[1].decode().split(",") if depends and depends[1] else ():
            choose(other.replace("-", "_"))

    for entry in MODULES:
        at = tree / entry
        for path in [at] if at.suffix == ".ko" else sorted(at.glob("*.ko")):
            choose(path.stem.replace("-", "_"))
    return list(chosen.values())


def archive(tree: Path) -> bytes:
    """A directory in the kernel's format for an initial root: cpio, variant ``newc``, all of it root's."""
    out = bytearray()
    entries = [(p.relative_to(tree).as_posix(), p) for p in sorted(tree.rglob("*"))]
    for number, (name, path) in enumerate([*entries, ("TRAILER!!!", None)], 1):
        mode, data = 0, b""
        if path is not None:
            mode = path.lstat().st_mode
            data = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def image() -> Path:
    """Directory with ``vmlinuz`` and ``initrd``, made anew when a package or a source of it changed. Raises Missing."""
    kernel, busybox = packages()
    key = hashlib.sha256(b"".join([kernel.name.encode(), busybox.name.encode(), INIT.read_bytes(), Path(__file__).read_bytes()]))
    made = CACHE / "image"
    stamp = made / "stamp"
    if stamp.exists() and stamp.read_text() == key.hexdigest():
        return made
    say(f"unpacking {kernel.name}")
    shutil.rmtree(made, ignore_errors=True)
    unpacked, tree = made / "unpacked", made / "initrd.d"
    for directory in (unpacked, tree):
        directory.mkdir(parents=True)
    try:
        for deb in (kernel, busybox):
            run("dpkg-deb", "-x", str(deb), str(unpacked))
    except subprocess.CalledProcessError as e:
        raise Missing("kernel.package", f"dpkg-deb cannot unpack it: {words_of(e)}", f"remove {CACHE / 'debs'} and run again") from None
    (vmlinuz,) = (unpacked / "boot").glob("vmlinuz-*")
    version = vmlinuz.name.removeprefix("vmlinuz-")
    modules = unpacked / "lib/modules" / version
    for path in [*wanted(modules / "kernel"), *modules.glob("modules.builtin*"), modules / "modules.order"]:
        target = tree / path.relative_to(unpacked)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for directory in ("bin", "sbin", "proc", "sys", "dev", "lower", "upper", "root"):
        (tree / directory).mkdir()
    shutil.copy(unpacked / "bin/busybox", tree / "bin/busybox")
    (tree / "sbin/modprobe").symlink_to("/bin/busybox")
    shutil.copy(INIT, tree / "init")
    (tree / "init").chmod(0o755)
    run(str(tree / "bin/busybox"), "depmod", "-b", str(tree), version)
    (made / "initrd").write_bytes(archive(tree))
    shutil.copy(vmlinuz, made / "vmlinuz")
    for directory in (unpacked, tree):
        shutil.rmtree(directory)
    stamp.write_text(key.hexdigest())
    return made


def main() -> int:
    try:
        if os.geteuid() != 0:
            raise Missing("kernel.privilege", "the lane makes a network namespace and a tap device", "run as root")
        emulator()
        made = image()
    except Missing as e:
        code, message, hint = e.args
        print(f"error[{code}]: {message}\nhint: {hint}", file=sys.stderr)
        return 4 if code == "kernel.privilege" else 1
    env = {**os.environ, "RETINUE_KERNEL_IMAGE": str(made), "CI": "true"}
    return subprocess.run([sys.executable, "-m", "pytest", "tests/kernel", *sys.argv[1:]], cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
