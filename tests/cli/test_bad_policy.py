"""All that a bad policy gets, through the programs that people use: its position, a code and a hint, a documented exit status,
and the policy in force is the one from before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_bad_input import Ca, call

HEAD = "meshpolicy: 1\nlabels: {keys: [role]}\n"
RULES = HEAD + "segments:\n  - name: shop\n    allow:\n"


def rule(ident: str = "a", src: str = "{role: web}", dst: str = "{role: api}", on: str = "tcp/80") -> str:
    return f"      - {{id: {ident}, from: {src}, to: {dst}, on: {on}}}\n"


GOOD = RULES + rule()
BAD: dict[str, tuple[str, str, str]] = {
    "unknown key": (RULES.replace("allow:", "alow:") + rule(), "policy.unknown_key", "5:5"),
    "unknown key of a rule": (RULES + rule().replace("on:", "onn:"), "policy.unknown_key", "6:53"),
    "unknown label": (RULES + rule(src="{rle: web}"), "policy.unknown_label", "6:24"),
    "unknown group": (RULES + rule(src="webs"), "policy.unknown_group", "6:23"),
    "address for a subject": (RULES + rule(src="10.0.0.0/33"), "policy.unknown_group", "6:23"),
    "cycle": (HEAD + "groups:\n  a: {any: [b, {role: x}]}\n  b: {any: [a]}\n", "policy.cycle", "5:13"),
    "empty group": (HEAD + "groups:\n  a: {}\n", "policy.empty_selector", "4:6"),
    "group of an empty list": (HEAD + "groups:\n  a: []\n", "policy.empty_selector", "4:6"),
    "group of nothing": (HEAD + "groups:\n  a:\n", "policy.empty_group", "4:3"),
    "empty selector": (RULES + rule(dst="{}"), "policy.empty_selector", "6:40"),
    "empty label": (RULES + rule(dst="{role: []}"), "policy.empty", "6:47"),
    "duplicate id": (RULES + rule() + rule(dst="{role: db}"), "policy.duplicate", "7:14"),
    "duplicate key": (RULES + rule().replace("id: a,", "id: a, id: b,"), "policy.duplicate_key", "6:17"),
    "port 0": (RULES + rule(on="tcp/0"), "port.range", "6:57"),
    "port 65536": (RULES + rule(on="tcp/65536"), "port.range", "6:57"),
    "reversed ports": (RULES + rule(on="tcp/90-80"), "port.reversed", "6:57"),
    "no port": (RULES + rule(on="tcp/http"), "port.form", "6:57"),
    "outside the scope": (RULES.replace("labels", "scope: shop\nlabels") + rule(src="{workload: other/web}"), "policy.outside_scope", "7:23"),
    "process that is none": (RULES + rule(src="{role: web, process: 'unit:a/b'}"), "policy.process", "6:44"),
    "empty file": ("", "policy.empty", "1:1"),
    "no version": ("segments: []\n", "policy.version", "1:1"),
    "other version": ("meshpolicy: 2\n", "policy.version", "1:13"),
    "not YAML": ("meshpolicy: [\n", "policy.syntax", "2:1"),
    "control characters": ("meshpolicy: 1\n#\x01\n", "policy.syntax", "2:2"),
    "tabs": ("meshpolicy: 1\nsegments:\n\t- name: x\n", "policy.syntax", "3:1"),
    "two documents": (GOOD + "---\nmeshpolicy: 1\n", "policy.documents", "7:1"),
    "tag": ("meshpolicy: 1\nsegments: !!python/object/apply:os.system ['id']\n", "policy.tag", "2:11"),
    "alias bomb": (
        "meshpolicy: 1\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefg", "bcdefgh", strict=True)),
        "policy.alias", "2:4",
    ),
    "deep lists": ("meshpolicy: 1\nsegments: " + "[" * 5000 + "]" * 5000 + "\n", "policy.too_deep", "2:34"),
    "deep maps": ("meshpolicy: 1\ngroups:\n  a: " + "{not: " * 3000 + "{role: x}" + "}" * 3000 + "\n", "policy.too_deep", "3:138"),
    "10 MB": ("meshpolicy: 1\n" + "# a\n" * 2_600_000, "policy.too_large", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ca]:
    directory = tmp_path_factory.mktemp("ca")
    made = Ca(directory / "d")
    (directory / "good.yaml").write_text(GOOD)
    made.json("policy", "apply", str(directory / "good.yaml"))
    yield made
    made.close()


def said(done: Any, code: str, place: str, status: int) -> None:
    """One error with its code, its position and what to do, and nothing else."""
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, done.stdout) == (status, ""), done.stdout + done.stderr
    assert lines[0].startswith(f"error[{code}]: "), lines
    assert place in lines[0]
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file(ca: Ca, tmp_path: Path, name: str) -> None:
    text, code, place = BAD[name]
    path = tmp_path / "p.yaml"
    path.write_text(text)
    before = ca.state()
    place = f"{path.name}:{place}: " if place else path.name
    said(call("retinue", "policy", "check", str(path)), code, place, 2)
    said(call("retinue-ca", "policy", "apply", str(path), **ca.env), code, place, 2)
    assert ca.state() == before


def test_text_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"meshpolicy: 1\n# caf\xe9\n")
    said(call("retinue", "policy", "check", str(path)), "file.encoding", "p.yaml:2:6: ", 2)


NETWORK_POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: x}
spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}
"""
SOURCES: dict[str, tuple[str, str, str, str]] = {
    "kubernetes": ("p.yaml", NETWORK_POLICY, "import.cidr", "p.yaml: "),
    "aws": ("p.json", json.dumps({"SecurityGroups": [{"GroupId": "sg-1", "GroupName": "a", "IpPermissionsEgress": [], "IpPermissions": [
        {"IpProtocol": "tcp", "FromPort": 80, "ToPort": 80, "IpRanges": [{"CidrIp": "10.0.0.0/33"}]}]}]}), "import.cidr", "sg-1 IpPermissions[0]: "),
    "iptables": ("p.txt", "*filter\n:INPUT DROP [0:0]\n-A INPUT -s 10.0.0.0/33 -j ACCEPT\nCOMMIT\n", "import.rule", "p.txt:3: "),
    "cisco-ios": ("p.txt", "ip access-list extended A\n permit tcp 10.0.0.256 0.0.0.255 any\n", "import.", "p.txt:2: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_an_invalid_network(tmp_path: Path, kind: str) -> None:
    """Inside the mesh there are no addresses to name; they come with what is imported, and with inventories."""
    name, text, code, place = SOURCES[kind]
    (tmp_path / name).write_text(text)
    done = call("retinue", "policy", "import", kind, str(tmp_path / name), "--out", str(tmp_path / "out"))
    assert done.returncode in {1, 2}
    assert f"error[{code}" in done.stderr
    assert place in done.stderr
    assert "\nhint: " in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_invalid_network_of_an_inventory(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(GOOD)
    (tmp_path / "i.yaml").write_text("inventory: 1\nworkloads:\n  - {name: out, nets: [10.0.0.0/33]}\n")
    said(call("retinue", "policy", "matrix", "-p", str(tmp_path / "p.yaml"), "-i", str(tmp_path / "i.yaml")), "net.form", "i.yaml:3:24: ", 2)


# ---- bundles


class Operators:
    """Alice signs policy, and mallory does not; an authority of alice's is known to the CA."""

    def __init__(self, directory: Path, ca: Ca) -> None:
        self.dir, self.ca = directory, ca
        self.public = {n: call("retinue", "policy", "key", "new", self.at(f"{n}.key")).stdout.strip() for n in ("alice", "mallory")}
        (directory / "a.yaml").write_text(
            f'trust_domain: bad.test\nsigners:\n  alice: {{key: "{self.public["alice"]}"}}\nroot: {{signers: [alice], threshold: 1}}\n'
            'scopes:\n  "": {signers: [alice], threshold: 1}\n'
        )
        self.run("authority", "new", self.at("a.yaml"), "--out", self.at("a.json"))
        self.run("authority", "sign", self.at("a.json"), "--key", self.at("alice.key"))

    def at(self, name: str) -> str:
        return str(self.dir / name)

    def run(self, *args: str) -> None:
        done = call("retinue", "policy", *args)
        assert done.returncode == 0, done.stderr

    def bundle(self, name: str, text: str, *more: str) -> str:
        (self.dir / "p.yaml").write_text(text)
        self.run("sign", self.at("p.yaml"), *more, "--key", self.at("alice.key"), "--out", self.at(name))
        return self.at(name)


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operators]:
    directory = tmp_path_factory.mktemp("ops")
    ca = Ca(directory / "d")
    made = Operators(directory, ca)
    try:
        (directory / "first.yaml").write_text(GOOD)
        ca.json("policy", "apply", made.at("first.yaml"))
        made.bundle("1", GOOD.replace("a,", "first,"), "--authority", made.at("a.json"))
        ca.json("policy", "authority", "apply", made.at("a.json"), "--bundle", made.bundle("1", GOOD, "--authority", made.at("a.json")))
        ca.json("policy", "apply", made.bundle("2", GOOD.replace("80", "81"), "--base", made.at("1")))
        made.bundle("3", GOOD.replace("80", "82"), "--base", made.at("2"))
        yield made
    finally:
        ca.close()


def edited(bundle: str, change: Callable[[dict[str, Any]], None]) -> str:
    document = json.loads(Path(bundle).read_text())
    change(document)
    Path(bundle + "-edited").write_text(json.dumps(document))
    return bundle + "-edited"


def flipped(document: dict[str, Any]) -> None:
    signatures = document["parts"][0]["signatures"]
    for key, value in signatures.items():
        signatures[key] = ("B" if value[0] == "A" else "A") + value[1:]


def stripped(document: dict[str, Any]) -> None:
    document["parts"][0]["signatures"] = {}


def partless(document: dict[str, Any]) -> None:
    document["parts"] = []


def retexted(document: dict[str, Any]) -> None:
    document["files"][0]["text"] = document["files"][0]["text"].replace("82", "83")


def refiled(document: dict[str, Any]) -> None:
    document["files"].append({"name": "more.yaml", "text": RULES + rule("more", on="any")})


@pytest.mark.parametrize(("change", "code"), [
    (flipped, "policy.signature"), (stripped, "policy.unsigned"), (partless, "policy.unsigned"), (retexted, "policy.content"), (refiled, "policy.files"),
])  # fmt: skip
def test_a_bundle_that_is_not_as_it_was_signed(ops: Operators, change: Callable[[dict[str, Any]], None], code: str) -> None:
    before, path = ops.ca.state(), edited(ops.at("3"), change)
    done = call("retinue-ca", "policy", "apply", path, **ops.ca.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error[{code}]: " in done.stderr
    assert ops.ca.state() == before
    looked = call("retinue", "policy", "bundle", path)
    assert looked.returncode == 1, "whoever looks at it first is told, too"
    if code in {"policy.content", "policy.files"}:
        signed = call("retinue", "policy", "sign", "--add", path, "--key", ops.at("alice.key"), "--out", ops.at("x"))
        assert f"error[{code}]: " in signed.stderr, "nobody signs what does not read as it counts"
        assert not Path(ops.at("x")).exists()


def test_a_policy_that_its_operators_did_not_sign(ops: Operators, tmp_path: Path) -> None:
    before = ops.ca.state()
    (tmp_path / "p.yaml").write_text(GOOD)
    said(call("retinue-ca", "policy", "apply", str(tmp_path / "p.yaml"), **ops.ca.env), "policy.unsigned", "", 1)
    done = call("retinue", "policy", "sign", str(tmp_path / "p.yaml"), "--base", ops.at("2"), "--key", ops.at("mallory.key"), "--out", ops.at("y"))
    said(done, "policy.signer_unknown", "", 1)
    assert not Path(ops.at("y")).exists()
    assert ops.ca.state() == before


def test_an_older_revision(ops: Operators) -> None:
    before = ops.ca.state()
    said(call("retinue-ca", "policy", "apply", ops.at("1"), **ops.ca.env), "policy.replay", "", 1)
    said(call("retinue-ca", "policy", "rollback", "1", **ops.ca.env), "policy.rollback_unsigned", "", 1)
    done = call("retinue-ca", "policy", "rollback", "1", "--signed", ops.at("1"), **ops.ca.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert ops.ca.state() == before


def test_half_a_bundle(ops: Operators) -> None:
    whole, half = Path(ops.at("3")).read_text(), Path(ops.at("half"))
    half.write_text(whole[: len(whole) // 2])
    before = ops.ca.state()
    done = call("retinue-ca", "policy", "apply", str(half), **ops.ca.env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "/half:" in done.stderr
    assert "error[bundle.form]: " in done.stderr
    assert "\nhint: " in done.stderr
    assert ops.ca.state() == before
