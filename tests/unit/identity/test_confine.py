"""Giving up files and system calls: the real kernel, in child processes; the tables against the kernel's headers."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from identity import confine
from identity.confine import Bounds

PRELUDE = """
import ctypes, os, sys
from pathlib import Path
from identity.confine import Bounds, code_places, enter
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    if libc.syscall(*(ctypes.c_long(w) for w in words)) == -1:
        raise OSError(ctypes.get_errno(), 'refused')
inside = Path(sys.argv[1])
if sys.argv[3] == 'confined':
    entered = enter(Bounds(read=code_places(), write=(inside,)))
try:
    exec(sys.argv[2])
except OSError as e:
    print('refused', e.errno)
else:
    print('done')
"""


def attempt(tmp_path: Path, code: str, *, confined: bool) -> str:
    inside = tmp_path / "inside"
    inside.mkdir(exist_ok=True)
    (tmp_path / "outside").write_text("secret")
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE, str(inside), code, "confined" if confined else "free"], capture_output=True, text=True,
        check=True, cwd=Path(confine.__file__).parent.parent,
    )  # fmt: skip
    return done.stdout.strip()


def landlock() -> bool:
    import ctypes

    return int(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)) >= 1


OUTSIDE = {
    "read": "(inside.parent / 'outside').read_text()",
    "write": "(inside.parent / 'new').write_text('x')",
    "truncate": "os.truncate(inside.parent / 'outside', 0)",
    "remove": "os.unlink(inside.parent / 'outside')",
    "list": "os.listdir(inside.parent)",
    "escape-by-link": "(inside / 'link').unlink(missing_ok=True); os.symlink(inside.parent / 'outside', inside / 'link'); (inside / 'link').read_text()",
}


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_are_out_of_reach(tmp_path: Path, name: str) -> None:
    assert attempt(tmp_path, OUTSIDE[name], confined=True) == "refused 13"
    assert attempt(tmp_path, OUTSIDE[name], confined=False) == "done"


@pytest.mark.parametrize(
    "code",
    [
        "(inside / 'a').write_text('x'); os.rename(inside / 'a', inside / 'b'); os.truncate(inside / 'b', 0); os.unlink(inside / 'b')",
        "open('/dev/null', 'w').write('x'); os.urandom(8); open('/proc/self/status').read()",
        "import sqlite3; sqlite3.connect(inside / 'db').execute('create table t (x)')",
        "import socket; s = socket.socket(socket.AF_UNIX); s.bind(str(inside / 's')); s.listen()",
        "import subprocess; subprocess.run(['true'], check=True)",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "import cryptography.hazmat.primitives.asymmetric.ec as ec; ec.generate_private_key(ec.SECP256R1())",
    ],
)
def test_what_a_daemon_does_still_works(tmp_path: Path, code: str) -> None:
    assert attempt(tmp_path, code, confined=True).splitlines()[-1] == "done"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86-64's")
@pytest.mark.parametrize(
    "number", [101, 310, 175, 321, 298, 323, 425, 165, 161, 227, 250], ids=lambda n: f"syscall-{n}"
)
def test_denied_calls_are_refused_with_eperm(tmp_path: Path, number: int) -> None:
    assert attempt(tmp_path, f"call({number}, 0, 0, 0, 0, 0, 0)", confined=True) == "refused 1"


def test_threads_made_later_are_confined_too(tmp_path: Path) -> None:
    code = (
        "import threading; found = []\n"
        "def work():\n"
        "    try: (inside.parent / 'new').write_text('x')\n"
        "    except OSError as e: found.append(e.errno)\n"
        "t = threading.Thread(target=work); t.start(); t.join()\n"
        "print(found)"
    )
    assert attempt(tmp_path, code, confined=True).splitlines()[0] == ("[13]" if landlock() else "[]")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_tables_are_the_kernels(machine: str) -> None:
    """x86-64 against its header, 64-bit ARM against the generic one it uses."""
    header = {"x86_64": "asm/unistd.h", "aarch64": "asm-generic/unistd.h"}[machine]
    if machine == "x86_64" and os.uname().machine != "x86_64":
        pytest.skip("the header of this machine is another one")
    out = subprocess.run(
        ["cc", "-E", "-dM", "-D__BITS_PER_LONG=64", "-include", header, "-x", "c", "/dev/null"], capture_output=True, text=True, check=True
    ).stdout
    table = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR_(\w+) (\d+)", out)}
    assert {name: table.get(name) for name in confine._DENIED[machine]} == confine._DENIED[machine]


def test_the_filter_checks_the_calling_convention_first() -> None:
    steps = list(struct.iter_unpack("HBBI", confine.filter_program("x86_64", [101])))
    assert steps[0] == (0x20, 0, 0, 4)
    assert steps[1][3] == 0xC000003E
    assert steps[2] == (0x06, 0, 0, 0x80000000)
    assert steps[-1] == (0x06, 0, 0, 0x7FFF0000)
    assert (0x15, 0, 1, 101) in steps


def test_without_bounds_on_files_only_calls_are_filtered(tmp_path: Path) -> None:
    code = "print(enter(Bounds(read=None)).landlock); (inside.parent / 'new').write_text('x')"
    assert attempt(tmp_path, code, confined=False).splitlines() == ["0", "done"]


def test_bounds_are_values() -> None:
    assert Bounds(None) == Bounds(None, ())
    assert all(p.exists() for p in confine.code_places())
