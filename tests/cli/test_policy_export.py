"""`retinue policy export`, `draft` and `lint --flows`, as command lines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesh.cli_policy import app
from mesh.command import run_app
from policy.exporters import KINDS as EXPORTED
from policy.flows import FlowRecord, dump_flows
from policy.importers import KINDS as IMPORTED

POLICY = """\
meshpolicy: 1
labels: {keys: [role]}
segments:
  - name: shop
    allow:
      - {id: web-api, from: {role: web}, to: {role: api}, on: tcp/80}
      - {id: api-db, from: {role: api}, to: {role: db}, on: tcp/5432}
"""
INVENTORY = """\
inventory: 1
workloads:
  - {name: shop/web, labels: {role: web}}
  - {name: shop/api, labels: {role: api}}
  - {name: shop/db, labels: {role: db}}
  - {name: shop/batch, labels: {role: batch}}
"""
NOON = 1_900_000_000
FLOWS = [FlowRecord(NOON + n, src, "shop/api", 6, 80, 3, 90) for n, src in enumerate(["shop/web", "shop/web", "shop/batch"])]

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in a folder with a policy, an inventory and a recording; (exit status, stdout, stderr)."""
    (tmp_path / "p.yaml").write_text(POLICY)
    (tmp_path / "i.yaml").write_text(INVENTORY)
    (tmp_path / "f.jsonl").write_text(dump_flows(FLOWS))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["retinue", "policy", *words])
        with pytest.raises(SystemExit) as left:
            run_app(lambda **more: app(args=list(words), **more), "retinue policy")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(left.value.code or 0), out, err

    return call


@pytest.mark.parametrize("kind", EXPORTED)
def test_an_export_imports_to_the_same_matrix(cli: Cli, kind: str) -> None:
    status, out, err = cli("export", kind, "-p", "p.yaml", "-i", "i.yaml", "--out", "native", "--json")
    report = json.loads(out)
    assert (status, report["workloads"], report["pairs_compared"]) == (0, 4, 12)
    assert err.strip() == "\n".join(report["notes"])
    assert json.loads(Path("native/report.json").read_text()) == report
    Path("native/report.json").unlink()
    assert cli("import", kind, "native", "--out", "back")[0] == 0
    own = {v: k for k, v in report["names"].items()}

    def rows(*words: str) -> list[tuple[str, str, str, str]]:
        found = json.loads(cli("matrix", *words, "--json")[1])["allow"]
        pairs = [(own.get(r["src"], r["src"]), own.get(r["dst"], r["dst"]), r["proto"], r.get("ports", "")) for r in found]
        return sorted(p for p in pairs if "external" not in p)

    assert rows("-p", "back/policy.yaml", "-i", "back/inventory.yaml") == rows("-p", "p.yaml", "-i", "i.yaml") != []


def test_exports_that_are_refused_write_nothing(cli: Cli) -> None:
    Path("p.yaml").write_text(POLICY.replace("tcp/80", "icmp"))
    status, out, err = cli("export", "kubernetes", "-p", "p.yaml", "-i", "i.yaml", "--out", "native")
    assert (status, out) == (1, "")
    assert "export.protocol" in err
    assert "web-api (p.yaml:6)" in err
    assert not Path("native").exists()
    status, _, err = cli("export", "azure", "-p", "p.yaml", "-i", "i.yaml", "--out", "native")
    assert status == 2
    assert "one of kubernetes, aws" in err
    Path("file").write_text("")
    status, _, err = cli("export", "aws", "-p", "p.yaml", "-i", "i.yaml", "--out", "file/deep")
    assert status == 2
    assert "file.write" in err


def test_the_table_of_an_export(cli: Cli) -> None:
    status, out, err = cli("export", "aws", "-p", "p.yaml", "-i", "i.yaml", "--out", "native", "--inside", "10.0.0.0/8")
    assert status == 0
    assert re.search(r"pairs compared +12", out)
    assert "a group that is made anew lets everything out" in err


