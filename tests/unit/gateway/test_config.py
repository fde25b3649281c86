"""gateway.config: strict, with the key and a hint in every complaint."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Route, load_config, parse_config, split_address
from identity.errors import BadInput, BadState

DIGEST = "a" * 64
GOOD = f"""
agent = "agent.sock"
[[listen]]
address = "127.0.0.1:0"
plaintext = true
[[caller]]
workload = "partner/acme"
token_sha256 = ["{DIGEST}"]
[[route]]
path = "/api/"
workload = "shop/api"
port = 8080
"""


def refused(text: str) -> BadInput:
    with pytest.raises(BadInput) as caught:
        parse_config(text)
    assert caught.value.code in {"gateway.config", "gateway.address"}
    return caught.value


def test_good_file_and_relative_paths(tmp_path: Path) -> None:
    config = parse_config(GOOD, base=tmp_path)
    assert config.agent == tmp_path / "agent.sock"
    assert config.route[0].port == 8080
    assert config.limits.header == 15.0


def test_unknown_keys_are_refused_with_a_hint() -> None:
    error = refused(GOOD.replace("token_sha256", "tokens_sha256"))
    assert "caller[1].tokens_sha256" in error.message
    assert error.hint == "did you mean token_sha256?"
    assert "known keys" in refused("zzz = 1\n" + GOOD).hint


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("port = 8080", "port = 0", "route[1].port"),
        ("port = 8080", "port = 65536", "route[1].port"),
        ("port = 8080", 'port = "8080"', "route[1].port"),
        (DIGEST, "A" * 64, "SHA-256"),
        (DIGEST, "a" * 63, "SHA-256"),
        ("shop/api", "Shop", "not a workload name"),
        ('"/api/"', '"api"', "path prefix"),
        ('"/api/"', '"/a/../b"', "path prefix"),
        ('"/api/"', '"/a%2fb"', "path prefix"),
        ("plaintext = true", "", "certificate and key"),
        ("plaintext = true", 'plaintext = true\nkey = "k"', "plaintext"),
        ("127.0.0.1:0", "localhost:1", "not an address"),
        ("127.0.0.1:0", "::1:1", "not an address"),
        (f'token_sha256 = ["{DIGEST}"]', "", "needs token_sha256"),
        ("agent =", 'trust_domain = "x"\nagent =', "belong together"),
        ("[[route]]", "[[rout]]", "route"),
    ],
)
def test_bad_values(old: str, new: str, said: str) -> None:
    assert said in refused(GOOD.replace(old, new)).message


def test_duplicates_are_refused() -> None:
    route = GOOD[GOOD.index("[[route]]") :]
    assert "route */api/ is given twice" in refused(GOOD + route).message
    other = f'[[caller]]\nworkload = "partner/b"\ntoken_sha256 = ["{DIGEST}"]\n'
    assert "token_sha256" in refused(GOOD + other).message
    assert "caller partner/acme/0" in refused(GOOD + f'[[caller]]\nworkload = "partner/acme"\nspki_sha256 = ["{DIGEST}"]\n').message


def test_spiffe_ids_are_checked() -> None:
    assert "SPIFFE" in refused(GOOD.replace("token_sha256 = [", 'spiffe_id = ["https://x"]\ntoken_sha256 = [')).message


def test_route_order_is_by_specificity() -> None:
    more = GOOD + (
        '[[route]]\npath = "/"\nworkload = "root"\nport = 1\n'
        '[[route]]\nhost = "shop.example"\npath = "/"\nworkload = "hosted"\nport = 1\n'
        '[[route]]\npath = "/api/v2"\nworkload = "two"\nport = 1\n'
    )
    config = parse_config(more)

    def found(host: str, path: str) -> str | None:
        route = config.find_route(host, path)
        return route.workload if route else None

    assert found("x", "/api/v2/a") == "two"
    assert found("x", "/api/v20") == "shop/api"
    assert found("x", "/other") == "root"
    assert found("shop.example", "/api/v2") == "hosted"
    assert parse_config(GOOD).find_route("x", "/other") is None


@given(st.text(alphabet="/ab.", max_size=12))
def test_a_prefix_ends_at_a_segment(path: str) -> None:
    route = Route(path="/ab", workload="w", port=1)
    assert route.match("h", path) == (path == "/ab" or path.startswith("/ab/"))


@pytest.mark.parametrize(("text", "want"), [("[::]:8443", ("::", 8443)), ("0.0.0.0:1", ("0.0.0.0", 1))])
def test_addresses(text: str, want: tuple[str, int]) -> None:
    assert split_address(text) == want


@pytest.mark.parametrize("text", ["", "1.2.3.4", "1.2.3.4:x", "1.2.3.4:70000", "[1.2.3.4]:1", "a:1", "::1"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(BadInput):
        split_address(text)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        load_config(tmp_path / "none.toml")
    file = tmp_path / "g.toml"
    file.write_bytes(b"\xff")
    with pytest.raises(BadInput, match="UTF-8"):
        load_config(file)
    file.write_text("a = [")
    with pytest.raises(BadInput, match="not TOML"):
        load_config(file)
    file.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(BadInput, match="larger"):
        load_config(file)
    file.write_text(GOOD.replace("plaintext = true", 'certificate = "c.pem"\nkey = "k.pem"'))
    with pytest.raises(BadInput, match="cannot read the key"):
        load_config(file)
    (tmp_path / "k.pem").write_text("x")
    (tmp_path / "k.pem").chmod(0o644)
    with pytest.raises(BadState, match="others can read"):
        load_config(file)
    (tmp_path / "k.pem").chmod(0o600)
    config = load_config(file)
    assert config.listen[0].certificate == tmp_path / "c.pem"
