"""pytest in the guest, on its kernel, beside whatever the host does with the guest meanwhile."""

from __future__ import annotations

import sys
import threading
from xml.etree import ElementTree as ET

from tests.kernel.machine import Machine

REPORT = "/run/report.xml"
TESTS = ("tests/netns/test_dataplane_devices.py", "tests/kernel/inside")
PLUGINS = ("pytest_asyncio.plugin", "pytest_timeout", "_hypothesis_pytestplugin")
SPACE = "within"


class Within:
    """The run; it starts at once in a network namespace of its own, with one of the guest's two processors."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.run("ip", "netns", "add", SPACE)
        machine.run("ip", "-n", SPACE, "link", "set", "lo", "up")
        argv = ["ip", "netns", "exec", SPACE, sys.executable, "-u", "-m", "pytest", "-v", "--timeout=280", f"--junit-xml={REPORT}",
                "-k", "kernel or choice", "--durations=8"]  # fmt: skip
        argv += [word for plugin in PLUGINS for word in ("-p", plugin)] + [*TESTS]
        # Only the plugins in use: emulated start-up is slow.
        env = {"RETINUE_KERNEL_INSIDE": "1", "RETINUE_KERNEL_IMAGE": "guest", "CI": "true", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "RETINUE_LAB_PATIENCE": "12"}
        self._command = machine.start(*argv, env=env)
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._command.wait()
        except (OSError, ValueError) as e:
            self._failed = e

    def outcomes(self) -> dict[str, str]:
        """Wait for the end: module and test -> ``passed``, ``skipped``, ``failure`` or ``error``."""
        self._thread.join()
        said = "".join(f"guest: {line}\n" for line in self._command.lines) + self._command.err
        print(f"\n{said}")
        assert self._failed is None, f"the guest went away: {self._failed}\n{said}"
        assert self._command.rc in {0, 1}, f"pytest in the guest ended with {self._command.rc}"
        found = {}
        for case in ET.fromstring(self.machine.run("cat", REPORT)).iter("testcase"):
            bad = [child.tag for child in case if child.tag in {"skipped", "failure", "error"}]
            found[f"{case.attrib['classname'].rpartition('.')[2]}:{case.attrib['name']}"] = bad[0] if bad else "passed"
        assert found
        assert self._command.rc == 0 or set(found.values()) & {"failure", "error"}
        return found

    def close(self) -> None:
        """Where nobody waited for the end: a closed connection kills the run."""
        self._command.hang_up()
        self._thread.join(10)
