"""`retinue policy`, as a command line: what it prints and how it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.cli_policy import app
from mesh.command import run_app

POLICY = """\
meshpolicy: 1
labels: {keys: [role]}
segments:
  - name: shop
    allow:
      - {id: web-api, from: {role: web}, to: {role: api}, on: tcp/80}
      - {id: api-db, from: {role: api}, to: {role: db}, on: tcp/5432}
grants:
  - {id: old, from: {role: web}, to: {role: db}, on: tcp/22, not_after: 2031-01-01}
tests:
  - {from: {role: web}, to: {role: api}, on: tcp/80, expect: allow}
"""
INVENTORY = """\
inventory: 1
workloads:
  - {name: shop/web, labels: {role: web}, spiffe_id: "spiffe://td/wl/shop/web"}
  - {name: shop/api, labels: {role: api}}
  - {name: shop/db, labels: {role: db}}
  - {name: shop/batch, labels: {role: batch}}
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "inventory.yaml").write_text(INVENTORY)
    return tmp_path


@pytest.fixture
def cli(files, monkeypatch, capsys):
    """Run a command in the folder of the files; (exit status, stdout, stderr)."""
    monkeypatch.chdir(files)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["retinue", "policy", *words])
        with pytest.raises(SystemExit) as left:
            run_app(_with_args(words), "retinue policy")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(left.value.code or 0), out, err

    return call


def _with_args(words):
    return lambda **more: app(args=list(words), **more)


P, INV = ("-p", "policy.yaml"), ("-i", "inventory.yaml")


def test_check(cli, files):
    code, out, _ = cli("check", *P, "-o", "json")
    data = json.loads(out)
    assert (code, data["valid"], data["segments"], data["tests"], len(data["digest"])) == (0, True, 1, 1, 64)
    assert cli("check", *P)[1].splitlines()[1].split() == ["valid", "true"]
    code, _, err = cli("check", "-p", "missing.yaml")
    assert (code, "error[file.missing]" in err) == (1, True)
    (files / "bad.yaml").write_text("meshpolicy: 1\nsegmets: []\n")
    code, _, err = cli("check", "-p", "bad.yaml")
    assert code == 2
    assert "bad.yaml:2:1: unknown key" in err
    assert "did you mean segments?" in err
    code, _, err = cli("check", "-p", "bad.yaml", "-o", "json")
    assert json.loads(err)["error"]["line"] == 2
    (files / "latin.yaml").write_bytes(b"\xe9")
    assert cli("check", "-p", "latin.yaml")[0] == 2


def test_a_folder_is_all_its_files(cli, files):
    (files / "more").mkdir()
    assert cli("check", "-p", "more")[0] == 1
    (files / "more" / "a.yaml").write_text(POLICY)
    (files / "more" / "b.yml").write_text("meshpolicy: 1\n")
    assert json.loads(cli("check", "-p", "more", "-o", "json")[1])["files"] == ["more/a.yaml", "more/b.yml"]
    (files / "more" / "c.yaml").mkdir()
    code, _, err = cli("check", "-p", "more")
    assert (code, "error[file.read]" in err) == (2, True)


def test_file_tests(cli, files):
    code, out, err = cli("test", *P, *INV)
    assert (code, "pass" in out, "1 passed, 0 failed" in err) == (0, True, True)
    assert cli("test", *P)[0] == 0
    (files / "policy.yaml").write_text(POLICY.replace("expect: allow", "expect: deny"))
    code, out, _ = cli("test", *P, *INV, "-o", "json")
    assert code == 1
    assert json.loads(out)[0]["where"] == "policy.yaml:11"


def test_explain(cli):
    code, out, _ = cli("explain", "shop/batch", "shop/api", "80", *P, *INV)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "deny: default deny: no rule allows shop/batch -> shop/api tcp/80"
    assert lines[1].startswith("near miss: rule web-api (policy.yaml:6): the source shop/batch does not match role=web")
    assert lines[2].startswith("smallest change: give shop/batch the label role=web")
    out = cli("explain", "spiffe://td/wl/shop/web", "shop/db", "tcp/23", *P, *INV)[1]
    assert "smallest change: allow it: add rule shop-web-to-shop-db" in out or "add tcp/23" in out
    out = cli("explain", "spiffe://other.example/shop/web", "shop/api", "80", *P, *INV)[1]
    assert out.startswith("deny: default deny: no rule allows spiffe://other.example/shop/web -> shop/api tcp/80")
    assert 'from: "spiffe://other.example/shop/web"' in out
    assert cli("explain", "spiffe://other.example/..", "shop/api", "80", *P, *INV)[0] == 2
    data = json.loads(cli("explain", "shop/web", "shop/api", "tcp/80", *P, *INV, "-o", "json")[1])
    assert (data["verdict"], data["rule"], data["where"]) == ("allow", "web-api", "policy.yaml:6")
    out = cli("explain", "shop/web", "shop/batch", "icmp", *P, *INV)[1]
    assert "- {id: shop-web-to-shop-batch" in out
    for words, code in ((("nobody", "shop/api", "80"), 1), (("shop/web", "shop/api", "tcp/x"), 2), (("shop/web", "shop/api", "0"), 2), (("shop/web", "shop/api", "tpc/1"), 2)):
        assert cli("explain", *words, *P, *INV)[0] == code
    assert cli("explain", "shop/web", "shop/db", "22", *P, *INV, "--at", "2031-01-02")[1].count("it ended at 2031-01-01") >= 1
    assert cli("explain", "shop/web", "shop/db", "22", *P, *INV, "--at", "2030-01-02")[1].startswith("allow")
    assert cli("explain", "shop/web", "shop/db", "22", *P, *INV, "--at", "later")[0] == 2


