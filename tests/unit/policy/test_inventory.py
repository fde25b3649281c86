from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadPolicy
from policy.inventory import dump_inventory, load_inventory
from policy.program import Subject

words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
some = st.builds(
    Subject, words, st.dictionaries(words, words, max_size=3), st.sampled_from(("", "spiffe://td/wl/x")),
    st.sampled_from(((), ("10.0.0.0/8",), ("::/0", "1.2.3.4-1.2.3.9"))),
)


@given(st.lists(some, max_size=4, unique_by=lambda s: s.name))
@settings(deadline=None)
def test_round_trip(subjects):
    assert load_inventory("i", dump_inventory(subjects)) == tuple(subjects)


def test_reads_what_people_write():
    (web, office) = load_inventory(
        "i", "inventory: 1\nworkloads:\n  - {name: shop/web, labels: {app: shop, port: 80}}\n  - name: office\n    nets: 10.0.0.0/8\n    labels:\n"
    )
    assert web.labels == {"app": "shop", "port": "80"}
    assert office.nets == ("10.0.0.0/8",)
    assert load_inventory("i", "inventory: 1\nworkloads:\n") == ()


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("inventory: 2\nworkloads: []", "inventory.version", 1, 12),
        ("inventory: 1", "policy.missing_key", 1, 1),
        ("inventory: 1\nworkload: []", "policy.unknown_key", 2, 1),
        ("inventory: 1\nworkloads: [{name: a}, {name: a}]", "inventory.duplicate", 2, 31),
        ("inventory: 1\nworkloads: [{labels: {}}]", "policy.missing_key", 2, 13),
        ("inventory: 1\nworkloads: [{name: a, nets: [x]}]", "net.form", 2, 30),
        ("inventory: 1\nworkloads: [{name: a, labels: {b: [c]}}]", "policy.type", 2, 35),
        ("inventory: 1\nworkloads: {a: b}", "policy.type", 2, 12),
    ],
)
def test_bad_inventories_are_refused_with_position(text, code, line, column):
    with pytest.raises(BadPolicy) as caught:
        load_inventory("i", text)
    assert (caught.value.code, caught.value.line, caught.value.column) == (code, line, column)
