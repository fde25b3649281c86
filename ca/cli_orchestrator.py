"""`retinue-ca orchestrator send`: what a scheduler would say, from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ca.cli import DEFAULT_DIR, Dir, Format, Json, client, output_of
from identity import cliout
from identity.cliout import Output
from identity.errors import BadInput

MAX_FILE = 16 * 1024 * 1024  # bytes

app = typer.Typer(help="The hook of schedulers: where instances of workloads run.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def root() -> None:
    """The hook of schedulers: where instances of workloads run."""


@app.command(epilog="Example: retinue-ca orchestrator send events.jsonl")
def send(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Events: one JSON object, an array, or one a line; - is standard input.")],
    directory: Dir = DEFAULT_DIR, output: Format = Output.TABLE, as_json: Json = False,
) -> None:  # fmt: skip
    """Tell the CA events, in order; the first one that is refused ends it, and the rest can be sent again with it.

    docs/ORCHESTRATOR.md has the fields. An event that was answered before is answered the same again.
    """
    from identity.wire import parse
    from identity.wire.orchestrator import Event, EventAnswer

    events = [parse(Event, json.dumps(one)) for one in _objects(_text(file))]
    ca = client(directory)
    done = [ca.post("/v1/orchestrator/events", one, EventAnswer, timeout=2 * one.wait + 150) for one in events]
    cliout.emit(
        done, output_of(output, as_json), columns=("id", "outcome", "workload", "instance", "number", "host", "epoch"),
        rows=[(a.id, a.outcome, a.workload, a.instance, a.number, a.host, a.epoch) for a in done],
    )  # fmt: skip


def _text(file: Path) -> str:
    try:
        data = sys.stdin.buffer.read(MAX_FILE + 1) if str(file) == "-" else _read(file)
        if len(data) > MAX_FILE:
            raise BadInput("event.file", f"more than {MAX_FILE} bytes of events")
        return data.decode()
    except OSError as e:
        raise BadInput("event.file", f"cannot read {file}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput("event.file", f"{file} is not UTF-8 text") from None


def _objects(text: str) -> list[object]:
    """The events of a file. Raises BadInput ``event.file``."""
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except (ValueError, RecursionError):
        pass
    out: list[object] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                out.append(json.loads(line))
            except (ValueError, RecursionError):
                raise BadInput("event.file", f"line {number} is not JSON", hint="one object a line, or one array") from None
    return out


def _read(file: Path) -> bytes:
    with file.open("rb") as f:
        return f.read(MAX_FILE + 1)
