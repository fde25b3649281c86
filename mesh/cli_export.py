"""`retinue policy export` and `retinue policy draft`: what they read and write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from identity.errors import BadInput, NotFound

if TYPE_CHECKING:
    from policy.draft import Draft, State
    from policy.flows import FlowRecord
    from policy.program import Program, Subject

MAX_FLOWS: Final = 1024 * 1024 * 1024  # bytes
MAX_DECISIONS: Final = 16 * 1024 * 1024


def export_policy(
    kind: str, program: Program, subjects: Sequence[Subject], inside: Sequence[str], out: Path
) -> dict[str, Any]:
    """Export into the folder `out` and return the report. Raises RetinueError; then nothing is written."""
    from policy.exporters import export

    found = export(kind, program, subjects, inside)
    summary = {
        "target": kind, "files": sorted(found.files), "rules": found.rules, "workloads": len(found.names),
        "pairs_compared": found.pairs, "names": dict(found.names), "notes": found.notes,
        "untranslated": found.untranslated,
    }  # fmt: skip
    write_files(out, {**found.files, "report.json": json.dumps(summary, indent=2) + "\n"})
    return summary


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder, each at once or not at all. Raises BadInput."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            part = folder / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)
    except OSError as error:
        raise BadInput("file.write", f"cannot write to {folder}: {error.strerror}") from None


def read_flow_files(paths: Sequence[Path]) -> list[FlowRecord]:
    """The records of files of JSON lines. Raises NotFound, BadInput with file and line."""
    from policy.flows import read_flows

    return [record for path in paths for record in read_flows(str(path), _lines(path, MAX_FLOWS))]


def _lines(path: Path, limit: int) -> Iterator[str]:
    try:
        if path.stat().st_size > limit:
            raise BadInput("file.large", f"{path} is larger than {limit} bytes")
        with path.open(encoding="utf-8-sig") as lines:
            yield from lines
    except FileNotFoundError:
        raise NotFound("file.missing", f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise BadInput("file.encoding", f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise BadInput("file.read", f"cannot read {path}: {error.strerror}") from None


def read_decisions(path: Path | None) -> dict[str, State]:
    """Earlier decisions, proposal id -> accepted or rejected; none where there is no file yet. Raises BadInput."""
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads("".join(_lines(path, MAX_DECISIONS)))
    except (ValueError, RecursionError):
        raise BadInput("draft.decisions", f"{path} is not JSON") from None
    if not isinstance(found, dict) or any(v not in ("accepted", "rejected") for v in found.values()):
        raise BadInput("draft.decisions", f"{path} is not a map of proposal ids to accepted or rejected")
    return found


def draft_policy(
    flows: Sequence[Path], subjects: Sequence[Subject], by: Sequence[str], similarity: float,
    accept: Sequence[str], reject: Sequence[str], decisions: Path | None, out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Draft, write the policy to `out` and the decisions to their file; the report, with the text. Raises RetinueError."""
    from policy.draft import draft
    from policy.draft_text import draft_text

    decided = read_decisions(decisions)
    found = draft(
        read_flow_files(flows), subjects, by=by, similarity=similarity, accept=accept, reject=reject, decided=decided
    )  # fmt: skip
    text = draft_text(found)
    if out is not None:
        write_files(out.parent, {out.name: text})
    if decisions is not None and (accept or reject):
        decided |= {**dict.fromkeys(accept, "accepted"), **dict.fromkeys(reject, "rejected")}
        write_files(
            decisions.parent, {decisions.name: json.dumps(dict(sorted(decided.items())), indent=2) + "\n"}
        )
    return {**_report(found), "policy": text, "out": None if out is None else os.fspath(out)}


def _report(found: Draft) -> dict[str, Any]:
    return {
        "records": found.span.count, "observed": found.observed, "permitted": found.permitted,
        "over_permission": round(found.over_permission, 6), "denied_then_permitted_now": found.widened,
        "left_out": dict(found.left_out), "unknown_ends": list(found.strangers), "stale_decisions": list(found.stale),
        "proposals": [
            {"id": p.id, "kind": p.kind, "state": p.state, "ends": list(p.ends), "evidence": dict(p.evidence)}
            for p in found.proposals
        ],
    }  # fmt: skip
