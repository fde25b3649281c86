"""mesh.demo and mesh.story: preflight, the policies of the story, the summary whatever happens, and the telling."""

from __future__ import annotations

import io
import json
import os
import shutil
from typing import Any

import pytest

from identity.errors import NoPrivilege, TimedOut
from mesh import demo, demo_acts
from mesh.demo import Demo
from mesh.story import Story
from policy.compile import compile_policy
from policy.evaluate import evaluate
from policy.language import load
from policy.ports import TCP
from policy.program import Subject

BATCH, WEB, API = (Subject(n, {"role": n}) for n in ("batch", "web", "api"))


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def tell(self, event: str, data: dict[str, Any]) -> None:
        self.events.append((event, data))

    def one(self, event: str) -> dict[str, Any]:
        return next(d for e, d in self.events if e == event)


def test_the_policies_of_the_story_differ_in_one_rule() -> None:
    before, after = (compile_policy(load([("shop.yaml", text)])) for text in (demo_acts.BEFORE, demo_acts.AFTER))
    for program, verdict in ((before, "deny"), (after, "allow")):
        assert evaluate(program, WEB, API, TCP, 8080).verdict == "allow"
        assert evaluate(program, BATCH, API, TCP, 8080).verdict == verdict
        assert evaluate(program, BATCH, WEB, TCP, 8080).verdict == "deny"


def test_preflight_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(shutil, "which", lambda tool, **_: None if tool == "nft" else f"/usr/sbin/{tool}")
    checks = {c.name: c for c in demo.preflight()}
    assert not checks["root"].ok
    assert not checks["/dev/net/tun"].ok
    assert not checks["nft"].ok
    assert checks["nft"].hint == "install it: apt-get install nftables"
    assert checks["ip"].ok
    with pytest.raises(NoPrivilege) as caught:
        demo.main([])
    assert caught.value.exit == 4
    assert caught.value.code == "demo.preflight"
    assert "nft" in caught.value.message
    assert "sudo" in caught.value.hint


class BrokenLab:
    """A lab that fails, as a broken machine would."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.id, self.dir = "abc123", "/nowhere"

    @staticmethod
    def sweep() -> list[str]:
        return []

    def start(self) -> None:
        raise self.error

    def stop(self) -> list[str]:
        return []

    error: Exception = TimedOut("lab.ready", "it was not ready")


@pytest.mark.parametrize(("error", "code"), [(TimedOut("lab.ready", "no"), "lab.ready"), (ZeroDivisionError(), "bug")])
async def test_the_summary_comes_whatever_happens(monkeypatch: pytest.MonkeyPatch, error: Exception, code: str) -> None:
    monkeypatch.setattr("mesh.lab.Lab", BrokenLab)
    monkeypatch.setattr(BrokenLab, "error", error)
    monkeypatch.delenv("RETINUE_DEBUG", raising=False)
    recorder = Recorder()
    summary = await Demo(recorder).run()
    assert recorder.one("failed")["error"]["code"] == code
    assert recorder.events[-1] == ("summary", summary)
    assert list(summary) == list(demo.SUMMARY)
    assert (summary["ok"], summary["move"], summary["leftovers"]) == (False, None, 0)


async def test_a_claim_that_does_not_hold_fails_the_run() -> None:
    recorder = Recorder()
    run = Demo(recorder, pace=0.001)
    await run.emit("fine", ok=True)
    await run.emit("wrong", ok=False)
    assert run.failed == ["wrong"]


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    demo.JsonLines().tell("x", {"a": 1})
    assert json.loads(capsys.readouterr().out) == {"event": "x", "a": 1}


EVENTS: dict[str, dict[str, Any]] = {
    "request": {"src": "web", "dst": "api", "family": "ipv4", "status": None, "error": "timeout", "says": "", "served_by": "", "ms": 1.0},
    "denied": {"src": "batch", "dst": "api", "family": "ipv6", "error": None, "status": 200, "ms": 3.0, "same_host": False},
    "control": {"marker": "MARKER-1", "marker_frames": 0},
    "capture": {"readable": {"marker": 3, "address": 0, "name": 0}, "answered_with_marker": 1, "tunnel_frames": 0, "tunnel_bytes": 0,
                "frames": 9, "dropped": 0},
    "old_holder": {"host": "host-b", "accepted_before": 1, "accepted_after": 7, "attempts_after": 9},
    "revoked": {"cut_ms": 5000.0, "bystander_gap_ms": 1.0},
    "after_revoke": {"error": None, "ms": 1.0},
    "policy_diff": {"added": "- {x}", "gained": [], "lost": [{"src": "a", "dst": "b", "ports": "tcp/1"}]},
    "failed": {"error": {"code": "lab.ready", "message": "no", "hint": "try"}},
    "leftovers": {"left": ["namespace x"]},
    "not_held": {"claims": ["denied"]},
    "something_new": {},
}  # fmt: skip


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_the_story_never_tells_a_broken_claim_as_a_success(event: str) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    Story(console).tell(event, EVENTS[event] | {"ok": False})
    text = console.export_text()
    assert "NOT AS PROMISED" in text
    assert "✔" not in text


@pytest.mark.parametrize("ok", [True, False])
def test_the_end_of_the_story(ok: bool) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    story = Story(console)
    story.tell("swept", {"labs": ["a"]})
    story.tell("kept", {"id": "abc123", "dir": "/run/retinue-lab/abc123", "left": []})
    summary = dict.fromkeys(demo.SUMMARY) | {"ok": ok, "duration_s": 1.0, "leftovers": 0}
    story.tell("summary", summary)
    text = console.export_text()
    assert ("Every claim held." in text) is ok
    assert ("Not every claim held." in text) is not ok
    assert "not measured" in text
    assert "demo --clean" in text
    assert "1 interrupted run" in text
