from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from ca.enroll import (
    CHALLENGE_SECONDS,
    RECOVERY_SECONDS,
    Admitted,
    Challenges,
    Granted,
    JoinTokenAttestor,
    OpenChallenge,
    TokenRow,
    admit,
)
from identity import certs
from identity.enrollment import JoinToken, Offer, Proofs, prove
from identity.errors import BadInput, Conflict, NotVerified, Refused, RetinueError, Unreachable
from identity.keys import b64, ed25519_public, unb64, x25519_public
from identity.wire.enroll import EnrollRequest

NOW = 1_800_000_000
TOKEN = JoinToken("t1", b"\x01" * 32, "ab" * 32)
TLS = ec.generate_private_key(ec.SECP256R1())
TUNNEL = X25519PrivateKey.from_private_bytes(b"\x02" * 32)
ENROLL = Ed25519PrivateKey.from_private_bytes(b"\x03" * 32)
CSR = certs.make_csr(TLS)
ROW = TokenRow("t1", TOKEN.public_key, "web-1", "host", NOW + 600)
USED = replace(
    ROW, used_at=NOW - 10, enroll_key=ed25519_public(ENROLL), tunnel_key=x25519_public(TUNNEL), expires=NOW - 5
)
LEAF = b"server leaf"


def challenge(token_id: str = "t1") -> OpenChallenge:
    return Challenges().issue(token_id, LEAF, NOW)


def request(
    made: OpenChallenge, *, token: JoinToken = TOKEN, tunnel=TUNNEL, enroll=ENROLL, csr: str = CSR, **more
) -> EnrollRequest:
    """What an honest client sends; `more` replaces fields afterwards."""
    offer = Offer(
        token_id=token.id, nonce=made.nonce, server_leaf=LEAF, server_key=x25519_public(made.key), csr=csr,
        tunnel_key=x25519_public(tunnel), enroll_key=ed25519_public(enroll), underlay=("192.0.2.1:1",),
        ciphers=("chacha20poly1305",),
    )  # fmt: skip
    proofs = prove(offer, token, tunnel, enroll)
    fields = {
        "token_id": token.id, "nonce": b64(made.nonce), "csr": csr, "tunnel_key": b64(offer.tunnel_key),
        "enroll_key": b64(offer.enroll_key), "token_proof": b64(proofs.token), "tunnel_proof": b64(proofs.tunnel),
        "enroll_proof": b64(proofs.enroll), "underlay": ["192.0.2.1:1"], "ciphers": ["chacha20poly1305"],
    }  # fmt: skip
    return EnrollRequest.model_validate({**fields, **more})


def decide(row: TokenRow | None, made: OpenChallenge, asked: EnrollRequest, now: float = NOW) -> Admitted:
    return admit(asked, made, JoinTokenAttestor(row), now)


def refusal(row, made, asked, now: float = NOW) -> RetinueError:
    with pytest.raises(RetinueError) as e:
        decide(row, made, asked, now)
    return e.value


# -- admission --------------------------------------------------------------------------------------------------------


def test_an_honest_request_is_admitted():
    made = challenge()
    got = decide(ROW, made, request(made))
    assert (got.endpoint, got.kind, got.workload, got.token_id, got.again) == ("web-1", "host", None, "t1", False)
    assert certs.spki(got.public_key) == certs.spki(TLS.public_key())
    assert (got.tunnel_key, got.enroll_key) == (x25519_public(TUNNEL), ed25519_public(ENROLL))
    assert (got.underlay, got.ciphers, got.csr) == (("192.0.2.1:1",), ("chacha20poly1305",), CSR)


def test_a_sidecar_token_names_its_workload():
    made = challenge()
    got = decide(replace(ROW, kind="sidecar", workload="shop/api"), made, request(made))
    assert (got.kind, got.workload) == ("sidecar", "shop/api")


def test_expiry_is_told_to_the_holder_only():
    made = challenge()
    assert refusal(replace(ROW, expires=NOW), made, request(made)).code == "token.expired"
    assert decide(replace(ROW, expires=NOW + 1), made, request(made))
    forged = replace(TOKEN, secret=b"\x09" * 32)
    assert refusal(replace(ROW, expires=NOW), made, request(made, token=forged)).code == "token.refused"


