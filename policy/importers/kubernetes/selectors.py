"""Label selectors of Kubernetes as selectors over our subjects' labels.

A workload's labels are its pods' own; those of its namespace carry the prefix ``ns:``, which no Kubernetes key can have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from policy.importers.model import SourceRefused
from policy.program import AllOf, AnyOf, Everything, Exists, In, Nets, Not, Selector

NAMESPACE: Final = "ns:"
NAMESPACE_NAME: Final = "kubernetes.io/metadata.name"  # the label that every namespace has
OUTSIDE: Final = Nets(("0.0.0.0/0", "::/0"))
ANYBODY: Final = AnyOf((Everything(), OUTSIDE))
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_PREFIX: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
OPERATORS: Final = ("In", "NotIn", "Exists", "DoesNotExist")


def check_key(key: Any, where: str) -> str:
    """A label key as the API server accepts it. Raises SourceRefused."""
    prefix, slash, name = str(key).rpartition("/")
    good = isinstance(key, str) and _NAME.fullmatch(name)
    if not good or (slash and (len(prefix) > 253 or not _PREFIX.fullmatch(prefix))):
        raise SourceRefused("label", f'invalid label key "{key}"', where=where)
    return str(key)


def check_value(value: Any, where: str) -> str:
    """A label value as the API server accepts it. Raises SourceRefused."""
    if not isinstance(value, str) or (value and not _NAME.fullmatch(value)):
        raise SourceRefused("label", f'invalid label value "{value}": up to 63 letters, digits, - _ .', where=where,
                            hint="" if isinstance(value, str) else "put it in quotes")  # fmt: skip
    return value


def labels(value: Any, where: str, prefix: str = "") -> dict[str, str]:
    """Checked labels of an object; a missing map has none. Raises SourceRefused."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SourceRefused("label", "labels must be a map", where=where)
    return {
        prefix + check_key(k, where): check_value(v if v is not None else "", where) for k, v in value.items()
    }


def selector(value: Any, where: str, prefix: str = "") -> list[Selector]:
    """A label selector as terms that must all hold; an empty or missing one has none. Raises SourceRefused."""
    if value is None:
        return []
    known = fields_of(value, where)
    terms: list[Selector] = [
        In(k, frozenset({v})) for k, v in labels(known.get("matchLabels"), where, prefix).items()
    ]
    expressions = known.get("matchExpressions") or []
    if not isinstance(expressions, list):
        raise SourceRefused("selector", "matchExpressions must be a list", where=where)
    return [*terms, *(_expression(e, where, prefix) for e in expressions)]


def _expression(value: Any, where: str, prefix: str) -> Selector:
    fields = fields_of(value, where)
    key = prefix + check_key(fields.get("key"), where)
    operator, values = fields.get("operator"), fields.get("values") or []
    if operator not in OPERATORS:
        raise SourceRefused(
            "selector", f'invalid operator "{operator}"', where=where, hint=f"one of {', '.join(OPERATORS)}"
        )
    if not isinstance(values, list) or bool(values) is not (operator in {"In", "NotIn"}):
        need = "needs" if operator in {"In", "NotIn"} else "takes no"
        raise SourceRefused(
            "selector", f'the operator {operator} {need} values (key "{fields.get("key")}")', where=where
        )
    if operator in {"Exists", "DoesNotExist"}:
        return Exists(key) if operator == "Exists" else Not(Exists(key))
    term = In(key, frozenset(check_value(v, where) for v in values))
    return term if operator == "In" else Not(term)


def workloads(*terms: Selector) -> Selector:
    """Workloads for which all terms hold. Without a term that asks for a label it says Everything, which no outside is."""
    flat = tuple(dict.fromkeys(terms))
    if not any(isinstance(t, In | Exists) for t in flat):
        flat = (Everything(), *flat)
    return flat[0] if len(flat) == 1 else AllOf(flat)


def in_namespace(name: str) -> Selector:
    return In(NAMESPACE + NAMESPACE_NAME, frozenset({name}))


def any_of(terms: list[Selector]) -> Selector:
    """The union, flat, without repetition and with plain networks in one term; `terms` is not empty."""
    flat: dict[Selector, None] = {}
    cidrs: dict[str, None] = {}
    for term in terms:
        for one in term.terms if isinstance(term, AnyOf) else (term,):
            if isinstance(one, Nets) and not one.excluding:
                cidrs.update(dict.fromkeys(one.cidrs))
            else:
                flat[one] = None
    if cidrs:
        flat[Nets(tuple(cidrs))] = None
    return next(iter(flat)) if len(flat) == 1 else AnyOf(tuple(flat))


def fields_of(value: Any, where: str) -> Mapping[str, Any]:
    """A map; a missing one is empty. Raises SourceRefused."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SourceRefused("type", "a map is wanted", where=where)
    return value


def given(value: Mapping[str, Any], *keys: str) -> Iterator[str]:
    """Which of the keys are written (an empty map counts, a null does not)."""
    return (k for k in keys if value.get(k) is not None)
