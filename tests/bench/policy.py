"""``python -m tests.bench.policy``: how long a policy of 10,000 rules takes to read, to compile over classes, and to follow one change.

Prints one row a measure: measure, value, unit, n, min, max. The value is the median. Nothing here asserts a timing.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from policy.classes import Classes
from policy.compile import compile_policy
from policy.language import load
from policy.program import Subject

IDENTITIES, INSTANCES, RULES, APPS, ROUNDS = 10_000, 100_000, 10_000, 500, 5
ROLES = ("web", "api", "db", "job")


def inventory(rng: random.Random) -> list[Subject]:
    """10,000 identities in about 2,000 classes."""
    return [
        Subject(f"w{n}", {"app": f"app{rng.randrange(APPS)}", "role": rng.choice(ROLES), "env": "prod", "pod": str(n)})
        for n in range(IDENTITIES)
    ]


def text(rng: random.Random) -> str:
    """A policy of 10,000 rules, one in ten a deny, ten of them broad."""

    def who() -> str:
        return f"{{app: app{rng.randrange(APPS)}, role: {rng.choice(ROLES)}}}"

    lines = ["meshpolicy: 1", "labels: {keys: [app, role, env]}", "segments:"]
    for segment in range(10):
        lines += [f"  - name: s{segment}", "    members: {env: prod}"]
        for kind, count in (("deny", RULES // 100), ("allow", RULES // 10 - RULES // 100)):
            lines.append(f"    {kind}:")
            for n in range(count):
                source = '"*"' if kind == "allow" and n == 0 else who()
                lines.append(f"      - {{id: {kind}-{segment}-{n}, from: {source}, to: {who()}, on: tcp/{rng.randrange(1, 60000)}}}")
    return "\n".join(lines) + "\n"


def _timed(measure: str, call: Callable[[], object], rounds: int = ROUNDS) -> None:
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        took.append((time.perf_counter() - start) * 1000)
    print(f"{measure:46} {statistics.median(took):10.2f} ms  n={rounds} min={min(took):.2f} max={max(took):.2f}", flush=True)


def main() -> None:
    """Run and print."""
    rng = random.Random(1)
    subjects, source = inventory(rng), text(rng)
    policy = load([("bench.yaml", source)])
    program = compile_policy(policy, 0)
    classes = Classes(program, subjects)
    print(f"{RULES} rules ({len(source) // 1024} KiB), {IDENTITIES} identities, {len(classes)} classes")
    _timed("read and check the file", lambda: load([("bench.yaml", source)]), 3)
    _timed("policy to program", lambda: compile_policy(policy, 0))
    _timed("program to classes (full compile)", lambda: Classes(program, subjects))

    instances = [subjects[n % IDENTITIES].name for n in range(INSTANCES)]

    def whole() -> None:
        made = Classes(compile_policy(policy, 0), subjects)
        by_class: dict[int, list[int]] = {}
        for n, name in enumerate(instances):
            by_class.setdefault(made.class_of(name), []).append(n)

    _timed(f"both, and {INSTANCES} instances in their classes", whole)

    def change() -> None:
        number = classes.put(Subject(f"w{rng.randrange(IDENTITIES)}", {"app": f"app{rng.randrange(APPS)}", "role": rng.choice(ROLES), "env": "prod"}))
        for other in (*classes.targets(number), *classes.sources(number)):
            classes.between(number, other)

    _timed("one identity changes, its peers", change, 200)


if __name__ == "__main__":
    main()