def test_unknown_used_and_wrong_look_the_same_to_a_stranger():
    made = challenge()
    forged = request(made, token=replace(TOKEN, secret=b"\x09" * 32))
    answers = {str(refusal(row, made, forged).as_dict()) for row in (None, ROW, USED, replace(ROW, expires=1))}
    assert len(answers) == 1
    assert isinstance(refusal(None, made, request(made)), NotVerified)
    assert refusal(None, made, request(made)).code == "token.refused"


def test_a_row_of_another_token_is_no_evidence():
    made = challenge()
    assert refusal(replace(ROW, id="t2"), made, request(made)).code == "token.refused"


def test_a_challenge_of_another_token_is_no_challenge():
    made = challenge("other")
    assert refusal(ROW, made, request(made)).code == "token.refused"


def test_a_used_token_says_so_to_another_machine():
    made = challenge()
    row = replace(USED, expires=NOW + 60)
    other = request(made, enroll=Ed25519PrivateKey.from_private_bytes(b"\x07" * 32))
    e = refusal(row, made, other)
    assert isinstance(e, Conflict)
    assert e.code == "token.used"
    assert refusal(row, made, request(made, tunnel=X25519PrivateKey.from_private_bytes(b"\x08" * 32))).code == "token.used"
    for unknown in ({"enroll_key": None}, {"tunnel_key": None}):
        assert refusal(replace(row, **unknown), made, request(made)).code == "token.used"


def test_a_lost_reply_is_repeated_to_the_same_keys_for_five_minutes():
    made = challenge()
    assert decide(USED, made, request(made)).again, "also after the token's own end"
    end = USED.used_at + RECOVERY_SECONDS
    assert decide(USED, made, request(made), end - 1).again
    assert refusal(USED, made, request(made), end).code == "token.used"


def test_possession_of_every_key_is_needed():
    made = challenge()
    good = request(made)
    other = request(made, tunnel=X25519PrivateKey.from_private_bytes(b"\x08" * 32))
    assert refusal(ROW, made, request(made, tunnel_proof=other.tunnel_proof)).code == "enroll.tunnel_proof"
    assert refusal(ROW, made, request(made, enroll_proof=good.token_proof)).code == "enroll.key_proof"
    assert refusal(ROW, made, request(made, tunnel_key=other.tunnel_key)).code == "token.refused"


def test_a_proof_is_worth_nothing_for_another_challenge_or_server():
    first, second = challenge(), challenge()
    assert refusal(ROW, second, request(first)).code == "token.refused"
    moved = replace(first, server_leaf=b"another leaf")
    assert refusal(ROW, moved, request(first)).code == "token.refused"


def test_the_form_of_keys_is_strict():
    made = challenge()
    raw = bytearray(x25519_public(TUNNEL))
    raw[31] |= 0x80
    for change, code in (
        ({"tunnel_key": b64(bytes(raw))}, "key.tunnel"), ({"tunnel_key": b64(bytes(32))}, "key.tunnel"),
        ({"tunnel_key": "AAAA"}, "encoding.base64"), ({"enroll_key": "!"}, "encoding.base64"),
        ({"token_proof": ""}, "encoding.base64"), ({"tunnel_proof": b64(b"x" * 31)}, "encoding.base64"),
    ):  # fmt: skip
        e = refusal(ROW, made, request(made, **change))
        assert (type(e), e.code) == (BadInput, code)


def test_a_bad_csr_is_refused_after_the_proofs():
    made = challenge()
    assert refusal(ROW, made, request(made, csr="junk")).code == "csr.syntax"
    assert refusal(None, made, request(made, csr="junk")).code == "token.refused"


FIELDS = ["token_id", "csr", "tunnel_key", "enroll_key", "token_proof", "tunnel_proof", "enroll_proof"]


@given(st.sampled_from(FIELDS), st.data())
def test_a_mutated_request_is_refused(name, data):
    made = CHALLENGE
    good = getattr(REQUEST, name)
    position = data.draw(st.integers(0, len(good) - 1))
    char = data.draw(st.characters(codec="ascii").filter(lambda c: c != good[position]))
    bad = REQUEST.model_copy(update={name: good[:position] + char + good[position + 1 :]})
    with pytest.raises(RetinueError):
        decide(ROW, made, bad)


