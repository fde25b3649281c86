"""A canary on real packets: pairs inside, outside and across its boundary; and back by itself when something seen is refused."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from mesh import netns
from mesh.lab_process import ProcessFailed
from tests.netns.conftest import Mesh
from tests.netns.plane_rig import until

WEB, OTHER, API = "shop/web", "shop/other", "shop/api"
HEAD = "meshpolicy: 1\nlabels: {keys: [role]}\nsegments:\n  - name: shop\n    allow:\n"
WIDE = HEAD + "      - {id: web-api, from: {role: web}, to: {role: api}, on: [tcp/8080, tcp/8081]}\n"
MOVED = HEAD + "      - {id: web-api, from: {role: web}, to: {role: api}, on: [tcp/8080, tcp/8082]}\n"


class Shop:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.spaces: dict[str, str] = {}

    def open(self, src: str, port: int, family: int = 0) -> bool:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if family else socket.AF_INET)
            sock.settimeout(2)
            return sock

        with netns.inside(self.spaces[src], make) as sock:
            return sock.connect_ex((self.mesh.addresses[API][family], port)) == 0

    def seen(self, *pairs: tuple[str, int]) -> bool:
        return all(self.open(src, port, family) for src, port in pairs for family in (0, 1))

    def shut(self, *pairs: tuple[str, int]) -> bool:
        return not any(self.open(src, port, family) for src, port in pairs for family in (0, 1))

    def rollout(self, *args: str) -> dict[str, Any]:
        return dict(self.mesh.lab.ca("policy", "rollout", *args))

    def file(self, text: str) -> str:
        path = self.mesh.lab.dir / "test.yaml"
        path.write_text(text)
        return str(path)


@pytest.fixture(scope="module")
def shop(make_mesh: Callable[..., Mesh]) -> Shop:
    mesh = make_mesh("a", "b", "c")
    one = Shop(mesh)
    for name, host, role in ((WEB, "a", "web"), (OTHER, "c", "web"), (API, "b", "api")):
        mesh.add(name, host, role=role)
    mesh.apply(WIDE)
    for name, host in ((WEB, "a"), (OTHER, "c"), (API, "b")):
        one.spaces[name] = mesh.place(name, host)
    for port in (8080, 8081, 8082):
        mesh.serve(one.spaces[API], API, port=port)
    assert until(lambda: one.seen((WEB, 8080), (OTHER, 8080)), 20)
    return one


def test_both_ends_of_a_pair_go_by_the_same_policy(shop: Shop) -> None:
    assert shop.seen((WEB, 8081), (OTHER, 8081))
    assert shop.shut((WEB, 8082), (OTHER, 8082))
    done = shop.rollout("start", shop.file(MOVED), "--host", "a", "--force", "--budget", "100")
    assert done["rollout"]["state"] == "canary"
    # the canary's end decides for the pair, at both hosts: what is new is open, what is gone is shut
    assert until(lambda: shop.seen((WEB, 8082)) and shop.shut((WEB, 8081)), 15)
    # pairs outside the canary stay with the policy before, towards the very same destination
    assert shop.seen((OTHER, 8080), (OTHER, 8081))
    assert shop.shut((OTHER, 8082))
    assert "1 identities" in shop.mesh.lab.retinue("b", "status")["policy_trial"]
    assert shop.rollout("promote")["rollout"]["state"] == "watch"
    assert until(lambda: shop.seen((OTHER, 8082)) and shop.shut((OTHER, 8081)), 15)
    assert shop.rollout("abort", "--why", "test")["rollout"]["state"] == "aborted"
    assert until(lambda: shop.seen((WEB, 8081), (OTHER, 8081)) and shop.shut((WEB, 8082), (OTHER, 8082)), 15)
    assert "policy_trial" not in shop.mesh.lab.retinue("b", "status")


def test_back_by_itself_when_a_flow_that_was_seen_is_refused(shop: Shop) -> None:
    assert shop.seen((WEB, 8081))

    def told() -> bool:
        return any((r["src"], r["port"]) == (WEB, 8081) for r in shop.mesh.lab.ca("policy", "flows"))

    assert until(told, 30)
    with pytest.raises(ProcessFailed, match="recorded flows would be denied"):
        shop.rollout("start", shop.file(MOVED), "--host", "a")
    assert shop.rollout("start", shop.file(MOVED), "--host", "a", "--force")["rollout"]["budget"] == 0

    def back() -> bool:
        shop.open(WEB, 8081)
        return shop.rollout("status")["rollout"]["state"] == "rolled_back"

    assert until(back, 40), shop.rollout("status")
    done = shop.rollout("status")
    assert "shop/web -> shop/api tcp/8081" in done["rollout"]["why"]
    assert done["denials"][0]["reported_by"] == ["a"]
    assert until(lambda: shop.seen((WEB, 8081)) and shop.shut((WEB, 8082)), 15)
