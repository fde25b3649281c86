from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from policy.evaluate import permitted
from policy.importers.cisco import import_cisco
from policy.importers.model import Imported, SourceRefused

Parts = Callable[[Imported, str, str], dict[str, str]]

GROUPS = """!
object-group network servers
 description the servers
 host 10.9.0.1
 10.9.1.0 255.255.255.0
object-group network all
 group-object servers
 range 10.9.2.1 10.9.2.3
interface Gi0/1
 ip address 10.0.0.1 255.255.255.0
 ip access-group EDGE in
"""


def load(*lines: str) -> Imported:
    return import_cisco(
        {"router.cfg": GROUPS + "ip access-list extended EDGE\n" + "".join(f" {line}\n" for line in lines)}
    )


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([], {}),
        (["permit ip any any"], {"0.0.0.0/0": "any"}),
        (["permit tcp any host 10.0.0.5 eq 443 www"], {"10.0.0.5": "tcp/80,443"}),
        (["10 permit udp any 10.0.0.0 0.0.0.255 range 53 54", "5 deny udp any host 10.0.0.1 eq domain"], {"10.0.0.0": "udp/53-54", "10.0.0.1": "udp/54", "10.0.0.2-10.0.0.255": "udp/53-54"}),
        (["permit tcp any host 10.0.0.5 gt 65000 log", "remark nothing"], {"10.0.0.5": "tcp/65001-65535"}),
        (["permit tcp any host 10.0.0.5 lt 3"], {"10.0.0.5": "tcp/1-2"}),
        (["permit tcp any host 10.0.0.5 neq 1"], {"10.0.0.5": "tcp/2-65535"}),
        (["permit tcp any host 10.0.0.5 gt 65535"], {}),
        (["permit tcp any host 10.0.0.5 lt 1"], {}),
        (["permit icmp any host 10.0.0.5"], {"10.0.0.5": "icmp"}),
        (["permit gre any host 10.0.0.5", "permit 99 any host 10.0.0.5"], {"10.0.0.5": "47 99"}),
        (["permit tcp any object-group all eq 22"], {"10.9.0.1": "tcp/22", "10.9.1.0/24": "tcp/22", "10.9.2.1-10.9.2.3": "tcp/22"}),
        (["permit ip any 10.0.0.0 0.0.1.1"], {"10.0.0.0/31": "any", "10.0.1.0/31": "any"}),
        (["permit tcp any any established"], {}),
    ],
)  # fmt: skip
def test_destinations(parts: Parts, lines: list[str], wanted: dict[str, str]) -> None:
    imported = load(*lines)
    assert parts(imported, "EDGE sources", "EDGE destinations") == wanted
    assert imported.untranslated == []


def test_sources_and_a_second_list(parts: Parts) -> None:
    imported = import_cisco(
        {
            "c": "access-list 101 deny tcp host 10.0.0.1 any\naccess-list 101 permit tcp 10.0.0.0 0.0.0.1 any eq 80\nip access-list extended B\n permit ip any any\n"
        }
    )
    subjects = {s.name: s for s in imported.inventory}
    for address, wanted in {"10.0.0.0": "tcp/80", "10.0.0.1": "nothing", "10.0.0.2": "nothing"}.items():
        src = replace(subjects["101 sources"], nets=(address,))
        assert str(permitted(imported.policy.program, src, subjects["101 destinations"])) == wanted
    assert parts(imported, "101 sources", "B destinations") == {}
    assert parts(imported, "B sources", "B destinations") != {}


def test_what_cannot_be_said_never_widens_access(parts: Parts) -> None:
    imported = load(
        "permit tcp any eq 20 host 10.0.0.5",
        "permit icmp any host 10.0.0.5 echo",
        "deny tcp any host 10.0.0.6 eq 1 time-range x",
        "permit tcp any host 10.0.0.6 range 1 2",
    )
    assert parts(imported, "EDGE sources", "EDGE destinations") == {"10.0.0.6": "tcp/2"}
    assert len(imported.untranslated) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("allow ip any any", "not an entry"),
        ("permit tcp any", "needs its wildcard|address"),
        ("permit tcp any host x", "not a network"),
        ("permit tcp any 10.0.0.0 x", "address and wildcard"),
        ("permit tcp any 10.0.0.0 255.255.254.0", "more than"),
        ("permit tcp any any eq nothing", "not a port"),
        ("permit tcp any any eq", "eq needs a port"),
        ("permit tcp any any range 1", "range needs two"),
        ("permit tcp any any range 9 1", "reversed"),
        ("permit ip any any eq 1", "ports need tcp or udp"),
        ("permit what any any", "not a protocol"),
        ("permit ip any object-group no", "no object group"),
    ],
)
def test_refusals(line: str, words: str) -> None:
    with pytest.raises(SourceRefused, match=words) as caught:
        load(line)
    assert "router.cfg:" in caught.value.message


def test_refused_groups_and_files() -> None:
    with pytest.raises(SourceRefused, match="not a member"):
        import_cisco({"c": "object-group network g\n host\n"})
    with pytest.raises(SourceRefused, match="not a network"):
        import_cisco({"c": "object-group network g\n host x\n"})
    with pytest.raises(SourceRefused, match="is empty"):
        import_cisco(
            {"c": "object-group network g\nip access-list extended A\n permit ip any object-group g\n"}
        )
    with pytest.raises(SourceRefused, match="no extended access list"):
        import_cisco({"c": "hostname r1\n"})
