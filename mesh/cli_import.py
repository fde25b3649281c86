"""`retinue policy import`: read a foreign configuration, write policy.yaml, inventory.yaml and report.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from identity.errors import BadInput, NotFound

MAX_FILE: Final = 64 * 1024 * 1024  # bytes
# What a folder may hold for each kind; a kind that is not here is one file.
FOLDERS: Final = {
    "tailscale": (".hujson", ".json"),
    "kubernetes": (".yaml", ".yml", ".json"),
    "aws": (".json",),
    "iptables": ("",),
    "cisco-ios": ("",),
}


def import_policy(kind: str, path: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Import PATH into the directory `out` and return the report. Raises RetinueError; then nothing is written."""
    from policy.imported import dump_imported
    from policy.importers import run
    from policy.importers.report import report
    from policy.inventory import dump_inventory

    imported = run(kind, read_source(kind, Path(path)))
    summary = report(imported)
    texts = {
        "policy.yaml": dump_imported(imported.policy),
        "inventory.yaml": dump_inventory(imported.inventory),
        "report.json": json.dumps(summary, indent=2, ensure_ascii=True) + "\n",
    }
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            part = folder / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)
    except OSError as error:
        raise BadInput("import.write", f"cannot write to {folder}: {error.strerror}") from None
    return summary


def read_source(kind: str, path: Path) -> dict[str, str]:
    """Relative name -> text of what PATH holds for this kind, in name order. Raises NotFound, BadInput."""
    if not path.exists():
        raise NotFound("import.path", f"there is no {path}")
    if path.is_dir():
        if kind not in FOLDERS:
            raise BadInput("import.path", f"{path} is a folder; {kind} wants one file")
        found = {str(p.relative_to(path)): _text(p) for p in _walk(path, FOLDERS[kind])}
        if not found:
            raise NotFound("import.path", f"{path} holds no file that ends in {', '.join(FOLDERS[kind])}")
        return found
    return {path.name: _text(path)}


def _walk(path: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            if name.endswith(endings):
                yield Path(folder) / name


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE:
            raise BadInput("import.large", f"{path} is larger than {MAX_FILE} bytes")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput("import.encoding", f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise BadInput("import.read", f"cannot read {path}: {error.strerror}") from None