def test_a_draft_is_a_policy_and_says_what_was_seen(cli: Cli) -> None:
    status, text, err = cli("draft", "--flows", "f.jsonl", "-i", "i.yaml")
    assert status == 0
    assert "2 flows seen, 2 permitted; 0.0% of those never seen" in err
    assert cli("draft", "--flows", "f.jsonl", "-i", "i.yaml", "--out", "new/d.yaml")[1].count("proposed") == 3
    assert Path("new/d.yaml").read_text() == text
    assert cli("check", "-p", "new/d.yaml")[0] == 0
    assert cli("explain", "shop/batch", "shop/api", "tcp/80", "-p", "new/d.yaml", "-i", "i.yaml")[1].startswith("allow")
    assert cli("explain", "shop/api", "shop/db", "tcp/5432", "-p", "new/d.yaml", "-i", "i.yaml")[1].startswith("deny")


def test_decisions_are_kept(cli: Cli) -> None:
    base = ("draft", "--flows", "f.jsonl", "-i", "i.yaml", "--decisions", "deep/decided.json", "--json")
    first: dict[str, Any] = json.loads(cli(*base)[1])
    assert not Path("deep").exists()
    (group,) = [p["id"] for p in first["proposals"] if p["kind"] == "group"]
    accepted = json.loads(cli(*base, "--accept", group)[1])
    assert f"from: {group}" in accepted["policy"]
    assert json.loads(cli(*base)[1]) == accepted
    rejected = json.loads(cli(*base, "--reject", group)[1])
    assert json.loads(cli(*base)[1]) == rejected
    assert f"# Rejected: {group}" in rejected["policy"]
    assert json.loads(Path("deep/decided.json").read_text()) == {group: "rejected"}
    status, _, err = cli(*base, "--accept", "group-nine")
    assert status == 1
    assert "draft.unknown" in err
    assert json.loads(Path("deep/decided.json").read_text()) == {group: "rejected"}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "perhaps"}', '{"a": ["accepted"]}'])
def test_damaged_decisions_are_refused(cli: Cli, text: str) -> None:
    Path("d.json").write_text(text)
    status, _, err = cli("draft", "--flows", "f.jsonl", "-i", "i.yaml", "--decisions", "d.json")
    assert status == 2
    assert "draft.decisions" in err


def test_recordings_that_cannot_be_read(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.jsonl").write_text(dump_flows(FLOWS) + "{}\n")
    status, _, err = cli("draft", "--flows", "bad.jsonl", "-i", "i.yaml")
    assert status == 2
    assert "bad.jsonl:4: the flow has no time" in err
    Path("raw.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "file.encoding" in cli("draft", "--flows", "raw.jsonl", "-i", "i.yaml")[2]
    assert "file.missing" in cli("draft", "--flows", "absent", "-i", "i.yaml")[2]
    assert "file.read" in cli("draft", "--flows", ".", "-i", "i.yaml")[2]
    monkeypatch.setattr("mesh.cli_export.MAX_FLOWS", 10)
    assert "file.large" in cli("draft", "--flows", "f.jsonl", "-i", "i.yaml")[2]


def test_lints_about_what_is_used(cli: Cli) -> None:
    status, out, _ = cli("lint", "-p", "p.yaml", "-i", "i.yaml", "--flows", "f.jsonl", "--at", "2030-03-20", "--json")
    assert status == 0
    assert [(f["code"], f["message"]) for f in json.loads(out) if f["code"] in {"L04", "L05"}] == [
        ("L04", "rule api-db was not used in 30 days")
    ]
    denied = dump_flows(FlowRecord(NOON, "shop/api", "shop/db", 6, 5432, verdict="deny") for _ in range(2))
    Path("f.jsonl").write_text(denied)
    out = cli("lint", "-p", "p.yaml", "-i", "i.yaml", "--flows", "f.jsonl", "--at", "2030-03-20", "--json")[1]
    assert out.count("L04") == 2  # what was refused is no use of a rule
    status, _, err = cli("lint", "-p", "p.yaml", "--flows", "f.jsonl")
    assert status == 2
    assert "add --inventory FILE" in err


def test_the_help_names_every_kind(cli: Cli) -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", cli("import", "--help")[1]).split()).replace("- ", "-")  # broken lines
    assert all(kind in shown for kind in IMPORTED), shown
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", cli("export", "--help")[1]).split()).replace("- ", "-")
    assert all(kind in shown for kind in EXPORTED), shown
