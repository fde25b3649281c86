"""A policy file's bytes as text: both programs read them alike, for a digest covers every character."""

from __future__ import annotations

from identity.errors import BadInput


def decode(data: bytes, name: str) -> str:
    """UTF-8, a byte order mark dropped, line ends as in Unix. Raises BadInput ``file.encoding`` with the position."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise BadInput("file.encoding", f"{name}:{line}:{column}: not UTF-8 text", hint="save it as UTF-8") from None
