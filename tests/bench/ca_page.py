"""docs/PERFORMANCE_CA.md from out/ca.json and out/crowd.json."""

from __future__ import annotations

from typing import Any, Final

WHAT: Final = """\
# Performance of the control plane

Servers and their clients run on the same machine and share its cores, and other work may run beside them (see the load). Times count from
the moment a request is sent; each endpoint that counts has verified what it received. Nothing in the tests asserts a timing.

    make bench-ca                  # certificates, enrolments, the feed and the return of a herd; writes out/ca.json
    make bench-ca ARGS=--publish   # and this page
    make crowd                     # revocation before 5,000 streams and 50 real agents; writes out/crowd.json (root)
    make rotation                  # the whole authority replaced under traffic, 200 identities (root)
    make kill-points               # the CA killed at more than 200 system calls of issuing; one token claimed 50 times at once

Simulated endpoints (`tests/ha/simulated.py`) have a certificate, a TLS 1.3 connection and a source address each; they check signatures,
positions and state hashes. Equal envelopes are verified once for all of them: on machines of their own they would not wait for one another.
Certificates without network: ours is checked, linted, stored with its log entry (fsync) and signed in one process; `openssl ca` and
`nebula-cert` are a process a certificate, and nebula-cert keeps no record. Over TLS: eight clients with kept connections; ours are
authenticated by their certificate, step-ca's by one-time tokens.
"""


def page(bench: dict[str, Any] | None, crowd: dict[str, Any] | None) -> str:
    """Markdown of the last runs, of which there may be only one."""
    out = [WHAT]
    if bench is not None:
        out += ["\n## The last run of `make bench-ca`\n\n", _machine(bench["machine"])]
        out.append("- " + "; ".join(f"{name}: {version}" for name, version in bench["versions"].items()) + "\n")
        out.append("- " + ", ".join(f"{k} {v}" for k, v in bench["settings"].items()) + "\n\n")
        out.append(_table(bench["rows"]))
    if crowd is not None:
        out += ["\n## The last run of `make crowd`\n\n", _machine(crowd["machine"])]
        out.append("- " + ", ".join(f"{k} {v}" for k, v in crowd["settings"].items()) + "\n\n")
        out.append(_table(crowd["rows"]))
        out += [f"\nWrong in that run: {line}\n" for line in crowd["wrong"]]
    return "".join(out)


def _machine(facts: dict[str, Any]) -> str:
    return (
        f"{facts['date']}, {facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, Python {facts['python']}, commit {facts['commit']}, "
        f"load before the start {facts['load']}.\n\n"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    out = ["| measure | subject | value | unit | n | min | max |\n", "|---|---|---|---|---|---|---|\n"]
    for r in rows:
        value, low, high = (f"{r[k]:,.0f}" if r[k] >= 100 else f"{r[k]:g}" for k in ("value", "min", "max"))
        out.append(f"| {r['measure']} | {r['subject']} | **{value}** | {r['unit']} | {r['n']:,} | {low} | {high} |\n")
    return "".join(out)
