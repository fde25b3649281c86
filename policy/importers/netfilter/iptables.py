"""`iptables-save` and `ip6tables-save`: the filter table. The family of a file is IPv6 where it says so by name or address."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from identity.errors import BadInput
from policy import nets
from policy.importers.model import Files, Imported, SourceRefused, Untranslated
from policy.importers.netfilter.chains import EVERYWHERE, Chain, Hook, Interface, Match, Step, translate
from policy.ports import ALL_PORTS, ANYTHING, PORTED, PortMap, mask, proto_number, whole
from policy.program import Where

HOOKS: Final[Mapping[str, Hook]] = {"INPUT": "input", "OUTPUT": "output", "FORWARD": "forward"}
VERDICTS: Final = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}
# Targets that only look at or mark a packet and let it go on.
PASSING: Final = frozenset(
    {"LOG", "NFLOG", "ULOG", "MARK", "CONNMARK", "TRACE", "AUDIT", "SET", "CLASSIFY", "TCPMSS", "CT"}
)
_V6_NAME: Final = re.compile(r"v6|ip6")
_V6: Final = re.compile(r"ip6tables|(?<!\S)-[sd] [0-9a-fA-F]*:[0-9a-fA-F:]*(/|\s)|icmp6|ipv6-icmp")


def import_iptables(files: Files) -> Imported:
    """Raises SourceRefused for text that `iptables-restore` would not take."""
    chains: list[Chain] = []
    tables: dict[str, dict[str, Chain]] = {}
    untranslated: list[Untranslated] = []
    count = 0
    for file, text in files.items():
        v6 = _V6_NAME.search(file.rpartition("/")[2]) or _V6.search(text)
        family = nets.V6_ALL if v6 else nets.V4_ALL
        reader = _Reader(file, family, f"{file}: " if len(files) > 1 else "", untranslated)
        reader.read(text)
        count += reader.count
        for chain in reader.chains.values():
            chains.append(chain)
            tables[chain.name] = reader.chains
    if not any(c.hook for c in chains):
        raise SourceRefused("table", "there is no filter table in these files", where=", ".join(files))
    return translate("iptables", chains, tables, count, untranslated)


class _Reader:
    def __init__(self, file: str, family: nets.Range, prefix: str, untranslated: list[Untranslated]) -> None:
        self.file, self.span, self.prefix, self.untranslated = file, (family,), prefix, untranslated
        self.chains: dict[str, Chain] = {}
        self.count = 0

    def read(self, text: str) -> None:
        table = ""
        for number, raw in enumerate(text.splitlines(), 1):
            line = raw.strip()
            where = Where(self.file, number, 1)
            if line.startswith("*"):
                table = line[1:]
            elif table == "filter" and line.startswith(":"):
                self.chain(line, where)
            elif table == "filter" and line.startswith(("-A", "[")):
                self.rule(re.sub(r"^\[[0-9:]+\]\s*", "", line), where)
            elif line.startswith("-A") and table not in {"filter", ""}:
                self.untranslated.append(
                    Untranslated(
                        str(where), f"table {table} is not judged: only the filter table is imported"
                    )
                )
            elif line and not line.startswith(("#", "COMMIT", ":")):
                raise SourceRefused("line", f'not a line of iptables-save: "{line[:60]}"', where=where)

    def chain(self, line: str, where: Where) -> None:
        name, _, policy = line[1:].partition(" ")
        word = policy.partition(" ")[0]
        if name in HOOKS and word not in {"ACCEPT", "DROP"}:
            raise SourceRefused("policy", f'the policy of {name} is "{word}"', where=where)
        chain = Chain(f"{self.prefix}{name}", span=self.span)
        if name in HOOKS:
            chain.hook, chain.policy = HOOKS[name], "accept" if word == "ACCEPT" else "drop"
        self.chains[name] = chain

    def rule(self, line: str, where: Where) -> None:
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise SourceRefused("line", str(error), where=where) from None
        if len(words) < 2 or words[1] not in self.chains:
            raise SourceRefused(
                "chain", f'there is no chain "{words[1] if len(words) > 1 else ""}"', where=where
            )
        self.count += 1
        rule = _Rule(where, self.span)
        try:
            rule.parse(words[2:])
        except BadInput as error:
            raise SourceRefused("rule", error.message, where=where) from None
        verdict = VERDICTS.get(rule.target)
        if rule.target in PASSING or not rule.target:
            return
        if verdict is None and rule.target not in self.chains:
            raise SourceRefused("target", f'unknown target or chain "{rule.target}"', where=where)
        step = Step(rule.match, "goto" if rule.goes_to else "jump", rule.target, where, rule.comment)
        if verdict is not None:
            step = replace(step, verdict=verdict, target="")  # type: ignore[arg-type]  # a value of VERDICTS
        self.chains[words[1]].steps.append(step)


class _Rule:
    """One rule's options, in the order of their words."""

    def __init__(self, where: Where, span: tuple[nets.Range, ...]) -> None:
        self.where, self.span = where, span
        self.match = Match()
        self.target = self.comment = ""
        self.goes_to = False
        self.protocol: int | None = None
        self.not_protocol = False
        self.dports = ALL_PORTS

    def parse(self, words: list[str]) -> None:
        options = list(_options(words))
        for but, option, values in options:
            self.option(but, option, values)
        if self.protocol is not None:
            ports = PortMap({self.protocol: self.dports}) if self.protocol in PORTED else whole(self.protocol)
            self.narrow(Match(ports=ANYTHING - ports if self.not_protocol else ports))
        elif self.dports != ALL_PORTS:
            raise SourceRefused("rule", "ports need a protocol that has some", where=self.where)

    def narrow(self, match: Match) -> None:
        self.match = self.match & match

    def partial(self, what: str) -> None:
        self.narrow(Match(partial=(what,)))

    def option(self, but: bool, option: str, values: list[str]) -> None:
        value = values[0] if values else ""
        match option:
            case "-s" | "--source" | "--src-range":
                self.narrow(Match(src=self.spans(value, but)))
            case "-d" | "--destination" | "--dst-range":
                self.narrow(Match(dst=self.spans(value, but)))
            case "-i" | "--in-interface" | "-o" | "--out-interface":
                face = (Interface(frozenset({value}), but),)
                self.narrow(Match(came=face) if option in {"-i", "--in-interface"} else Match(goes=face))
                if value == "lo" and not but:
                    self.narrow(Match(never=True))  # the host to itself
            case "-p" | "--protocol":
                self.protocol = (
                    None if value == "all" else proto_number("icmp" if value == "ipv6-icmp" else value)
                )
                self.not_protocol = but
            case "--dport" | "--dports" | "--destination-port" | "--destination-ports":
                bits = _ports(value)
                self.dports = ALL_PORTS & ~bits if but else bits
            case "--ctstate" | "--state":
                self.narrow(Match(never=("NEW" in value.split(",")) is but))
            case "--syn":
                self.narrow(Match(never=but))
            case "--comment":
                self.comment = value
            case "-j" | "--jump" | "-g" | "--goto":
                self.target, self.goes_to = value, option in {"-g", "--goto"}
            case "-m" | "--match" | "--reject-with" | "--log-prefix" | "--log-level" | "--log-uid" | "-c":
                pass
            case _ if self.target in PASSING:
                pass
            case _:
                self.partial(f"{'! ' if but else ''}{option} {' '.join(values)}".strip())

    def spans(self, text: str, but: bool) -> tuple[nets.Range, ...]:
        found = nets.merge(r for part in text.split(",") for r in nets.parse_range(part))
        return nets.subtract(EVERYWHERE, found) if but else found


def _options(words: list[str]) -> Iterator[tuple[bool, str, list[str]]]:
    """(negated, option, values); ``!`` may stand before the option or, as older versions wrote it, before the value."""
    at, but = 0, False
    while at < len(words):
        if words[at] == "!":
            but, at = True, at + 1
            continue
        option, values = words[at], []
        at += 1
        while at < len(words) and not words[at].startswith("-") and words[at] != "!":
            values.append(words[at])
            at += 1
        if at + 1 < len(words) and words[at] == "!" and not words[at + 1].startswith("-"):
            but, values, at = True, [words[at + 1]], at + 2
        yield but, option, values
        but = False


def _ports(text: str) -> int:
    bits = 0
    for part in text.split(","):
        first, colon, last = part.partition(":")
        if not (first.isdigit() or (colon and not first)) or (last and not last.isdigit()):
            raise BadInput("port.form", f"not a port or range: {ascii(part)[:40]}")
        bits |= mask(max(1, int(first or 1)), int(last or 65535) if colon else int(first))
    return bits