def test_matrix_and_questions(cli):
    at = ("--at", "2032-01-01")
    assert json.loads(cli("matrix", *P, *INV, *at, "-o", "json")[1]) == {
        "allow": [
            {"src": "shop/api", "dst": "shop/db", "proto": "tcp", "ports": "5432"},
            {"src": "shop/web", "dst": "shop/api", "proto": "tcp", "ports": "80"},
        ]
    }
    assert "shop/web" in cli("who-can-reach", "shop/api", *P, *INV)[1]
    assert json.loads(cli("who-can-reach", "shop/api", "--on", "81", *P, *INV, "-o", "json")[1]) == {"allow": []}
    assert [r["name"] for r in json.loads(cli("blast-radius", "shop/web", *P, *INV, *at, "-o", "json")[1])] == ["shop/api", "shop/db"]
    assert "shop/web -> shop/api" in cli("blast-radius", "shop/web", "--depth", "1", *P, *INV)[1]
    changed = json.loads(cli("what-if", "shop/batch", "role=web", *P, *INV, *at, "-o", "json")[1])
    assert changed == [{"kind": "gains", "src": "shop/batch", "dst": "shop/api", "ports": "tcp/80"}]
    assert "-  shop/web" in cli("what-if", "shop/web", "role=", *P, *INV)[1]
    assert cli("what-if", "shop/web", "role", *P, *INV)[0] == 2


def test_diff(cli, files):
    (files / "old.yaml").write_text(POLICY.replace("tcp/80", "tcp/81"))
    found = json.loads(cli("diff", *P, "-a", "old.yaml", *INV, "-o", "json")[1])
    assert [(d["kind"], d["ports"]) for d in found] == [("gains", "tcp/80"), ("loses", "tcp/81")]
    assert cli("diff", *P, "-a", "policy.yaml", *INV)[1].splitlines()[1:] == []


def test_lint(cli, files):
    code, out, _ = cli("lint", *P, "--at", "2031-02-01", "-o", "json")
    assert (code, [f["code"] for f in json.loads(out)]) == (0, ["L09"])
    assert cli("lint", *P, "--at", "2031-02-01", "--strict")[0] == 1
    (files / "policy.yaml").write_text(POLICY.replace("{role: web}, to: {role: api}, on: tcp/80}\n      -", "'*', to: '*', on: any}\n      -"))
    code, out, _ = cli("lint", *P, *INV)
    assert (code, "L08" in out) == (1, True)


def test_fmt(cli, files):
    path = files / "policy.yaml"
    assert cli("fmt", "policy.yaml") == (0, "", "")
    path.write_text(POLICY.replace("{keys: [role]}", "{ keys: [ role ] }"))
    path.chmod(0o640)
    assert cli("fmt", "policy.yaml")[:2] == (1, "policy.yaml\n")
    assert cli("fmt", "-w", "policy.yaml")[0] == 0
    assert path.read_text() == POLICY
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in files.iterdir() if p.name.endswith(".part")] == []


def test_schema(cli):
    assert json.loads(cli("schema")[1])["title"] == "Retinue policy"


def test_imported_policies_answer_questions_but_have_no_tests(cli, files):
    source = files / "source.json"
    source.write_text("{}")
    imported = (
        "importedpolicy: 1\nsource: test\ndefault: deny\ntiers:\n  - name: t\n    order: deny-wins\n    otherwise: pass\n    rules:\n"
        "      - {id: r, action: allow, src: {label: role, in: [web]}, dst: everybody, ports: [tcp/80], where: 'x:1:1'}\n"
    )
    (files / "foreign.yaml").write_text(imported)
    f = ("-p", "foreign.yaml")
    assert json.loads(cli("check", *f, "-o", "json")[1])["rules"] == 1
    rows = json.loads(cli("matrix", *f, *INV, "-o", "json")[1])["allow"]
    assert {r["src"] for r in rows} == {"shop/web"}
    assert len(rows) == 3
    for command in ("test", "lint"):
        code, _, err = cli(command, *f)
        assert (code, "error[policy.imported]" in err) == (2, True)
    code, _, err = cli("check", *f, *P)
    assert (code, "error[policy.mixed]" in err) == (2, True)


def test_import(cli, files):
    (files / "tailnet").mkdir()
    (files / "tailnet" / "policy.hujson").write_text('{"acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:b:80"]}], "tagOwners": {"tag:a": [], "tag:b": []}}')
    devices = [{"id": str(n), "hostname": t, "name": t, "tags": [f"tag:{t}"], "addresses": [f"100.64.0.{n}"], "advertisedRoutes": [], "enabledRoutes": []} for n, t in enumerate("ab", 1)]
    (files / "tailnet" / "devices.json").write_text(json.dumps({"devices": devices}))
    code, out, err = cli("import", "tailscale", "tailnet", "--out", "out")
    assert code == 0, err
    assert "not translated" in out
    rows = json.loads(cli("matrix", "-p", "out/policy.yaml", "-i", "out/inventory.yaml", "-o", "json")[1])["allow"]
    assert {(r["src"], r["dst"], r["ports"]) for r in rows if r["proto"] == "tcp"} == {("a", "b", "80")}
    assert cli("import", "tailscale", "nowhere", "--out", "out")[0] == 1


def test_usage_errors(cli):
    assert cli("matrix", *P)[0] == 2
    assert cli("nonsense")[0] == 2


def test_help_loads_nothing_heavy():
    code = "import sys, mesh.cli_policy; print(sorted({'aiohttp', 'pydantic', 'yaml', 'cryptography', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"
