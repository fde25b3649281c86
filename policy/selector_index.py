"""Finding what a selector could concern without looking at everything: selectors by their labels, subjects by theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from policy.evaluate import matches
from policy.program import AllOf, AnyOf, In, Nothing, Selector, Subject


def _labels(selector: Selector) -> list[In]:
    """Label terms that all have to hold."""
    terms = selector.terms if isinstance(selector, AllOf) else (selector,)
    return [term for term in terms if isinstance(term, In)]


class SelectorIndex:
    """Which of these selectors could be implied by another one (policy.algebra.implies): a superset, in order."""

    def __init__(self, selectors: Sequence[Selector]) -> None:
        self._all = range(len(selectors))
        self._open: list[int] = []  # those that ask for no label
        self._by_label: dict[tuple[str, str], list[int]] = defaultdict(list)
        common: dict[tuple[str, str], int] = defaultdict(int)
        for selector in selectors:
            for label in ((term.key, value) for term in _labels(selector) for value in term.values):
                common[label] += 1
        for number, selector in enumerate(selectors):
            terms = _labels(selector)
            if not terms:
                self._open.append(number)
                continue
            rarest = min(terms, key=lambda term: sum(common[term.key, value] for value in term.values))
            for value in rarest.values:
                self._by_label[rarest.key, value].append(number)

    def implied_by(self, selector: Selector) -> Iterable[int]:
        """Places of all that it can imply."""
        terms = selector.terms if isinstance(selector, AllOf) else (selector,)
        if any(isinstance(term, AllOf | AnyOf | Nothing) for term in terms):
            return self._all
        # A label term is implied only by one of the same key with no other values.
        found = set(self._open)
        for term in _labels(selector):
            found.update(self._by_label.get((term.key, next(iter(term.values), "")), ()))
        return sorted(found)


class SubjectIndex:
    """Does a selector select one of these subjects?"""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self._subjects = subjects
        self._by_label: dict[tuple[str, str], list[Subject]] = defaultdict(list)
        self._known: dict[Selector, bool] = {}
        for one in subjects:
            for label in one.labels.items():
                self._by_label[label].append(one)

    def any(self, selector: Selector) -> bool:
        """The same as asking `matches` of each."""
        if selector not in self._known:
            self._known[selector] = any(matches(selector, one) for one in self._candidates(selector))
        return self._known[selector]

    def _candidates(self, selector: Selector) -> Sequence[Subject]:
        lists = [
            [one for value in term.values for one in self._by_label.get((term.key, value), ())] for term in _labels(selector)
        ]
        return min(lists, key=len) if lists else self._subjects
