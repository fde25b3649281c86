"""Certified labels: a small closed set of key=value facts that the CA attaches to a workload."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from identity.errors import BadInput

# Our choices; values are those people put into other systems' labels.
KEY = re.compile(r"[a-z][a-z0-9_.-]{0,62}")
VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_./:-]{0,61}[A-Za-z0-9])?")
MAX_LABELS = 32

Labels = Mapping[str, str]


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A checked, key-sorted copy. Raises BadInput."""
    if len(labels) > MAX_LABELS:
        raise BadInput("label.many", f"{len(labels)} labels; at most {MAX_LABELS}")
    for key, value in labels.items():
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise BadInput("label.key", f"not a label key: {ascii(key)[:80]}")
        if not isinstance(value, str) or not VALUE.fullmatch(value):
            raise BadInput("label.value", f"not a label value for {key}: {ascii(value)[:80]}")
    return dict(sorted(labels.items()))


def parse_labels(pairs: Iterable[str]) -> dict[str, str]:
    """Labels from ``key=value`` words of a command line. Raises BadInput, also for a key given twice."""
    out: dict[str, str] = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq:
            raise BadInput("label.form", f"not key=value: {ascii(pair)[:80]}", hint="write labels as role=web")
        if key in out:
            raise BadInput("label.twice", f"label {key} is given twice")
        out[key] = value
    return check_labels(out)
