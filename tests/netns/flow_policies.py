"""Random policies in the language people write: labels, groups, services, segments, guardrails, grants, scopes, drafts."""

from __future__ import annotations

import random
from typing import Final

from policy.language import digest
from policy.windows import show_instant

NOW: Final = 1_900_000_000  # when the policies are compiled; 2030-03-17
NAMES: Final = ("shop/web", "shop/api", "shop/db", "lab/web", "lab/job", "ops", "edge/proxy", "edge/cache")
VALUES: Final = {"role": ("web", "api", "db", "job"), "env": ("prod", "dev"), "zone": ("n", "s")}
OTHER: Final = (2, 4, 41, 47, 50, 89, 99, 103, 112, 115, 253, 255)  # not extension headers of IPv6
_PORTS: Final = (1, 2, 22, 53, 80, 443, 1023, 1024, 5000, 5001, 8080, 9000, 49151, 65534, 65535)

Files = list[tuple[str, str]]


def labels(rng: random.Random) -> dict[str, str]:
    """Labels of one workload; `zone` is not always there."""
    found = {key: rng.choice(values) for key, values in VALUES.items()}
    if rng.random() < 0.4:
        del found["zone"]
    return found


class Author:
    """Writes one policy."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.ids = 0

    def files(self) -> Files:
        """Files of one policy that the language accepts."""
        rng = self.rng
        out = [("mesh.yaml", self._mesh())]
        if rng.random() < 0.7:
            out += [("shop.yaml", self._scoped("shop", "lab")), ("lab.yaml", self._scoped("lab", "shop"))]
        return out

    def _id(self) -> str:
        self.ids += 1
        return f"r{self.ids}"

    def _mesh(self) -> str:
        rng = self.rng
        lines = ["meshpolicy: 1", "labels:", "  keys: {" + ", ".join(f"{k}: [{', '.join(v)}]" for k, v in VALUES.items()) + "}"]
        lines += ["groups:", *(f"  g{n}: {self._selector(groups=n)}" for n in range(4))]
        lines += ["services:", *(f"  s{n}: {self._ports(services=False)}" for n in range(3))]
        rails = [self._guardrail() for _ in range(rng.randrange(4))]
        lines += ["guardrails:", *rails] if rails else []
        lines += ["segments:"]
        for number in range(rng.randint(2, 3)):
            lines.append(f"  - name: seg{number}")
            audit = rng.random() < 0.35
            if audit or rng.random() < 0.4:
                lines.append(f"    members: {self._selector()}")
            if audit:
                lines.append(f"    mode: {self._audit()}")
            elif rng.random() < 0.1:
                lines.append("    mode: draft")
            lines += ["    allow:", *(self._rule() for _ in range(rng.randint(3, 6)))]
            denies = [self._rule(narrow=True) for _ in range(rng.randrange(3))]
            lines += ["    deny:", *denies] if denies else []
        grants = [self._grant() for _ in range(rng.randrange(3))]
        lines += ["grants:", *grants] if grants else []
        return "\n".join(lines) + "\n"

    def _scoped(self, scope: str, other: str) -> str:
        lines = ["meshpolicy: 1", f"scope: {scope}", "segments:", f"  - name: in-{scope}", "    allow:"]
        lines += [self._rule(scoped=True) for _ in range(2)]
        half = "offers:" if scope == "shop" else "accepts:"
        peer, own = ("to", "from") if scope == "shop" else ("from", "to")
        mine = f"{own}: {{role: {self.rng.choice(VALUES['role'])}}}, " if self.rng.random() < 0.5 else ""
        lines += [half, f"  - {{{mine}{peer}: {other}, on: {self._ports(services=False)}}}"]
        return "\n".join(lines) + "\n"

    def _rule(self, *, narrow: bool = False, scoped: bool = False) -> str:
        src, dst = (self._selector(narrow=narrow, scoped=scoped) for _ in range(2))
        return f"      - {{id: {self._id()}, from: {src}, to: {dst}, on: {self._ports()}{self._mode()}}}"

    def _audit(self) -> str:
        """Until a date to come or one that has passed."""
        return f'{{audit_until: "{show_instant(NOW + self.rng.choice((-10, 3600, 3600, 3600)))}"}}'

    def _mode(self) -> str:
        draw = self.rng.random()
        return ", mode: draft" if draw < 0.07 else f", mode: {self._audit()}" if draw < 0.2 else ""

    def _guardrail(self) -> str:
        kind = "deny" if self.rng.random() < 0.7 else "pass"
        on = "" if kind == "deny" and self.rng.random() < 0.3 else f", on: {self._ports()}"
        body = f"id: {self._id()}, from: {self._selector(narrow=True)}, to: {self._selector(narrow=True)}{on}{self._mode()}"
        return f"  - {kind}: {{{body}}}"

    def _grant(self) -> str:
        end = NOW + self.rng.choice((-10, 3600))
        when = f'"{show_instant(end)}"'
        return f"  - {{id: {self._id()}, from: {self._selector()}, to: {self._selector()}, on: {self._ports()}, not_after: {when}}}"

    def _selector(self, *, groups: int | None = 4, narrow: bool = False, scoped: bool = False, depth: int = 0) -> str:
        rng = self.rng
        role = rng.choice(VALUES["role"])
        forms = [
            f"{{role: {role}}}",
            f"{{role: [{', '.join(rng.sample(VALUES['role'], 2))}]}}",
            f"{{env: {rng.choice(VALUES['env'])}}}",
            f"{{role: {role}, env: {rng.choice(VALUES['env'])}}}",
        ]
        if scoped:  # by labels alone: a name may lie outside the scope, which the language refuses
            return rng.choice([*forms, '"*"'])
        forms += [
            f"{{workload: {rng.choice(NAMES)}}}",
            f"{{workload: [{', '.join(rng.sample(NAMES, 3))}]}}",
            f"{{under: {rng.choice(('shop', 'lab', 'edge', 'ops'))}}}",
        ]
        if groups:
            forms += [f"g{rng.randrange(groups)}"] * 2
        if not narrow:
            forms += ['"*"', '"*"', '{zone: "*"}', f"{{not: {{role: {role}}}}}"]
            if depth < 2:
                inner = [self._selector(groups=groups, depth=depth + 1) for _ in range(2)]
                forms += [f"{{any: [{', '.join(inner)}]}}", f"{{all: [{', '.join(inner)}]}}"]
        return rng.choice(forms)

    def _ports(self, *, services: bool = True) -> str:
        words = [self._word(services=services) for _ in range(self.rng.choice((1, 1, 2, 3)))]
        return f"[{', '.join(words)}]"

    def _word(self, *, services: bool) -> str:
        rng = self.rng
        proto = rng.choice(("tcp", "tcp", "udp", "sctp"))
        first, last = sorted(rng.sample(_PORTS, 2))
        near = rng.choice(_PORTS[:-2])
        forms = [
            f"{proto}/{rng.choice(_PORTS)}",
            f'"{proto}/{first},{last}"',
            f"{proto}/{near}-{min(65535, near + rng.randrange(1, 30))}",  # around what becomes single elements
            f"{proto}/{first}-{last}",
            f"{proto}/{rng.choice(('1-65535', '2-65535', '1-65534', '1024-65535'))}",
            proto,
            "icmp",
            f'"{rng.choice(OTHER)}"',
        ]
        if services:
            forms += [f"s{rng.randrange(3)}"]
        return "any" if rng.random() < 0.06 else rng.choice(forms)


def write(seed: str) -> tuple[Files, str, dict[str, dict[str, str]]]:
    """Files, their digest, and the labels of the workloads."""
    rng = random.Random(seed)
    files = Author(rng).files()
    return files, digest(files), {name: labels(rng) for name in NAMES}
