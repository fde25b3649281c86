"""`retinue policy key|authority|sign|bundle|replay|segmentation`: operators on their own machines."""

from __future__ import annotations

import json
import os
import sys

import pytest

from mesh.cli_policy_sign import app
from mesh.command import run_app

SHOP = "meshpolicy: 1\nlabels: {keys: [role]}\nsegments:\n  - name: s\n    allow:\n      - {id: a, from: {role: web}, to: {role: api}, on: tcp/80}\n"
AUTHORITY = """\
trust_domain: prod.example
signers:
  alice: {key: %s, roles: [security]}
  bob: {key: %s}
root: {signers: [alice, bob], threshold: 2}
scopes:
  "": {signers: [alice, bob], threshold: 2}
"""


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*args: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            monkeypatch.setattr(sys, "argv", ["retinue", "policy", *args])
            run_app(lambda **more: app(args=list(args), **more), "retinue policy")
        out = capsys.readouterr()
        assert int(left.value.code or 0) == code, out.out + out.err
        return out.out + out.err if code else out.out

    return call


@pytest.fixture
def keys(run, tmp_path):
    """Two operators, and the authority that both signed."""
    (tmp_path / "pass").write_text("correct horse\n")
    public = [run("key", "new", "alice.key").strip(), run("key", "new", "bob.key", "--passphrase-file", "pass").strip()]
    (tmp_path / "a.yaml").write_text(AUTHORITY % tuple(f'"{k}"' for k in public))
    (tmp_path / "shop.yaml").write_text(SHOP)
    run("authority", "new", "a.yaml", "--out", "a.json")
    run("authority", "sign", "a.json", "--key", "alice.key")
    assert "authority.threshold" in run("authority", "show", "a.json", code=1)
    run("authority", "sign", "a.json", "--key", "bob.key", "--passphrase-file", "pass")
    return public


def test_keys_are_secret_and_never_overwritten(run, keys, tmp_path) -> None:
    assert (tmp_path / "alice.key").stat().st_mode & 0o777 == 0o600
    assert run("key", "show", "alice.key").strip() == keys[0]
    assert run("key", "show", "bob.key", "--passphrase-file", "pass").strip() == keys[1]
    assert "key.exists" in run("key", "new", "alice.key", code=1)
    assert "key.passphrase" in run("key", "show", "bob.key", code=2)
    (tmp_path / "wrong").write_text("x\n")
    assert "key.form" in run("key", "show", "bob.key", "--passphrase-file", "wrong", code=2)
    (tmp_path / "empty").write_text("\n")
    assert "key.passphrase" in run("key", "show", "bob.key", "--passphrase-file", "empty", code=2)
    assert "file.missing" in run("key", "show", "nobody.key", code=1)
    os.chmod(tmp_path / "alice.key", 0o644)
    assert "state.key_mode" in run("key", "show", "alice.key", code=78)


def test_signatures_are_collected(run, keys, tmp_path) -> None:
    run("sign", "shop.yaml", "--authority", "a.json", "--key", "alice.key", "--out", "one")
    assert "no" in run("bundle", "one", code=1)
    run("sign", "--add", "one", "--key", "bob.key", "--passphrase-file", "pass", "--out", "two")
    (state,) = json.loads(run("bundle", "two", "-o", "json"))
    assert (state["complete"], state["signed"], state["serial"]) == (True, ["alice", "bob"], 1)
    (tmp_path / "shop.yaml").write_text(SHOP + "# more\n")
    run("sign", "shop.yaml", "--base", "two", "--key", "alice.key", "--out", "three")
    assert json.loads(run("bundle", "three", "-o", "json", code=1).rpartition("]")[0] + "]")[0]["serial"] == 2
    assert run("authority", "show", "three", "-o", "json") == run("authority", "show", "a.json", "-o", "json")


