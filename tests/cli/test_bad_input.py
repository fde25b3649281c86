"""What bad input gets, against a running CA: a stable code, a documented exit status, and nothing changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ca.client import AdminClient

BIN = Path(sys.executable).parent
POLICY = "meshpolicy: 1\nlabels: {keys: [role]}\nsegments:\n  - name: shop\n    allow:\n      - {id: a, from: {role: web}, to: {role: api}, on: tcp/80}\n"


def call(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RETINUE_")} | {"NO_COLOR": "1"}
    done = subprocess.run([str(BIN / argv[0]), *argv[1:]], capture_output=True, text=True, env=clean | env, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """(exit status, code) of a command that printed nothing but an error as JSON."""
    assert done.stdout == ""
    return done.returncode, json.loads(done.stderr.splitlines()[-1])["error"]["code"]


class Ca:
    """A CA on loopback."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = {"RETINUE_CA_DIR": str(directory)}
        self.json("init", "--trust-domain", "bad.test")
        self.server = subprocess.Popen(
            [str(BIN / "retinue-ca"), "serve", "--listen", "127.0.0.1:0", "--json"], env=os.environ | self.env,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.server.stdout is not None
        self.url = f"https://{json.loads(self.server.stdout.readline())['listen']}"

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return call("retinue-ca", *args, "--json", **self.env)

    def json(self, *args: str) -> Any:
        done = self.run(*args)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def state(self) -> Any:
        """All that a refused request must leave alone."""
        return [AdminClient(self.directory).raw("GET", path) for path in ("/v1/hosts", "/v1/workloads", "/v1/policy/history")]

    def close(self) -> None:
        self.server.terminate()
        self.server.wait(30)
        assert self.server.stdout is not None
        self.server.stdout.close()


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ca]:
    made = Ca(tmp_path_factory.mktemp("ca") / "d")
    yield made
    made.close()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ca]:
    made = Ca(tmp_path_factory.mktemp("other") / "d")
    yield made
    made.close()


def enroll(ca: Ca, token: str, where: Path) -> subprocess.CompletedProcess[str]:
    return call("retinue", "enroll", "--ca", ca.url, "--state-dir", str(where), "--underlay", "127.0.0.1:51820", "--json", RETINUE_TOKEN=token)


def test_tokens(ca: Ca, other: Ca, tmp_path: Path) -> None:
    good = ca.json("token", "create", "--host", "good")["token"]
    assert enroll(ca, good, tmp_path / "good").returncode == 0
    before = ca.state()
    fresh = ca.json("token", "create", "--host", "fresh")["token"]
    head, secret, pin = fresh.rsplit(".", 2)
    swapped = "A" if secret[0] != "A" else "B"
    for number, (token, answer) in enumerate([
        (good, (1, "token.used")),
        (f"{head}.{swapped}{secret[1:]}.{pin}", (1, "token.refused")),
        (f"{head}.{secret}.{'0' * 64}", (1, "ca.fingerprint")),
        (other.json("token", "create", "--host", "fresh")["token"], (1, "ca.fingerprint")),
        ("nonsense", (2, "token.malformed")),
    ]):  # fmt: skip
        done = enroll(ca, token, tmp_path / str(number))
        assert refused(done) == answer, token
        assert secret[5:] not in done.stderr
        assert not (tmp_path / str(number) / "endpoint.json").exists()
    assert ca.state() == before
    assert enroll(ca, fresh, tmp_path / "fresh").returncode == 0, "positive control: the refusals did not use it up"


def test_an_expired_token(ca: Ca, tmp_path: Path) -> None:
    before = ca.state()
    made = ca.json("token", "create", "--host", "late", "--ttl", "1")
    subprocess.run(["sleep", "2"], check=True)  # the CA's clock has whole seconds
    assert refused(enroll(ca, made["token"], tmp_path / "s")) == (1, "token.expired")
    assert ca.state() == before


def test_an_enrolment_is_not_overwritten(ca: Ca, tmp_path: Path) -> None:
    assert enroll(ca, ca.json("token", "create", "--host", "once")["token"], tmp_path / "s").returncode == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir() if p.is_file()}
    again = ca.json("token", "create", "--host", "twice")["token"]
    assert refused(enroll(ca, again, tmp_path / "s")) == (1, "enroll.exists")
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir() if p.is_file()} == files
    assert refused(ca.run("token", "create", "--host", "once")) == (1, "host.exists")


@pytest.mark.parametrize(("args", "answer"), [
    (["workload", "add", "taken"], (1, "workload.exists")),
    (["workload", "add", "x", "--host", "nobody"], (1, "host.unknown")),
    (["workload", "move", "nobody", "--to", "nobody"], (1, "workload.unknown")),
    (["workload", "move", "taken", "--to", "nobody"], (1, "host.unknown")),
    (["workload", "revoke", "taken", "--instance", "7"], (1, "workload.instance")),
    (["host", "revoke", "nobody"], (1, "host.unknown")),
    (["workload", "add", "Bad Name"], (2, "name.workload")),
    (["workload", "add"], (2, "usage")),
    (["workload", "ad", "x"], (2, "usage")),
    (["token", "create", "--host", "x", "--ttl", "0"], (2, "usage")),
])  # fmt: skip
def test_names(ca: Ca, args: list[str], answer: tuple[int, str]) -> None:
    ca.run("workload", "add", "taken")
    before = ca.state()
    assert refused(ca.run(*args)) == answer
    assert ca.state() == before


@pytest.mark.parametrize(("old", "new", "place"), [
    ("tcp/80}", "tcp/0}", "6:"),
    ("allow:", "alow:", "5:5"),
    ("role: web", "rle: web", "6:"),
    ("meshpolicy: 1", "meshpolicy: [", "3:1"),
])  # fmt: skip
def test_a_malformed_policy_names_its_place_and_changes_nothing(ca: Ca, tmp_path: Path, old: str, new: str, place: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(POLICY)
    ca.json("policy", "apply", str(path))
    before = ca.state()
    path.write_text(POLICY.replace(old, new))
    for done in (call("retinue-ca", "policy", "apply", str(path), **ca.env), call("retinue", "policy", "check", str(path))):
        assert (done.returncode, done.stdout) == (2, "")
        assert f"p.yaml:{place}" in done.stderr
        assert "\nhint: " in done.stderr
    assert ca.state() == before


@pytest.mark.parametrize("words", [("host", "list"), ("workload", "list"), ("policy", "history"), ("audit", "list"), ("info",), ("audit", "verify")])
def test_reads_come_in_every_form(ca: Ca, words: tuple[str, ...]) -> None:
    import yaml

    forms = {f: call("retinue-ca", *words, "-o", f, **ca.env) for f in ("json", "jsonl", "yaml", "table")}
    assert {d.returncode for d in forms.values()} == {0}
    lines = [json.loads(line) for line in forms["jsonl"].stdout.splitlines()]
    whole = json.loads(forms["json"].stdout)
    assert len(lines) == (len(whole) if isinstance(whole, list) else 1)
    assert isinstance(yaml.safe_load(forms["yaml"].stdout), type(whole))
    assert forms["table"].stdout
    assert "\x1b" not in forms["table"].stdout
