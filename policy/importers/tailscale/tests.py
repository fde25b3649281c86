"""In-file tests of a Tailscale policy: assertions that the vendor checks before it accepts the file.

A test is asked of the translated program. Who a word stands for is taken twice: as a device that has just this identity,
and as the devices of the tailnet that have it; an `accept` holds when the first or all of the second are allowed, a
`deny` when none is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from identity.errors import BadInput
from policy import nets
from policy.evaluate import permitted
from policy.importers.model import SourceRefused
from policy.importers.tailscale.aliases import MEMBER, Aliases
from policy.importers.tailscale.devices import TAILNET, YES, user_labels
from policy.importers.tailscale.ports import protocol, split_destination
from policy.ports import MAX_PORT, PORTED, TCP, UDP
from policy.program import Program, Subject

_PORT: Final = re.compile(r"[0-9]{1,5}")
FIELDS: Final = frozenset({"src", "accept", "deny", "proto", "srcpostureattrs", "user", "allow"})


class _Fails(Exception):
    """Why a test does not hold."""


def run_tests(tests: Sequence[Any], program: Program, aliases: Aliases) -> list[str]:
    """Why each test fails; an empty text for one that passes."""
    out = []
    for test in tests:
        try:
            _run(test, program, aliases)
            out.append("")
        except _Fails as failure:
            out.append(str(failure))
    return out


def _run(test: Any, program: Program, aliases: Aliases) -> None:
    fields = {k.lower(): v for k, v in test.items()} if isinstance(test, dict) else {}
    if not fields or set(fields) - FIELDS:
        raise _Fails("a test is a map with src, accept, deny and proto")
    word = fields.get("src") or fields.get("user")
    accept, deny = fields.get("accept") or fields.get("allow") or [], fields.get("deny") or []
    if not isinstance(word, str) or not word:
        raise _Fails("src is missing")
    if not isinstance(accept, list) or not isinstance(deny, list) or not accept + deny:
        raise _Fails("accept and deny are both missing")
    protocols: tuple[int, ...] = (TCP, UDP)
    if fields.get("proto") not in (None, ""):
        protocols = (_guarded(protocol, str(fields["proto"]), "proto"),)
    ask = _Asker(program, aliases, word, protocols)
    for wanted, words in ((True, accept), (False, deny)):
        for text in words:
            if not isinstance(text, str):
                raise _Fails("a destination must be a string")
            if ask.allowed(text, every=wanted) is not wanted:
                raise _Fails(
                    f"{word} -> {text}: want {'accept' if wanted else 'deny'}, got {'deny' if wanted else 'accept'}"
                )


def _guarded(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except SourceRefused as error:
        raise _Fails(error.message) from None


class _Asker:
    def __init__(self, program: Program, aliases: Aliases, word: str, protocols: tuple[int, ...]) -> None:
        self.program, self.aliases, self.word, self.protocols = program, aliases, word, protocols
        self.subjects = {s.name: s for s in (d.subject for d in aliases.tailnet.devices)}
        self.made, self.real = self.principals(word)

    def allowed(self, text: str, *, every: bool) -> bool:
        host, ports = _guarded(split_destination, text, text)
        if not _PORT.fullmatch(ports) or not 1 <= int(ports) <= MAX_PORT:
            raise _Fails(f'"{text}": a test names one port, 1 to {MAX_PORT}')
        port = int(ports)
        if host == "autogroup:self":
            if not (self.made or self.real) or any("user" not in s.labels for s in (*self.made, *self.real)):
                raise _Fails(f'"{text}" needs a user as src')
            made, real = self.made, self.real
        else:
            made, real = self.principals(host)
        by_identity = [self.one(s, d, port) for s in self.made for d in made if self.alike(s, d, host)]
        by_device = [
            self.one(s, d, port)
            for s in self.real or self.made
            for d in real or made
            if self.alike(s, d, host)
        ]
        if every:
            return any(bool(x) and all(x) for x in (by_identity, by_device))
        return any(by_identity) or any(by_device)

    def alike(self, src: Subject, dst: Subject, host: str) -> bool:
        return host != "autogroup:self" or src.labels.get("user") == dst.labels.get("user")

    def one(self, src: Subject, dst: Subject, port: int) -> bool:
        ports = permitted(self.program, src, dst)
        return any(ports.allows(p, port if p in PORTED else None) for p in self.protocols)

    def principals(self, word: str) -> tuple[list[Subject], list[Subject]]:
        """A word as made-up devices and as real ones. Only specific entities: no wildcard, no range."""
        if word in MEMBER | {"autogroup:tagged"}:
            label = "user" if word in MEMBER else "tagged"
            return [], [s for s in self.subjects.values() if label in s.labels]
        if word.startswith("group:") and word in self.aliases.groups:
            members = _guarded(self.aliases.members, word)
            pairs = [self.user(m) for m in members]
            return [s for made, _ in pairs for s in made], [s for _, real in pairs for s in real]
        if word.startswith("tag:") and word in self.aliases.tags:
            return [Subject(word, {word: YES, "tagged": YES})], [
                s for s in self.subjects.values() if word in s.labels
            ]
        if word in self.aliases.hosts:
            return self.address(str(self.aliases.hosts[word]), word)
        if "@" in word and not word.startswith(("user:", "group:")):
            return self.user(word)
        return self.address(word, word)

    def user(self, user: str) -> tuple[list[Subject], list[Subject]]:
        return [Subject(user, user_labels(user))], [
            s for s in self.subjects.values() if s.labels.get("user") == user
        ]

    def address(self, text: str, word: str) -> tuple[list[Subject], list[Subject]]:
        if text in self.aliases.hosts or "/" in text or text == "*" or "-" in text:
            raise _Fails(f'"{word}" is not one specific entity')
        try:
            at = nets.address(text)
        except BadInput:
            raise _Fails(f'"{word}": no such user, group, tag, host or address') from None
        labels = {} if nets.covers(nets.ranges_of(TAILNET), ((at, at),)) else {"via": "", "route": "subnet"}
        return [Subject(text, labels, nets=(text,))], [
            self.subjects[n] for n in sorted(self.aliases.tailnet.at(((at, at),)))
        ]


def failures(outcomes: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The outcomes as rows of a report."""
    for index, why in enumerate(outcomes):
        yield {"index": index, "pass": not why, **({"why": why} if why else {})}
