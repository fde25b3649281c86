"""`retinue demo`: the product's main job on real packets, in a lab of namespaces, told as a story or as JSON events.

With `--json` each line is one object with `event` (and `ok` where something is claimed); the last is the summary.
Exit status: 0 when every claim held, 1 when one did not, 4 when the machine cannot run it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from identity.errors import NoPrivilege, RetinueError

SUMMARY = ("ok", "duration_s", "denied_ms", "move", "revoke_cut_ms", "marker_on_underlay", "marker_in_control", "leftovers")
TRUST_DOMAIN = "demo.example"


class Teller(Protocol):
    """Who is told the events as they happen."""

    def tell(self, event: str, data: dict[str, Any]) -> None: ...


class JsonLines:
    """One JSON object a line."""

    def tell(self, event: str, data: dict[str, Any]) -> None:
        print(json.dumps({"event": event, **data}), flush=True)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing the demo needs of the machine."""

    name: str
    ok: bool
    hint: str


def preflight() -> list[Check]:
    """What the demo needs: root, a TUN device, the tools. Looks, and changes nothing."""
    root, sudo = os.geteuid() == 0, "run it with sudo: sudo retinue demo"
    tun = os.path.exists("/dev/net/tun")
    checks = [
        Check("root", root, sudo),
        Check("/dev/net/tun", tun and os.access("/dev/net/tun", os.R_OK | os.W_OK),
              sudo if tun and not root else "load it with modprobe tun; in a container, pass --device /dev/net/tun"),
    ]  # fmt: skip
    for tool, package in (("nft", "nftables"), ("ip", "iproute2"), ("nsenter", "util-linux")):
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        checks.append(Check(tool, shutil.which(tool, path=path) is not None, f"install it: apt-get install {package}"))
    if root:
        hint = "needs CAP_SYS_ADMIN and CAP_NET_ADMIN (a container: --privileged)"
        checks.append(Check("CAP_NET_ADMIN", _may_change_links(), hint))
        checks.append(Check("network namespaces", _may_unshare(), hint))
    return checks


def _may_change_links() -> bool:
    """CAP_NET_ADMIN (capabilities(7), number 12) among the effective ones."""
    with open("/proc/self/status") as status:
        held = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(held.split()[1], 16) >> 12 & 1)


def _may_unshare() -> bool:
    """Can this process make a network namespace? Tried in a child, which ends at once."""
    import ctypes

    from mesh.lab_process import CLONE_NEWNET

    libc = ctypes.CDLL(None)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if libc.unshare(CLONE_NEWNET) == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class Demo:
    """One run: events go to a teller, claims are counted, the lab is removed, the summary comes last."""

    def __init__(self, teller: Teller, *, keep: bool = False, pace: float = 0.0) -> None:
        self.teller, self.keep, self.pace = teller, keep, pace
        self.failed: list[str] = []

    async def emit(self, event: str, **data: Any) -> None:
        """Tell one event; `ok=False` fails the run."""
        if data.get("ok") is False:
            self.failed.append(event)
        self.teller.tell(event, data)
        if self.pace:
            await asyncio.sleep(self.pace)

    async def run(self) -> dict[str, Any]:
        """Play it and return the summary. Never leaves anything behind unless `keep`."""
        from mesh import lab_registry
        from mesh.demo_acts import HOSTS, Acts
        from mesh.lab import Lab

        begin = time.monotonic()
        swept = await asyncio.to_thread(Lab.sweep)
        before = (lab_registry.tables(), lab_registry.links())
        await self.emit("swept", labs=swept)
        lab = Lab(HOSTS, trust_domain=TRUST_DOMAIN, keep=self.keep)
        acts: Acts | None = None
        left: list[str] = []
        try:
            await asyncio.to_thread(lab.start)
            await self.emit("lab", id=lab.id, hosts=list(HOSTS), dir=str(lab.dir), ms=round((time.monotonic() - begin) * 1000, 1))
            acts = Acts(lab, self.emit)
            await acts.play()
        except RetinueError as e:
            await self.emit("failed", ok=False, error=e.as_dict())
        except Exception as e:
            if os.environ.get("RETINUE_DEBUG"):
                raise
            await self.emit("failed", ok=False, error={"code": "bug", "message": f"{type(e).__name__}: this is a defect in Retinue"})
        finally:
            left = await asyncio.to_thread(lab.stop)
        left += [f"table {t}" for t in lab_registry.tables() - before[0] if "retinue" in t]
        left += [f"link {n}" for n in lab_registry.links() - before[1] if n.startswith(("rtn", "rt"))]
        figures = acts.figures if acts is not None else {}
        ok = not self.failed and (self.keep or not left)
        values: dict[str, Any] = {
            **{name: figures.get(name) for name in SUMMARY}, "ok": ok,
            "duration_s": round(time.monotonic() - begin, 2), "leftovers": len(left),
        }  # fmt: skip
        if self.keep:
            self.teller.tell("kept", {"id": lab.id, "dir": str(lab.dir), "left": left})
        elif left:
            self.teller.tell("leftovers", {"ok": False, "left": left})
        if self.failed:
            self.teller.tell("not_held", {"claims": self.failed})
        self.teller.tell("summary", values)
        return values


def parser() -> argparse.ArgumentParser:
    """The options of `retinue demo`."""
    made = argparse.ArgumentParser(prog="retinue demo", description="Show the product's main job on real packets, in a lab of network namespaces (root).")
    made.add_argument("--json", action="store_true", help="one JSON object a line; the last is the summary")
    made.add_argument("--keep", action="store_true", help="leave the lab up afterwards, to look around")
    made.add_argument("--pace", type=float, default=0.0, metavar="SECONDS", help="pause after each step, to read along")
    made.add_argument("--clean", action="store_true", help="remove labs that were left up, and stop")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """`retinue demo`. Returns the exit status; raises RetinueError for what the machine lacks."""
    args = parser().parse_args(argv)
    missing = [c for c in preflight() if not c.ok]
    if missing:
        raise NoPrivilege(
            "demo.preflight", "the demo cannot run here: " + ", ".join(c.name for c in missing) + " missing",
            hint="; ".join(dict.fromkeys(c.hint for c in missing)),
        )  # fmt: skip
    if args.clean:
        from mesh.lab import Lab

        gone = Lab.sweep(kept=True)
        JsonLines().tell("swept", {"labs": gone}) if args.json else print(f"removed: {' '.join(gone)}" if gone else "nothing was left")
        return 0
    teller: Teller
    if args.json:
        teller = JsonLines()
    else:
        from mesh.story import Story

        teller = Story()
    try:
        summary = asyncio.run(_run(Demo(teller, keep=args.keep, pace=max(0.0, args.pace))))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    return 0 if summary["ok"] else 1


async def _run(demo: Demo) -> dict[str, Any]:
    """The run as a task that SIGTERM cancels, so that the lab is removed then too."""
    task = asyncio.ensure_future(demo.run())
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


if __name__ == "__main__":
    sys.exit(main())