@given(st.lists(st.text(max_size=20), max_size=3), st.lists(st.sampled_from(["chacha20poly1305", "aes-256-gcm"]), max_size=2))
def test_hints_and_ciphers_are_bound_too(underlay, ciphers):
    bad = REQUEST.model_copy(update={"underlay": underlay, "ciphers": ciphers})
    if (underlay, ciphers) != (REQUEST.underlay, REQUEST.ciphers):
        assert refusal(ROW, CHALLENGE, bad).code == "token.refused"


CHALLENGE = challenge()
REQUEST = request(CHALLENGE)


def test_another_attestor_may_decide():
    class Always:
        def attest(self, request: EnrollRequest, offer: Offer, proofs: Proofs, now: float) -> Granted:
            if offer.csr != CSR:
                raise Refused("x.y", "no")
            return Granted("rack-7", "host", None, None)

    made = challenge()
    assert admit(request(made), made, Always(), NOW).endpoint == "rack-7"
    with pytest.raises(NotVerified):  # the keys must be proved all the same
        admit(request(made, enroll_proof=b64(b"x" * 64)), made, Always(), NOW)


# -- challenges -------------------------------------------------------------------------------------------------------


def test_a_nonce_is_good_once():
    table = Challenges()
    made = table.issue("t1", LEAF, NOW)
    wire = made.to_wire(NOW + 10)
    assert (wire.expires_in, wire.nonce) == (CHALLENGE_SECONDS - 10, b64(made.nonce))
    assert unb64(wire.server_key) == x25519_public(made.key)
    assert table.take(wire.nonce, NOW + 1) is made
    with pytest.raises(NotVerified) as e:
        table.take(wire.nonce, NOW + 1)
    assert e.value.code == "enroll.nonce"
    assert made.to_wire(NOW + 999).expires_in == 0


@pytest.mark.parametrize("nonce", ["", "A", "!", b64(b"x" * 32), b64(b"x" * 31)])
def test_other_nonces_are_refused(nonce):
    with pytest.raises(NotVerified) as e:
        Challenges().take(nonce, NOW)
    assert e.value.code == "enroll.nonce"


def test_challenges_end_and_their_number_is_bounded():
    table = Challenges(limit=3)
    made = [table.issue("t", LEAF, NOW + n) for n in range(3)]
    with pytest.raises(Unreachable) as e:
        table.issue("t", LEAF, NOW + 3)
    assert (e.value.code, e.value.http) == ("enroll.busy", 503)
    assert table.take(b64(made[1].nonce), NOW + CHALLENGE_SECONDS) is made[1], "those given out keep their turn"
    with pytest.raises(NotVerified):
        table.take(b64(made[0].nonce), NOW + CHALLENGE_SECONDS + 1)
    assert table.issue("t", LEAF, NOW + CHALLENGE_SECONDS + 1)
    assert len(table) == 2


def test_one_source_does_not_keep_the_others_out():
    table = Challenges(limit=9, of_source=2)
    first = table.issue("t", LEAF, NOW, "192.0.2.1")
    table.issue("t", LEAF, NOW, "192.0.2.1")
    with pytest.raises(Unreachable):
        table.issue("t", LEAF, NOW, "192.0.2.1")
    table.issue("t", LEAF, NOW, "192.0.2.2")
    table.take(b64(first.nonce), NOW)
    table.issue("t", LEAF, NOW, "192.0.2.1")
    later = NOW + CHALLENGE_SECONDS + 1
    for _ in range(2):
        table.issue("t", LEAF, later, "192.0.2.1")
    assert len(table) == 2


def test_the_answer_does_not_depend_on_the_token():
    table = Challenges()
    shapes = {
        tuple((k, type(v), len(str(v))) for k, v in table.issue(t, LEAF, NOW).to_wire(NOW).model_dump().items())
        for t in ("known", "unknown")
    }
    assert len(shapes) == 1


def test_secrets_are_not_shown():
    made = challenge()
    assert "key=" not in repr(made)
