"""What all our command lines have in common: help, examples, usage errors, closed pipes, and documents that tell the truth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
PROGRAMS = ("retinue", "retinue-ca", "retinue-agent", "retinue-sidecar", "retinue-gateway", "retinue-engine", "retinue-broker")
HEAVY = re.compile(r"\| +(pydantic|rich|aiohttp|pyroute2|sqlalchemy|cryptography|yaml|structlog|asyncio)\n")


def call(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RETINUE_")} | {"COLUMNS": "100"}
    return subprocess.run([str(BIN / argv[0]), *argv[1:]], capture_output=True, text=True, env=clean | env, timeout=60, check=False)


def tree(program: str) -> dict[tuple[str, ...], Any]:
    """Every command of a typer program by its words."""
    import typer

    import ca.cli
    import mesh.cli

    def walk(command: Any, words: tuple[str, ...], context: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield words, command
        context = command.context_class(command, info_name=words[-1], parent=context)
        for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
            yield from walk(command.get_command(context, name), (*words, name), context)

    app = {"retinue": mesh.cli.app, "retinue-ca": ca.cli.app}[program]
    return dict(walk(typer.main.get_command(app), (program,), None))


@pytest.fixture(scope="module")
def trees() -> dict[tuple[str, ...], Any]:
    return tree("retinue") | tree("retinue-ca")


def test_every_command_explains_itself(trees: dict[tuple[str, ...], Any]) -> None:
    from identity.cliout import help_text

    assert len(trees) > 40
    for words, command in trees.items():
        text = help_text(command, command.context_class(command, info_name=" ".join(words), terminal_width=200))
        assert not re.search(r"<(str|int|float|path|list\[.*?\]|int range|float range)>", text), (words, text)
        if not hasattr(command, "list_commands"):
            assert " ".join(words) in command.epilog, words
            assert "Example: " in command.epilog, words


def test_what_is_read_can_be_read_by_programs(trees: dict[tuple[str, ...], Any]) -> None:
    others = {"serve", "signer", "demo", "run", "fmt", "schema", "watch", "bundle"}  # the last two say JSON only
    for words, command in trees.items():
        if hasattr(command, "list_commands") or words[-1] in others:
            continue
        flags = {flag for param in command.params for flag in param.opts}
        assert {"-o", "--output", "--json"} <= flags, words


@pytest.mark.parametrize("argv", [
    ("retinue", "--help"), ("retinue", "run", "--help"), ("retinue", "status", "-h"), ("retinue", "policy", "check", "--help"), ("retinue", "demo", "--help"),
    ("retinue-ca", "--help"), ("retinue-ca", "workload", "move", "--help"), ("retinue-agent", "--help"), ("retinue-sidecar", "--help"),
], ids=" ".join)  # fmt: skip
def test_help_is_light(argv: tuple[str, ...]) -> None:
    """The time of help is the time of imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", str(BIN / argv[0]), *argv[1:]], capture_output=True, text=True, check=True)
    assert "Example" in done.stdout or "Start with" in done.stdout
    assert HEAVY.findall(done.stderr) == []


