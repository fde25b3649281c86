"""The node's command line in this process: what people and programs read."""

from __future__ import annotations

import json

import pytest
import typer

from identity.cliout import Output
from identity.errors import BadInput, NotFound, Refused, TimedOut
from identity.wire.admin import ExplainReply
from identity.wire.local import Attach, Attachment, AttachReply, Condition, PeerStatus, Status, SvidFiles
from mesh import cli_node

NOW = 1_800_000_000


def status(**changes) -> Status:
    values = {
        "version": "0.1.0", "trust_domain": "test.example", "endpoint": "host-a", "kind": "host",
        "spiffe_id": "spiffe://test.example/host/host-a", "device": "userspace (retinue-engine 0.1.0)", "interface": "rtn0",
        "control": "connected", "timeline": "t1", "revision": 7, "policy_revision": 2, "policy_digest": "ab" * 32,
        "staleness_s": 1.4, "svid_expires": NOW + 3 * 3600, "firewall_elements": 12, "ready": True, "conditions": [],
        "attachments": [
            Attachment(name="web", instance=0, kind="netns", netns="blue", state="active", epoch=3, addresses=["100.64.0.1", "fd00::1"]),
            Attachment(name="shop/api", instance=1, kind="host", netns=None, state="fenced", epoch=None, addresses=[]),
        ],
        "peers": [
            PeerStatus(endpoint="host-b", tunnel_key="k", underlay="192.0.2.2:51820", allowed_ips=["100.64.0.2/32"],
                       cipher="chacha20poly1305", latest_handshake=NOW - 65, rx_bytes=2048, tx_bytes=3 << 30),
            PeerStatus(endpoint="host-c", tunnel_key="l", underlay=None, allowed_ips=[], cipher="chacha20poly1305",
                       latest_handshake=None, rx_bytes=0, tx_bytes=0),
        ],
    } | changes  # fmt: skip
    return Status.model_validate(values)


GOLDEN = """\
identity  spiffe://test.example/host/host-a (host), certificate for 3 h 0 min
control   connected, heartbeat 1 s ago
state     revision 7 of timeline t1
policy    revision 2, digest abababababab
device    userspace (retinue-engine 0.1.0), rtn0, 12 firewall elements
ready     yes

INSTANCE    STATE   EPOCH  PLACE  ADDRESSES
web/0       active  3      blue   100.64.0.1 fd00::1
shop/api/1  fenced  -      host

PEER    UNDERLAY         HANDSHAKE  RECEIVED  SENT     ALLOWED
host-b  192.0.2.2:51820  65 s ago   2.0 KiB   3.0 GiB  100.64.0.2/32
host-c  -                never      0 B       0 B      (warm)
"""

EMPTY = """\
identity  spiffe://test.example/host/host-a (host), certificate for expired
control   disconnected, heartbeat never
state     nothing received yet
policy    none: nothing is permitted
device    userspace (retinue-engine 0.1.0), rtn0, 12 firewall elements
ready     no

CONDITION  SEVERITY  TEXT
x.y        error     bad \\u001b[31m news

No instance is attached here.

No tunnels: policy permits no pair with another host.
"""


def test_status_for_people(capsys):
    cli_node.show_status(status(), NOW)
    assert capsys.readouterr().out == GOLDEN
    cli_node.show_status(
        status(
            control="disconnected", staleness_s=None, revision=None, timeline=None, policy_digest=None, policy_revision=None,
            svid_expires=NOW - 1, ready=False, attachments=[], peers=[],
            conditions=[Condition(code="x.y", severity="error", text="bad \x1b[31m news")],
        ),
        NOW,
    )  # fmt: skip
    assert capsys.readouterr().out == EMPTY


