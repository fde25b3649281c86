"""Checks on the shape of the tree: file sizes, leftovers, executable bits and what a file may mention.

Usage: python tools/check_tree.py        exit 1 and one line a finding
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = {".py", ".rs", ".sh"}
LONGEST = 900  # lines of a hand-written file
FORBIDDEN = {
    "a leftover": re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|\btodo!\(|\bunimplemented!\("),
    "a bare type: ignore": re.compile(r"#\s*type:\s*ignore(?!\[)"),
    "a bare noqa": re.compile(r"#\s*noqa(?!:)"),
    "an ignored test": re.compile(r"#\[ignore\]"),
}
DRAWERS = {"utils", "util", "common", "helpers", "misc"}


def tracked() -> list[Path]:
    """Files git knows or would add."""
    out = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    ).stdout.decode()
    return [ROOT / name for name in out.split("\0") if name and (ROOT / name).is_file()]


def findings() -> list[str]:
    """Every violation as ``path:line: what``."""
    out = []
    for path in tracked():
        name = path.relative_to(ROOT)
        if path.suffix not in CODE or path == Path(__file__).resolve():
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > LONGEST:
            out.append(f"{name}:{len(lines)}: longer than {LONGEST} lines; split it by idea")
        if DRAWERS & {part.removesuffix(path.suffix) for part in name.parts}:
            out.append(f"{name}:1: a drawer for everything; name it after what it does")
        for number, line in enumerate(lines, 1):
            out += [f"{name}:{number}: {what}" for what, pattern in FORBIDDEN.items() if pattern.search(line)]
    return out


if __name__ == "__main__":
    found = findings()
    print("\n".join(found) or f"tree: {len(tracked())} files, nothing to say")
    sys.exit(bool(found))
