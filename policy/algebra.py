"""Reasoning about selectors: does one imply another, and who would a selector select? Sound, not complete."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from policy.evaluate import matches
from policy.foreign import trust_domains
from policy.nets import covers, ranges_of
from policy.program import (
    AllOf,
    AnyOf,
    Everything,
    Exists,
    In,
    Named,
    Nets,
    Not,
    Nothing,
    Selector,
    Subject,
    Under,
)  # fmt: skip

_TRIES = 64  # combinations of `any` tried for a witness


def implies(one: Selector, other: Selector) -> bool:
    """True only when every inside or foreign subject that `one` selects is selected by `other` too."""
    if one == other or isinstance(one, Nothing):
        return True
    if isinstance(other, Everything) and not trust_domains(one):
        return True
    if isinstance(one, AnyOf):
        return all(implies(term, other) for term in one.terms)
    if isinstance(other, AllOf):
        return all(implies(one, term) for term in other.terms)
    if isinstance(other, AnyOf) and any(implies(one, term) for term in other.terms):
        return True
    if isinstance(one, AllOf):
        return any(implies(term, other) for term in one.terms)
    if isinstance(one, In):
        return (
            (isinstance(other, Exists) and one.key == other.key)
            or (isinstance(other, In) and one.key == other.key and one.values <= other.values)
            or (
                isinstance(other, Not)
                and isinstance(other.term, In)
                and one.key == other.term.key
                and not one.values & other.term.values
            )
        )
    if isinstance(one, Named):
        return isinstance(other, Named | Under) and all(matches(other, Subject(name)) for name in one.names)
    if isinstance(one, Under):
        return isinstance(other, Under) and (one.prefix + "/").startswith(other.prefix + "/")
    if isinstance(one, Not) and isinstance(other, Not):
        return implies(other.term, one.term)
    if isinstance(one, Nets) and isinstance(other, Nets):
        return covers(ranges_of(other.cidrs, other.excluding), ranges_of(one.cidrs, one.excluding))
    return False


def witness(selector: Selector, name: str, taken: Iterable[str] = ()) -> Subject | None:
    """A made-up inside subject that a selector selects and that carries nothing else; None when none was found."""
    return next(witnesses(selector, name, taken), None)


def witnesses(selector: Selector, name: str, taken: Iterable[str] = ()) -> Iterator[Subject]:
    """Such subjects, one for each choice the selector leaves, as far as they were found. They share the name unless
    the selector asks for one.
    """
    used = frozenset(taken)
    for wanted in itertools.islice(_wants(selector), _TRIES):
        one = Subject(wanted.get("", name), {key: value for key, value in wanted.items() if key})
        if one.name not in used and matches(selector, one):
            yield one


def _wants(selector: Selector) -> Iterator[Mapping[str, str]]:
    """Label assignments (key "" is the name) that may satisfy a selector."""
    if isinstance(selector, In):
        yield from ({selector.key: value} for value in sorted(selector.values))
    elif isinstance(selector, Exists):
        yield {selector.key: "any"}
    elif isinstance(selector, Named):
        yield from ({"": name} for name in sorted(selector.names))
    elif isinstance(selector, Under):
        yield {"": f"{selector.prefix}/any"}
    elif isinstance(selector, AnyOf):
        for term in selector.terms:
            yield from _wants(term)
    elif isinstance(selector, AllOf):
        each = [list(itertools.islice(_wants(term), _TRIES)) for term in selector.terms]
        for parts in itertools.product(*each):
            merged: dict[str, str] = {}
            for part in parts:
                merged.update(part)
            yield merged
    elif isinstance(selector, Everything | Not):
        yield {}
