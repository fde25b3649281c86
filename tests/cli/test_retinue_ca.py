"""`retinue-ca` as a person meets it: real processes, their output, exit statuses and files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WAIT = 60.0
POLICY = """meshpolicy: 1
labels: {keys: [role]}
segments:
  - name: shop
    allow:
      - {id: web-api, from: {role: web}, to: {role: api}, on: tcp/8080}
"""


def command(*args: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'retinue-ca'; from ca.cli import main; main()",
        *args,
    ]


class CA:
    """A directory and, while `start`ed, a server on it."""

    def __init__(self, directory: Path, repository: Path) -> None:
        self.directory = directory
        self.env = {
            "PATH": os.environ["PATH"],
            "RETINUE_CA_DIR": str(directory),
            "PYTHONPATH": str(repository),
        }
        self.server: subprocess.Popen[str] | None = None

    def run(self, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*args), env=self.env, capture_output=True, text=True, timeout=WAIT, input=stdin
        )
        assert "Traceback" not in done.stderr
        return done

    def json(self, *args: str) -> Any:
        done = self.run(*args, "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fails(self, *args: str) -> tuple[int, dict[str, str]]:
        """Exit status and error."""
        done = self.run(*args, "--json")
        assert done.stdout == ""
        error: dict[str, str] = json.loads(done.stderr.strip().splitlines()[-1])["error"]
        return done.returncode, error

    def start(self, *args: str) -> dict[str, str]:
        argv = command("serve", "--listen", "127.0.0.1:0", "--json", *args)
        log = (self.directory.parent / "serve.log").open("w")
        self.server = subprocess.Popen(argv, env=self.env, stdout=subprocess.PIPE, stderr=log, text=True)
        log.close()
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, self.log()
        ready: dict[str, str] = json.loads(line)
        return ready

    def log(self) -> str:
        return (self.directory.parent / "serve.log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.server is not None
        self.server.send_signal(number)
        status = self.server.wait(WAIT)
        assert self.server.stdout is not None
        self.server.stdout.close()
        self.server = None
        return status


@pytest.fixture
def ca(tmp_path: Path, repository: Path) -> Iterator[CA]:
    made = CA(tmp_path / "ca", repository)
    yield made
    if made.server is not None:
        made.stop(signal.SIGKILL)


@pytest.fixture
def up(ca: CA) -> CA:
    ca.json("init", "--trust-domain", "cli.test")
    ca.start()
    return ca


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[CA]:
    """One server for the tests that change nothing."""
    made = CA(tmp_path_factory.mktemp("shared") / "ca", repository)
    made.json("init", "--trust-domain", "cli.test")
    made.start()
    yield made
    made.stop()


def test_from_nothing_to_a_policy_and_back_down(ca: CA, tmp_path: Path) -> None:
    made = ca.json("init", "--trust-domain", "cli.test")
    ready = ca.start()
    assert (ready["event"], ready["trust_domain"], ready["root_fingerprint"]) == (
        "ready",
        "cli.test",
        made["root_fingerprint"],
    )
    assert ca.json("info")["listen"] == ready["listen"]
    token = ca.json("token", "create", "--host", "a")
    assert token["token"].startswith("rt1.")
    assert token["token"].endswith(made["root_fingerprint"])
    assert ca.json("workload", "add", "shop/web", "--label", "role=web")["state"] == "unplaced"
    assert ca.json("workload", "add", "shop/api", "-l", "role=api", "--fence", "strict")["fence"] == "strict"
    (tmp_path / "p.yaml").write_text(POLICY)
    dry = ca.json("policy", "apply", str(tmp_path / "p.yaml"), "--dry-run")
    assert (dry["applied"], dry["gained"]) == (
        False,
        [{"src": "shop/web", "dst": "shop/api", "ports": "tcp/8080"}],
    )
    assert ca.json("policy", "apply", str(tmp_path / "p.yaml"), "--author", "ann")["revision"] == 1
    assert ca.json("policy", "show")["files"] == [{"name": "p.yaml", "text": POLICY}]
    assert [r["author"] for r in ca.json("policy", "history")] == ["ann"]
    assert ca.json("explain", "shop/web", "shop/api", "8080")["verdict"] == "allow"
    assert ca.json("explain", "shop/api", "shop/web", "8080")["verdict"] == "deny"
    assert ca.json("workload", "revoke", "shop/api")["state"] == "revoked"
    found = ca.json("audit", "verify")
    head = f"{found['size']}:{found['root']}"
    assert ca.stop() == 0
    assert not (ca.directory / "admin.sock").exists()
    ca.start()
    assert [w["state"] for w in ca.json("workload", "list")] == ["revoked", "unplaced"]
    assert ca.json("audit", "verify", "--head", head)["size"] >= found["size"]
    assert ca.stop(signal.SIGINT) == 0


def test_what_people_see(up: CA, tmp_path: Path) -> None:
    up.run("workload", "add", "web", "-l", "role=web")
    up.run("workload", "add", "api", "-l", "role=api")
    (tmp_path / "p.yaml").write_text(POLICY)
    assert "+ web -> api  tcp/8080" in up.run("policy", "apply", str(tmp_path / "p.yaml")).stdout
    assert up.run("explain", "web", "api", "8080").stdout.startswith("ALLOW ")
    assert "would flip it" in up.run("explain", "api", "web", "8080").stdout
    assert "limit:" not in up.run("explain", "web", "api", "8080").stdout
    limits = "from: {role: web, process: uid:33}, to: {role: api}, on: tcp/8080, max_rate: 1Mbit, idle_timeout: 5m"
    (tmp_path / "p.yaml").write_text(POLICY.replace("from: {role: web}, to: {role: api}, on: tcp/8080", limits))
    assert up.run("policy", "apply", str(tmp_path / "p.yaml")).returncode == 0
    said = [line.strip() for line in up.run("explain", "web", "api", "8080").stdout.splitlines() if "limit:" in line]
    assert sorted(said) == [
        "limit: at most 1000000 bit/s each way by web-api", "limit: ended after 300 s of silence by web-api",
        "limit: only uid 33 at the source by web-api",
    ]  # fmt: skip
    assert up.json("explain", "web", "api", "8080")["conditions"] == [line.removeprefix("limit: ") for line in said]
    listed = up.run("workload", "list").stdout.splitlines()
    assert listed[0].split()[:3] == ["NAME", "INSTANCE", "STATE"]
    assert len(listed) == 3
    for args in (
        ["host", "list"],
        ["info"],
        ["policy", "show"],
        ["policy", "history"],
        ["audit", "list"],
        ["audit", "verify"],
    ):
        done = up.run(*args)
        assert (done.returncode, bool(done.stdout)) == (0, True)
    assert len(up.run("workload", "list", "-o", "jsonl").stdout.splitlines()) == 2
    assert up.run("workload", "list", "-o", "yaml").stdout.startswith("- name: api")


def test_a_token_is_printed_once_and_alone(up: CA, tmp_path: Path) -> None:
    done = up.run("token", "create", "--host", "a")
    assert done.stdout.count("\n") == 1
    secret = done.stdout.split(".")[2]
    assert secret not in done.stderr
    file = tmp_path / "a.token"
    done = up.run("token", "create", "--host", "b", "--out", str(file))
    assert done.stdout == ""
    assert file.stat().st_mode & 0o777 == 0o600
    secrets = [secret, file.read_text().split(".")[2]]
    up.stop()
    for path in (*up.directory.iterdir(), up.directory.parent / "serve.log"):
        for one in secrets:
            assert one.encode() not in path.read_bytes()


@pytest.mark.parametrize(("args", "status", "code"), [
    (["host", "revoke", "nobody"], 1, "host.unknown"),
    (["workload", "add", "../x"], 2, "name.workload"),
    (["workload", "add", "x", "--label", "novalue"], 2, "label.form"),
    (["workload", "add", "x", "--fence", "wooden"], 2, "workload.fence"),
    (["workload", "add", "x", "--host", "nobody"], 1, "host.unknown"),
    (["workload", "move", "x", "--to", "a"], 1, "workload.unknown"),
    (["workload", "revoke", "x"], 1, "workload.unknown"),
    (["token", "create"], 2, "token.subject"),
    (["token", "create", "--host", "A B"], 2, "name.host"),
    (["token", "create", "--workload", "none"], 1, "workload.unknown"),
    (["policy", "show"], 1, "policy.none"),
    (["policy", "apply", "/nonexistent.yaml"], 2, "policy.file"),
    (["policy", "apply", "/"], 2, "policy.file"),
    (["explain", "a", "b", "80"], 1, "workload.unknown"),
    (["audit", "verify", "--head", "00ff"], 2, "log.head"),
    (["audit", "verify", "--head", f"999999:{'0' * 64}"], 78, "log.cut"),
    (["init", "--trust-domain", "other.test"], 1, "ca.exists"),
    (["serve"], 1, "serve.running"),
])  # fmt: skip
def test_refusals(shared: CA, args: list[str], status: int, code: str) -> None:
    got, error = shared.fails(*args)
    assert (got, error["code"]) == (status, code)


def test_a_bad_policy_names_its_place(shared: CA, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(POLICY.replace("web-api", "web api"))
    status, error = shared.fails("policy", "apply", str(bad))
    assert (status, error["file"], error["line"]) == (2, "bad.yaml", 6)
    assert error["hint"]
    people = shared.run("policy", "apply", str(bad))
    assert "bad.yaml:6:" in people.stderr
    bad.write_bytes(b"meshpolicy: 1\n# \xff\xfe")
    status, error = shared.fails("policy", "apply", str(bad))
    assert (status, error["code"]) == (2, "file.encoding")
    assert "bad.yaml:2:3" in error["message"]
    assert error["hint"]


@pytest.mark.parametrize("args", [["info"], ["host", "list"], ["token", "create", "--host", "a"]])
def test_no_server(ca: CA, args: list[str]) -> None:
    status, error = ca.fails(*args)
    assert (status, error["code"]) == (3, "ca.down")
    assert "retinue-ca serve" in error["hint"]


def test_no_directory(ca: CA) -> None:
    assert ca.fails("serve")[1]["code"] == "ca.missing"
    assert ca.fails("init", "--trust-domain", "Not A Name")[0] == 2
    assert not ca.directory.exists()


def test_a_taken_port(tmp_path: Path, repository: Path) -> None:
    other = CA(tmp_path / "other", repository)
    other.json("init", "--trust-domain", "other.test")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, error = other.fails("serve", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (status, error["code"]) == (1, "serve.port")


@pytest.mark.parametrize(("file", "content", "code"), [
    ("ca.db", b"", "store.damaged"),
    ("ca.db", b"SQLite format 3\0" + bytes(4096), "store.damaged"),
    ("authority.json", b"{}", None),
    ("records.key", b"", None),
    ("root.pem", b"nonsense", None),
])  # fmt: skip
def test_damaged_files_are_told_and_kept(ca: CA, file: str, content: bytes, code: str | None) -> None:
    ca.json("init", "--trust-domain", "cli.test")
    (ca.directory / file).write_bytes(content)
    status, error = ca.fails("serve", "--listen", "127.0.0.1:0")
    assert status == 78
    assert code in {None, error["code"]}
    assert (ca.directory / file).read_bytes() == content


def test_a_readable_key_is_refused(ca: CA) -> None:
    ca.json("init", "--trust-domain", "cli.test")
    (ca.directory / "intermediate.key").chmod(0o644)
    status, error = ca.fails("serve", "--listen", "127.0.0.1:0")
    assert (status, error["code"]) == (78, "state.key_mode")
    assert "chmod 600" in error["hint"]


def test_a_killed_server_starts_again(up: CA) -> None:
    up.json("workload", "add", "web")
    assert up.stop(signal.SIGKILL) == -signal.SIGKILL
    up.start()
    assert [w["name"] for w in up.json("workload", "list")] == ["web"]


def test_a_backup_is_restored_after_a_bad_day(up: CA, tmp_path: Path) -> None:
    up.json("workload", "add", "web", "--label", "role=web")
    made = up.json("backup", str(tmp_path / "b.db"))
    assert made["trust_domain"] == "cli.test"
    up.json("workload", "revoke", "web")
    status, error = up.fails("restore", str(tmp_path / "b.db"), "--new-timeline")
    assert (status, error["code"]) == (1, "serve.running")
    up.stop(signal.SIGKILL)
    (up.directory / "ca.db").write_bytes((tmp_path / "b.db").read_bytes())
    for rest in ("ca.db-wal", "ca.db-shm"):
        (up.directory / rest).unlink(missing_ok=True)
    status, error = up.fails("serve", "--listen", "127.0.0.1:0")
    assert (status, error["code"]) == (78, "store.backup")
    status, error = up.fails("restore", str(tmp_path / "b.db"))
    assert (status, error["code"]) == (1, "restore.timeline")
    done = up.run("restore", str(tmp_path / "b.db"), "--new-timeline")
    assert done.returncode == 0
    assert "cli.test restored" in done.stdout
    up.start()
    assert [w["state"] for w in up.json("workload", "list")] == ["unplaced"]
    assert up.json("info")["timeline"] not in {made["timeline"], ""}
    assert any(e["action"] == "restore" for e in up.json("audit", "list"))
    up.json("audit", "verify")


def test_the_service_manager_is_told(ca: CA, tmp_path: Path) -> None:
    ca.json("init", "--trust-domain", "cli.test")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(WAIT)
        ca.env["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        ca.start()
        assert manager.recv(4096).startswith(b"READY=1")
        ca.stop()
        assert manager.recv(4096) == b"STOPPING=1"


def test_an_error_for_people(shared: CA) -> None:
    done = shared.run("workload", "move", "x", "--to", "a")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0] == "error[workload.unknown]: no workload named 'x'"
    assert done.stderr.splitlines()[1].startswith("hint: ")


def test_logs_are_json_lines(up: CA) -> None:
    up.stop()
    for line in up.log().splitlines():
        assert {"event", "level", "timestamp"} <= json.loads(line).keys()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_administer(up: CA) -> None:
    """The directory keeps others out; with the directory opened by mistake, the socket's mode still does."""
    program = """import os, sys
from pathlib import Path
from ca.client import AdminClient
from identity.errors import RetinueError
os.setuid(65534)
try:
    AdminClient(Path(sys.argv[1])).raw("GET", "/v1/info")
except RetinueError as e:
    print(e.code, e.exit)
"""

    def info() -> str:
        argv = [sys.executable, "-c", program, str(up.directory)]
        done = subprocess.run(argv, env=up.env, capture_output=True, text=True, timeout=WAIT)
        return done.stdout.strip() or done.stderr

    for parent in (up.directory.parent, up.directory):
        parent.chmod(0o755)
    assert info() == "admin.user 4"
    (up.directory / "admin.sock").chmod(0o777)
    assert info() == "admin.user 4"


def test_every_help_has_an_example() -> None:
    from typer.main import get_command

    from ca.cli import app

    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, sub in getattr(node, "commands", {}).items():
            yield from walk(sub, f"{path} {name}")
        if not getattr(node, "commands", None):
            yield path, node

    found = dict(walk(get_command(app), "retinue-ca"))
    assert len(found) >= 16
    for path, node in found.items():
        assert node.epilog.startswith(f"Example: {path}"), path
        assert node.help


def test_help_needs_nothing_heavy(ca: CA) -> None:
    program = "import sys; from ca import cli; print([m for m in ('aiohttp', 'sqlalchemy', 'pydantic', 'cryptography', 'yaml', 'rich') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=ca.env, capture_output=True, text=True, timeout=WAIT
    )
    assert done.stdout.strip() == "[]"
