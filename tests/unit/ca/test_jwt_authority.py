"""JWT keys: made once, published before they are used and after, never readable by others."""

from __future__ import annotations

import stat

import pytest

from ca.jwt_authority import AFTER, AHEAD, LIFE, JwtAuthority
from identity import jwt
from identity.errors import BadState, NotVerified
from identity.names import SpiffeId, TrustDomain

NOW = 2_000_000_000
WEB = SpiffeId.workload(TrustDomain("a.example"), "web")


def kids(authority):
    return [a.kid for a in authority.published()]


def check(authority, token, now):
    return jwt.verify(token, "db", {"a.example": authority.published()}, now)


def test_a_key_stays_over_a_restart(tmp_path):
    made = JwtAuthority.load(tmp_path, NOW)
    token, expires = made.sign(WEB, ["db"], NOW)
    assert expires == NOW + 300
    again = JwtAuthority.load(tmp_path, NOW)
    assert kids(again) == kids(made)
    assert check(again, token, NOW).spiffe_id == WEB
    assert not again.maintain(NOW + 1)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_end_is_never_passed(tmp_path):
    made = JwtAuthority.load(tmp_path, NOW)
    token, expires = made.sign(WEB, ["db"], NOW, ends=NOW + 10)
    assert expires == NOW + 10
    with pytest.raises(NotVerified):
        check(made, token, NOW + 10)


def test_a_successor_is_published_long_before_it_signs(tmp_path):
    made = JwtAuthority.load(tmp_path, NOW)
    first = kids(made)
    assert not made.maintain(NOW + LIFE - AHEAD - 1)
    assert made.maintain(NOW + LIFE - AHEAD)
    both = kids(made)
    assert both[:1] == first
    assert len(both) == 2
    before = made.sign(WEB, ["db"], NOW + LIFE - 1)[0]
    after = made.sign(WEB, ["db"], NOW + LIFE)[0]
    assert jwt._json(before.split(".")[0])["kid"] == both[0]
    assert jwt._json(after.split(".")[0])["kid"] == both[1]
    assert not made.maintain(NOW + LIFE + AFTER - 1)
    assert check(made, before, NOW + LIFE + 200).spiffe_id == WEB
    assert made.maintain(NOW + LIFE + AFTER)
    assert kids(made) == both[1:]
    assert sorted(p.name for p in tmp_path.glob("jwt-*.key")) == [f"jwt-{both[1]}.key"]


def test_after_a_long_pause_the_old_key_signs_until_the_new_one_is_known(tmp_path):
    JwtAuthority.load(tmp_path, NOW)
    late = JwtAuthority.load(tmp_path, NOW + 3 * LIFE)
    assert len(kids(late)) == 2
    assert check(late, late.sign(WEB, ["db"], NOW + 3 * LIFE)[0], NOW + 3 * LIFE).spiffe_id == WEB
    assert jwt._json(late.sign(WEB, ["db"], NOW + 3 * LIFE)[0].split(".")[0])["kid"] == kids(late)[0]


@pytest.mark.parametrize("damage", ["{", "[]", '{"keys": [{}]}', '{"keys": 5}'])
def test_damage_is_told_and_no_key_is_made(tmp_path, damage):
    JwtAuthority.load(tmp_path, NOW)
    (tmp_path / "jwt.json").write_text(damage)
    with pytest.raises(BadState):
        JwtAuthority.load(tmp_path, NOW)
    assert len(list(tmp_path.glob("jwt-*.key"))) == 1