@pytest.fixture
def agent(monkeypatch):
    """A stand-in for the agent's answers; the real API is tested in test_local_api."""

    class Answers:
        def __init__(self) -> None:
            self.status_now = status()
            self.verdict = "deny"
            self.attached: list[object] = []
            self.states = ["active"]

        async def status(self):
            return self.status_now

        async def explain(self, src, dst, proto, port):
            return explanation(self.verdict, proto, port)

        async def attach(self, request):
            self.attached.append(request)
            return AttachReply(attachment=place(request, self.states[0]))

        async def detach(self, ref):
            self.attached.append(ref)

        async def watch(self):
            while len(self.states) > 1:
                self.states.pop(0)
                self.status_now = status(attachments=[place(self.attached[-1], self.states[0])])
                yield None
            raise TimeoutError

        async def svid(self, ref):
            return SvidFiles(spiffe_id=f"spiffe://t/wl/{ref.name}", certificate="CERT\n", key="KEY\n", bundle="B\n", expires=NOW)

    answers = Answers()

    def ask(_run_dir, question):
        import asyncio

        return asyncio.run(question(answers))

    monkeypatch.setattr(cli_node, "ask", ask)
    return answers


def place(request, state: str) -> Attachment:
    addresses = ["100.64.0.1", "fd00::1"] if state == "active" else []
    return Attachment(
        name=request.name, instance=request.instance, kind=request.kind, netns=request.netns, state=state, epoch=1, addresses=addresses
    )


def explanation(verdict: str, proto: str = "tcp", port: int | None = 8080) -> ExplainReply:
    allow = verdict == "allow"
    return ExplainReply(
        src="web", dst="shop/api", proto=proto, port=port, verdict="allow" if allow else "deny", digest="cd" * 32,
        reason="allowed by rule r (p.yaml:3)" if allow else "default deny: no rule allows it", rule="r" if allow else None,
        where="p.yaml:3" if allow else None, near_misses=[] if allow else ["r: it is about tcp/80, not tcp/8080"],
        smallest_change=None if allow else "add tcp/8080 to rule r (p.yaml:3)",
    )  # fmt: skip


def test_explain_for_people(agent, capsys):
    with pytest.raises(typer.Exit) as left:
        cli_node.explain("web", "shop/api", "8080")
    assert left.value.exit_code == 1
    assert capsys.readouterr().out == (
        "DENIED  web -> shop/api tcp/8080\n"
        "  by       default deny: no rule permits it\n"
        "  because  default deny: no rule allows it\n"
        "  nearly   r: it is about tcp/80, not tcp/8080\n"
        "  to allow add tcp/8080 to rule r (p.yaml:3)\n"
        "  policy   cdcdcdcdcdcd\n"
    )
    agent.verdict = "allow"
    cli_node.explain("web", "shop/api", "icmp")
    assert capsys.readouterr().out == (
        "ALLOWED  web -> shop/api icmp\n"
        "  by       rule r (p.yaml:3)\n"
        "  because  allowed by rule r (p.yaml:3)\n"
        "  policy   cdcdcdcdcdcd\n"
    )
    cli_node.show_explanation(explanation("allow").model_copy(update={"conditions": ["only uid 33 at the source by r"]}))
    assert "  because  allowed by rule r (p.yaml:3)\n  limit    only uid 33 at the source by r\n" in capsys.readouterr().out
    cli_node.explain("web", "shop/api", "udp/53", output=Output.JSON)
    assert json.loads(capsys.readouterr().out) == explanation("allow", "udp", 53).model_dump()


@pytest.mark.parametrize(
    ("text", "flow"),
    [("8080", ("tcp", 8080)), ("tcp/1", ("tcp", 1)), ("UDP/53", ("udp", 53)), ("icmp", ("icmp", None)), ("icmpv6", ("icmp", None)),
     ("tcp", ("tcp", None)), ("sctp/65535", ("sctp", 65535)), ("47", ("tcp", 47))],
)  # fmt: skip
def test_flows(text, flow):
    assert cli_node.parse_flow(text) == flow


@pytest.mark.parametrize("text", ["", "0", "65536", "tcp/0", "tcp/", "tcp/x", "icmp/8", "tcp/80-90", "nothing/1", "tcp/99999999", "１２"])
def test_bad_flows(text):
    with pytest.raises(BadInput):
        cli_node.parse_flow(text)


