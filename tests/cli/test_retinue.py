"""`retinue` and the endpoint daemons as programs: help, exit statuses, errors for people and for machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
HEAVY = {"aiohttp", "asyncio", "pydantic", "pyroute2", "rich", "cryptography", "sqlalchemy", "structlog", "yaml"}


def call(*argv: str, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RETINUE_")} | {"COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(
        [str(BIN / argv[0]), *argv[1:]], capture_output=True, text=True, env=clean | env, input=stdin, timeout=60, check=False
    )


COMMANDS = [
    ("status",), ("attach",), ("detach",), ("enroll",), ("explain",), ("ping",), ("svid", "fetch"), ("doctor",), ("down",), ("run",),
]  # fmt: skip


def test_help_lists_every_command():
    done = call("retinue", "--help")
    assert done.returncode == 0
    for words in (*COMMANDS, ("policy",), ("demo",)):
        assert f"\n  {words[0]} " in done.stdout, words


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(words):
    done = call("retinue", *words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Example: retinue {' '.join(words)}" in done.stdout


@pytest.mark.parametrize("name", ["retinue-agent", "retinue-sidecar"])
def test_daemons_have_help_with_an_example(name):
    done = call(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Example: {name}" in done.stdout
    assert "RETINUE_STATE_DIR" in done.stdout


@pytest.mark.parametrize("module", ["mesh.cli", "mesh.agent", "mesh.sidecar"])
def test_help_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(' '.join(sorted({HEAVY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("argv", "status", "code"),
    [
        (["nonsense"], 2, "usage"),
        (["status", "--nonsense"], 2, "usage"),
        (["explain", "a", "b"], 2, "usage"),
        (["explain", "a", "b", "tcp/0"], 2, "port.range"),
        (["explain", "a", "b", "90-80"], 2, "port.form"),
        (["attach", "web"], 2, "usage"),
        (["enroll", "--ca", "https://127.0.0.1:1"], 2, "token.missing"),
        (["enroll", "--ca", "https://127.0.0.1:1", "--token-file", "/no/such/file"], 2, "token.file"),
        (["status"], 3, "agent.unreachable"),
        (["detach", "web"], 3, "agent.unreachable"),
        (["down", "--keep-traffic"], 3, "agent.unreachable"),
    ],
)
def test_errors_have_a_status_a_code_and_a_machine_form(tmp_path, argv, status, code):
    env = {"RETINUE_RUN_DIR": str(tmp_path), "RETINUE_STATE_DIR": str(tmp_path / "state")}
    done = call("retinue", *argv, **env)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.startswith(f"error[{code}]: ")
    machine = call("retinue", *argv, "-o", "json", **env)
    assert machine.returncode == status
    assert json.loads(machine.stderr)["error"]["code"] == code


@pytest.mark.parametrize("token", ["", "x", "rt1.a.b.c", "rt2." + "A" * 60, "rt1.a." + "A" * 43 + ".XYZ", "\udcff" * 5])
def test_a_malformed_token_is_refused_and_never_repeated(tmp_path, token):
    (tmp_path / "token").write_bytes(token.encode("utf-8", "surrogateescape"))
    done = call("retinue", "enroll", "--ca", "https://127.0.0.1:1", "--token-file", str(tmp_path / "token"), "--state-dir", str(tmp_path / "s"))
    assert done.returncode == 2
    assert "error[token.malformed]" in done.stderr
    assert "A" * 20 not in done.stderr
    assert not (tmp_path / "s" / "endpoint.json").exists()


def test_a_token_on_stdin_reaches_for_the_ca(tmp_path):
    token = "rt1.a." + "A" * 43 + "." + "0" * 64
    done = call(
        "retinue", "enroll", "--ca", "https://127.0.0.1:1", "--token-file", "-", "--state-dir", str(tmp_path / "s"), stdin=token
    )
    assert (done.returncode, "error[ca.unreachable]" in done.stderr) == (3, True), done


def test_no_option_takes_a_secret():
    for words in (("retinue", "enroll"), ("retinue-sidecar",)):
        options = [w for w in call(*words, "--help").stdout.split() if w.startswith("--")]
        assert "--token-file" in options
        assert "--token" not in options


@pytest.mark.parametrize("name", ["retinue-agent", "retinue-sidecar"])
@pytest.mark.parametrize(
    ("args", "status"), [(["--listen-port", "0"], 2), (["--mtu", "9"], 2), (["--device", "x"], 2), (["--interface", "sixteencharacters"], 2),
                         (["--log-level", "loud"], 2)]
)  # fmt: skip
def test_daemons_refuse_bad_options(tmp_path, name, args, status):
    done = call(name, "--state-dir", str(tmp_path / "s"), "--run-dir", str(tmp_path / "r"), *args)
    assert (done.returncode, "error[usage]" in done.stderr) == (status, True), done
    assert list(tmp_path.iterdir()) == []


def test_an_agent_without_an_enrolment_says_what_to_do(tmp_path):
    done = call("retinue-agent", "--state-dir", str(tmp_path / "s"), "--run-dir", str(tmp_path / "r"))
    assert (done.returncode, "retinue enroll" in done.stderr) == (3, True)


def test_the_policy_commands_are_here():
    done = call("retinue", "policy", "--help")
    assert done.returncode == 0
    for word in ("check", "test", "explain", "matrix", "diff", "import"):
        assert f"\n  {word} " in done.stdout