def test_help_after_other_words_is_help_and_a_command_of_run_keeps_its_own() -> None:
    assert call("retinue", "explain", "web", "--help").stdout.startswith("Usage: retinue explain [OPTIONS] SRC DST [PORT]\n")
    done = call("retinue", "run", "--as", "web", "--", "curl", "--help", RETINUE_RUN_DIR="/nonexistent")
    assert (done.returncode in {3, 4}, done.stdout) == (True, ""), done


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_an_example(program: str) -> None:
    done = call(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert program in done.stdout.split("xample", 1)[-1] or "Start with" in done.stdout


@pytest.mark.parametrize("argv", [("retinue",), ("retinue", "policy"), ("retinue", "svid"), ("retinue-ca",), ("retinue-ca", "token")], ids=" ".join)
def test_no_command_shows_the_commands(argv: tuple[str, ...]) -> None:
    done = call(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Usage: {' '.join(argv)} ")
    assert "\nCommands:\n" in done.stderr


@pytest.mark.parametrize(("argv", "words"), [
    (("retinue", "statsu"), "Did you mean 'status'"),
    (("retinue", "policy", "chek"), "'check'"),
    (("retinue-ca", "workload", "mov"), "Did you mean 'move'"),
    (("retinue", "status", "--outptu", "json"), "--output"),
    (("retinue", "status", "-o", "xml"), "'table', 'json', 'jsonl', 'yaml'"),
    (("retinue", "demo", "--kepe"), "--keep"),
    (("retinue", "demo", "now"), "now"),
    (("retinue", "run", "--as", "web"), "COMMAND"),
    (("retinue", "run", "--", "true"), "--as"),
    (("retinue", "policy", "check"), "no policy file"),
    (("retinue-ca", "token", "create", "--ttl", "soon"), "--ttl"),
    (("retinue-agent", "extra"), "extra"),
    (("retinue-sidecar", "--ready-port", "x"), "--ready-port"),
    (("retinue-gateway", "--nope"), "--config"),
])  # fmt: skip
def test_usage_errors_have_one_form(argv: tuple[str, ...], words: str) -> None:
    done = call(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error[usage]: ")
    assert words in first
    assert rest[0].startswith("hint: ")
    assert "Value error" not in first
    machine = json.loads(call(*argv, "--json").stderr)["error"]
    assert machine["code"] == "usage"


@pytest.mark.parametrize("program", ["retinue", "retinue-ca"])
def test_version(program: str) -> None:
    from importlib.metadata import version

    assert call(program, "--version").stdout == f"{program} {version('retinue')}\n"


@pytest.mark.parametrize("argv", [("retinue", "--help"), ("retinue", "policy", "schema"), ("retinue-ca", "workload", "--help")], ids=" ".join)
def test_a_pipe_that_is_closed_early_is_no_error(argv: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run([str(BIN / argv[0]), *argv[1:]], stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (141, "")


DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/**/*.md", "examples/*/README.md")
WORD = re.compile(r"(?:sudo )?((?:retinue(?:-[a-z]+)?|make)(?: [^`\n#|&;]*)?)")


def documented(text: str) -> Iterator[list[str]]:
    """The commands of a document: whole code spans and lines of code blocks that begin with one of ours."""
    code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        code += block.splitlines()
    code += re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    for piece in code:
        found = WORD.fullmatch(piece.split(" #")[0].split(" || ")[0].strip().removesuffix("&").strip())
        if found:
            yield found[1].split()


def test_every_documented_command_exists(repository: Path, trees: dict[tuple[str, ...], Any]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    for pattern in DOCUMENTS:
        for path in sorted(repository.glob(pattern)):
            if path.parent.name == "reference":
                continue  # generated from the commands
            for words in documented(path.read_text()):
                seen += 1
                where = f"{path.relative_to(repository)}: {' '.join(words)}"
                if words[0] == "make":
                    assert words[1:2] == [] or words[1] in targets, where
                    continue
                assert words[0] in PROGRAMS, where
                _check_words(words, trees, where)
    assert seen > 25


def _check_words(words: list[str], trees: dict[tuple[str, ...], Any], where: str) -> None:
    if (words[0],) not in trees:
        return
    at = (words[0],)
    rest = words[1:]
    while rest and hasattr(trees[at], "list_commands") and not rest[0].startswith("-"):
        for name in rest[0].split("|"):
            if re.fullmatch(r"[a-z-]+", name):
                assert (*at, name) in trees, where
        if (*at, rest[0]) not in trees:
            return
        at, rest = (*at, rest[0]), rest[1:]
    flags = {flag for param in trees[at].params for flag in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
    for word in rest:
        if word == "--":
            break
        if word.startswith("--"):
            assert word.partition("=")[0] in flags, where
