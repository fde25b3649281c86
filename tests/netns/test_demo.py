"""`retinue demo` as a user runs it: its events, its figures, its exit status, and what it leaves behind."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from typing import Any

import pytest

from mesh import lab_registry
from mesh.lab_process import command, run, start_time

KEYS = ["event", "denied_ms", "duration_s", "leftovers", "marker_in_control", "marker_on_underlay", "move", "ok", "revoke_cut_ms"]


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*command("retinue"), "demo", "--json", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        data: dict[str, Any] = json.loads(line)
        if data["event"] == event:
            return data
    raise AssertionError(f"no {event}: {process.stderr.read() if process.stderr else ''}")


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    """A run killed in its middle, then a whole run."""
    killed = start()
    lab = until(killed, "lab")
    until(killed, "ready")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    entry = lab_registry._read(lab_registry.ROOT / f"{lab['id']}.json")
    assert len(lab_registry.leftovers(entry)) > 10, "positive control: the killed run left its lab"
    pids = [pid for pid, _ in entry.processes]

    done = start()
    out, err = done.communicate(timeout=110)
    lines = [json.loads(line) for line in out.splitlines()]
    assert done.returncode == 0, (err, [x for x in lines if x.get("ok") is False])
    assert lab["id"] in lines[0]["labs"], "the second run cleared the first one away"
    assert lab_registry.leftovers(entry) == []
    assert all(start_time(pid) is None for pid in pids)
    return lines


def one(events: list[dict[str, Any]], name: str, **match: Any) -> dict[str, Any]:
    found = [e for e in events if e["event"] == name and all(e[k] == v for k, v in match.items())]
    assert len(found) == 1, (name, match, found)
    return found[0]


def test_summary_is_last_and_has_exactly_its_keys(events: list[dict[str, Any]]) -> None:
    summary = events[-1]
    assert sorted(summary) == sorted(KEYS)
    assert summary["event"] == "summary"
    assert summary["ok"] is True
    assert set(summary["move"]) == {"sent", "lost", "gap_ms"}
    assert summary["leftovers"] == 0
    assert summary["marker_on_underlay"] == 0
    assert summary["marker_in_control"] > 0
    assert summary["move"]["lost"] == 0
    assert summary["denied_ms"] < 100


def test_every_claim_held_and_none_is_missing(events: list[dict[str, Any]]) -> None:
    claims = [e["event"] for e in events if "ok" in e]
    assert all(e["ok"] for e in events if "ok" in e)
    for name in ("request", "denied", "explained", "control", "capture", "moved", "old_holder", "policy_diff", "revoked", "after_revoke"):
        assert name in claims
    assert [e["number"] for e in events if e["event"] == "act"] == [1, 2, 3, 4, 5]


def test_act_1_enrols_hosts_and_workloads(events: list[dict[str, Any]]) -> None:
    hosts = [e for e in events if e["event"] == "enrolled"]
    assert sorted(e["spiffe_id"] for e in hosts) == [f"spiffe://demo.example/host/host-{x}" for x in "abc"]
    assert len({e["tunnel_key"] for e in hosts}) == 3
    for name, host in (("web", "host-a"), ("api", "host-b"), ("batch", "host-c")):
        identity = one(events, "identity", workload=name)
        assert (identity["spiffe_id"], identity["host"]) == (f"spiffe://demo.example/wl/{name}", host)
        assert len(identity["addresses"]) == 2


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_act_2_allows_and_denies(events: list[dict[str, Any]], family: str) -> None:
    allowed = one(events, "request", src="web", family=family)
    assert (allowed["status"], allowed["served_by"], allowed["says"]) == (200, "api@host-b", "42 orders")
    assert allowed["caller_address"] in one(events, "identity", workload="web")["addresses"]
    assert one(events, "denied", src="batch", family=family, same_host=False)["url"] == allowed["url"]
    assert one(events, "denied", src="batch", family=family, same_host=True)["url"] == allowed["url"]
    why = one(events, "explained")
    assert (why["verdict"], why["rule"]) == ("deny", None)
    assert "default deny" in why["reason"]
    assert why["smallest_change"]


def test_act_3_nothing_is_readable(events: list[dict[str, Any]]) -> None:
    capture = one(events, "capture")
    assert capture["readable"] == {"marker": 0, "address": 0, "name": 0}
    assert capture["answered_with_marker"] == 40
    assert capture["tunnel_bytes"] > 40 * len(one(events, "control")["marker"])
    assert capture["dropped"] == 0


def test_act_4_moves_without_loss(events: list[dict[str, Any]]) -> None:
    moved = one(events, "moved")
    assert moved["sent"] == moved["answered"] >= 150
    assert set(moved["served_by"]) == {"api@host-b", "api@host-c"}
    assert moved["epoch"] == 2
    assert moved["policy_digest_kept"]
    old = one(events, "old_holder")
    assert old["accepted_before"] >= 20
    assert old["attempts_after"] > 20
    assert old["accepted_after"] == 0
    assert old["accepted_from_new"] > 0


def test_act_5_changes_and_revokes(events: list[dict[str, Any]]) -> None:
    diff = one(events, "policy_diff")
    assert (diff["gained"], diff["lost"], diff["applied"]) == ([{"src": "batch", "dst": "api", "ports": "tcp/8080"}], [], False)
    assert len([e for e in events if e["event"] == "request" and e["src"] == "batch"]) == 2
    revoked = one(events, "revoked")
    assert revoked["ticks"] > 10
    assert revoked["bystander_ticks"] > revoked["ticks"]
    assert one(events, "after_revoke")["error"] is not None


def test_the_story_tells_every_claim(events: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from mesh.story import Story

    console = Console(width=100, record=True, file=io.StringIO())
    story = Story(console)
    for event in events:
        story.tell(event["event"], {k: v for k, v in event.items() if k != "event"})
    text = console.export_text()
    for words in ("Act V", "ALLOWED", "DENIED", "connection refused", "retinue explain batch api", "0 lost", "Every claim held"):
        assert words in text
    assert "NOT AS PROMISED" not in text


def test_sigterm_leaves_nothing() -> None:
    process = start()
    lab = until(process, "lab")
    until(process, "ca")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert lab_registry.namespaces(f"{lab_registry.PREFIX}{lab['id']}-") == []
    assert not (lab_registry.ROOT / lab["id"]).exists()


def test_without_root_it_says_what_is_missing() -> None:
    # Not root, but able to read the checkout wherever it lies.
    reader = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    done = run([*reader, *command("retinue"), "demo", "--json"], codes=(4,))
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "demo.preflight"
    assert "root" in error["message"]
    assert "sudo" in error["hint"]


def test_clean_says_what_it_removed() -> None:
    done = run([*command("retinue"), "demo", "--clean", "--json"])
    assert json.loads(done.stdout)["event"] == "swept"