def test_tokens_come_from_a_file_stdin_or_the_environment(tmp_path, monkeypatch):
    import io

    monkeypatch.delenv("RETINUE_TOKEN", raising=False)
    with pytest.raises(BadInput) as caught:
        cli_node.read_token(None)
    assert caught.value.code == "token.missing"
    monkeypatch.setenv("RETINUE_TOKEN", "from-env")
    assert cli_node.read_token(None) == "from-env"
    (tmp_path / "token").write_text("from-file\n")
    assert cli_node.read_token(str(tmp_path / "token")) == "from-file"
    monkeypatch.setattr("sys.stdin", io.StringIO("from-stdin\n"))
    assert cli_node.read_token("-") == "from-stdin"
    with pytest.raises(BadInput) as caught:
        cli_node.read_token(str(tmp_path / "none"))
    assert caught.value.code == "token.file"


def test_ciphers_always_have_the_one_every_wireguard_has():
    assert cli_node.check_ciphers(None) == ["chacha20poly1305"]
    assert cli_node.check_ciphers(["aes-256-gcm"]) == ["aes-256-gcm", "chacha20poly1305"]
    with pytest.raises(BadInput):
        cli_node.check_ciphers(["rot13"])


def test_attach_waits_until_active(agent, capsys):
    agent.states = ["waiting", "prepared", "active"]
    cli_node.attach("web", netns="blue", wait=5)
    assert capsys.readouterr().out == "web/0 is active here: 100.64.0.1 fd00::1\n"
    assert agent.attached == [Attach(name="web", netns="blue")]
    agent.states = ["waiting"]
    cli_node.attach("web", pid=7)
    assert capsys.readouterr().out == "web/0 is waiting here: no addresses yet\n"
    assert agent.attached[-1].netns == "/proc/7/ns/net"
    with pytest.raises(TimedOut) as caught:
        cli_node.attach("web", host=True, wait=0.1)
    assert caught.value.code == "attach.timeout"
    for wrong in ({}, {"host": True, "netns": "x"}, {"pid": 1, "netns": "x"}):
        with pytest.raises(BadInput):
            cli_node.attach("web", **wrong)
    cli_node.detach("web")
    assert capsys.readouterr().out == "web/0 is detached\n"


def test_status_check_answers_by_exit_status(agent, capsys):
    cli_node.status(check=True, as_json=True)
    assert Status.model_validate_json(capsys.readouterr().out) == status()
    for bad in (status(ready=False), status(conditions=[Condition(code="c", severity="error", text="t")])):
        agent.status_now = bad
        with pytest.raises(typer.Exit) as left:
            cli_node.status(check=True)
        assert left.value.exit_code == 1
    agent.status_now = status(conditions=[Condition(code="c", severity="warning", text="t")])
    cli_node.status(check=True)


def test_svid_fetch_never_prints_the_key(agent, capsys, tmp_path):
    for output in Output:
        cli_node.svid_fetch("web", output=output)
        cli_node.svid_fetch("web", directory=tmp_path / "svid", output=output)
    out = capsys.readouterr()
    assert "KEY" not in out.out + out.err
    assert "CERT" in out.out
    assert (tmp_path / "svid" / "key.pem").read_text() == "KEY\n"


def test_the_instance_that_speaks():
    found = status()
    assert cli_node.only_attachment(found, None).name == "web"
    assert cli_node.only_attachment(found, "web/0").name == "web"
    with pytest.raises(Refused):
        cli_node.only_attachment(found, "shop/api")
    with pytest.raises(NotFound):
        cli_node.only_attachment(found, "nobody")
    with pytest.raises(BadInput):
        cli_node.only_attachment(status(attachments=[]), None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "expired"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h 0 min")]
)
def test_durations(seconds, text):
    assert cli_node.duration(seconds) == text
