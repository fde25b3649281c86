from __future__ import annotations

import errno
import socket

import pytest

from identity.errors import NotFound, Unreachable
from identity.wire.admin import ExplainReply
from identity.wire.local import Attachment, SnapshotReply
from mesh import ping
from mesh.ping import Result, addresses_of, ping_workload

HERE = Attachment(name="web", instance=0, kind="host", netns=None, state="active", epoch=1, addresses=["127.0.0.1", "::1"])


class FakeAgent:
    def __init__(self, live, verdict: str = "allow") -> None:
        self.live, self.verdict = live, verdict

    async def status(self):
        class Found:
            attachments = (HERE,)

        return Found()

    async def snapshot(self):
        return SnapshotReply(timeline="t", revision=1, trust_domain="test.example", objects=self.live.objects)

    async def explain(self, src, dst, proto, port):
        if self.verdict == "error":
            raise Unreachable("x", "cannot say")
        return ExplainReply(src=src, dst=dst, proto=proto, port=port, verdict=self.verdict, reason="why", rule=None, where=None, digest="")


@pytest.fixture
def listener():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ping, "PAUSE", 0.0)


def test_addresses_are_those_of_the_active_instances(live):
    live.objects["placement/shop/api/1"] = live.placement("shop/api", "host-b", index=8, instance=1, state="revoked")
    live.objects["placement/shop/api/2"] = live.placement("shop/api", "host-b", index=9, instance=2)
    found = addresses_of(SnapshotReply(timeline="t", revision=1, trust_domain="test.example", objects=live.objects), "shop/api")
    assert [a for a in found if ":" not in a] == ["100.64.0.2", "100.64.0.9"]


async def test_it_connects_to_every_address(live, listener, monkeypatch):
    monkeypatch.setattr(ping, "addresses_of", lambda *_: ["127.0.0.1", "::1"])
    found = await ping_workload(FakeAgent(live), "shop/api", listener, None, 3, 1.0)
    four, six = found.results
    assert (four.sent, four.answered, four.error) == (3, 3, None)
    assert four.minimum <= four.median <= four.maximum
    assert six == Result("::1", 3, 0, None, None, None, "refused: nobody listens there, or policy denies it")
    assert found.reason is None
    assert found.as_dict()["results"][0]["answered"] == 3


@pytest.mark.parametrize(("verdict", "reason"), [("deny", "why"), ("error", "cannot say")])
async def test_a_denial_comes_with_its_reason(live, listener, monkeypatch, verdict, reason):
    monkeypatch.setattr(ping, "addresses_of", lambda *_: ["127.0.0.1"])
    assert (await ping_workload(FakeAgent(live, verdict), "shop/api", listener, "web", 1, 1.0)).reason == reason


async def test_an_unknown_workload(live):
    with pytest.raises(NotFound) as caught:
        await ping_workload(FakeAgent(live, "deny"), "nobody", 80, None, 1, 1.0)
    assert caught.value.hint == "why"


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EHOSTUNREACH, "refused by the firewall"), (errno.ECONNREFUSED, "policy denies"), (errno.EPIPE, "pipe")]
)
def test_errors_in_words(number, words):
    assert words in ping._why(OSError(number, "x"))


def test_silence(monkeypatch):
    def silent(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(ping, "_connect", silent)
    assert ping._try(HERE, "127.0.0.1", 1, 2, 0.1).error == "no answer"