def test_the_next_document(run, keys, tmp_path) -> None:
    (tmp_path / "b.yaml").write_text((AUTHORITY % tuple(f'"{k}"' for k in keys)).replace("threshold: 2}\nscopes", "threshold: 1}\nscopes"))
    run("authority", "new", "b.yaml", "--base", "a.json", "--out", "b.json")
    run("authority", "sign", "b.json", "--key", "alice.key")
    run("authority", "sign", "b.json", "--key", "bob.key", "--passphrase-file", "pass")
    assert json.loads(run("authority", "show", "b.json", "-o", "json"))["version"] == 2


@pytest.mark.parametrize(
    ("args", "code", "exit_code"),
    [
        (("sign", "--key", "alice.key", "--out", "x"), "usage", 2),
        (("sign", "--authority", "a.json", "--key", "alice.key", "--out", "x"), "usage", 2),
        (("sign", "shop.yaml", "--add", "one", "--key", "alice.key", "--out", "x"), "usage", 2),
        (("sign", "bad.yaml", "--authority", "a.json", "--key", "alice.key", "--out", "x"), "policy.unknown_key", 2),
        (("sign", "shop.yaml", "--authority", "a.json", "--key", "other.key", "--out", "x"), "policy.signer_unknown", 1),
        (("sign", "shop.yaml", "--authority", "shop.yaml", "--key", "alice.key", "--out", "x"), "authority.form", 2),
        (("sign", "--add", "shop.yaml", "--key", "alice.key", "--out", "x"), "bundle.form", 2),
        (("authority", "new", "shop.yaml", "--out", "x"), "policy.unknown_key", 2),
        (("authority", "new", "short.yaml", "--out", "x"), "authority.document", 2),
        (("authority", "show", "none.json"), "authority.form", 2),
        (("as-of", "shop.yaml", "--at", "2031-01-01", "--root", "00"), "history.form", 2),
        (("as-of", "gone", "--at", "2031-01-01", "--root", "00"), "file.read", 2),
        (("as-of", "shop.yaml", "--at", "2031-01-01", "--root", "00", "--head", "x"), "log.head", 2),
    ],
)
def test_what_is_wrong(run, keys, tmp_path, args, code, exit_code) -> None:
    run("key", "new", "other.key")
    (tmp_path / "bad.yaml").write_text(SHOP + "nonsense: 1\n")
    (tmp_path / "short.yaml").write_text(AUTHORITY % ("short", "short"))
    (tmp_path / "none.json").write_text("{}")
    assert f"[{code}]" in run(*args, code=exit_code)
    assert not (tmp_path / "x").exists()


# ---- on recorded flows

INVENTORY = "inventory: 1\nworkloads:\n  - {name: shop/web, labels: {role: web}}\n  - {name: shop/api, labels: {role: api}}\n"


def test_replay_and_numbers(run, tmp_path) -> None:
    for name, text in (("shop.yaml", SHOP), ("i.yaml", INVENTORY), ("t.yaml", SHOP + "tests: [{replay: last-90d}]\n")):
        (tmp_path / name).write_text(text)
    rows = [{"time": "2031-01-01", "src": "shop/web", "dst": "shop/api", "proto": "tcp", "port": p, "verdict": "allow"} for p in (80, 81)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = ("-i", "i.yaml", "--flows", "f.jsonl", "--at", "2031-01-02")
    found = json.loads(run("replay", "shop.yaml", *base, "-o", "json", code=1).partition("\n2 recorded")[0])
    assert (found["flows"], found["broken"], found["denied"][0]["flow"]) == (2, 1, "tcp/81")
    run("replay", "shop.yaml", *base, "--budget", "1")
    run("replay", "shop.yaml", *base, "--against", "shop.yaml")
    assert "FAIL" in run("test", "t.yaml", *base, code=1)
    assert "not run" in run("test", "t.yaml", "-i", "i.yaml", "--at", "2031-01-02")
    numbers = json.loads(run("segmentation", "shop.yaml", *base, "-o", "json"))
    assert (numbers["good"], numbers["segments"][0]["used"]) == (True, 1)
