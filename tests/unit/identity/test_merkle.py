from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree
from pymerkle import verify_consistency as other_consistency
from pymerkle import verify_inclusion as other_inclusion

from identity import merkle
from identity.errors import BadInput, NotVerified
from identity.merkle import EMPTY, Tree, grow, leaf_hash, node_hash, verify_consistency, verify_inclusion

# The eight leaves of the Certificate Transparency test suite and the roots of its first trees.
LEAVES = [bytes.fromhex(t) for t in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


class Forest:
    """Stored subtrees, grown in batches."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.size = 0

    def append(self, *hashes: bytes) -> None:
        for level, position, digest in grow(self.size, hashes, lambda level, at: self.nodes[level, at]):
            assert (level, position) not in self.nodes  # what is stored never changes
            self.nodes[level, position] = digest
        self.size += len(hashes)

    def tree(self, size: int | None = None) -> Tree:
        return Tree(self.size if size is None else size, lambda level, position: self.nodes[level, position])


def slow_root(hashes: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word."""
    if not hashes:
        return hashlib.sha256().digest()
    if len(hashes) == 1:
        return hashes[0]
    k = 1
    while k * 2 < len(hashes):
        k *= 2
    return node_hash(slow_root(hashes[:k]), slow_root(hashes[k:]))


def forest(count: int, *batches: int) -> tuple[Forest, list[bytes]]:
    hashes = [leaf_hash(str(n).encode()) for n in range(count)]
    made, at = Forest(), 0
    for batch in (*batches, count):
        made.append(*hashes[at : min(at + batch, count)])
        at = min(at + batch, count)
    return made, hashes


def test_known_roots() -> None:
    made = Forest()
    assert made.tree().root() == EMPTY
    for leaf, root in zip(LEAVES, ROOTS, strict=True):
        made.append(leaf_hash(leaf))
        assert made.tree().root().hex() == root


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 130), st.lists(st.integers(0, 40), max_size=5))
def test_roots_equal_the_recursive_definition_for_every_size(count: int, batches: list[int]) -> None:
    made, hashes = forest(count, *batches)
    for size in range(count + 1):
        assert made.tree(size).root() == slow_root(hashes[:size])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_proof_holds_and_no_changed_one_does(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 100))
    made, hashes = forest(count)
    index, earlier = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count))
    root, tree = made.tree().root(), made.tree()
    path = tree.inclusion(index)
    verify_inclusion(hashes[index], index, count, path, root)
    old = made.tree(earlier).root()
    chain = tree.consistency(earlier)
    verify_consistency(earlier, old, count, root, chain)
    wrong = bytes(32)
    with pytest.raises(NotVerified):
        verify_inclusion(wrong, index, count, path, root)
    with pytest.raises(NotVerified):
        verify_inclusion(hashes[index], index, count, [*path, wrong], root)
    with pytest.raises(NotVerified):
        verify_inclusion(hashes[index], count, count, path, root)
    for at in range(len(path)):
        with pytest.raises(NotVerified):
            verify_inclusion(hashes[index], index, count, [*path[:at], wrong, *path[at + 1 :]], root)
        with pytest.raises(NotVerified):
            verify_inclusion(hashes[index], index, count, [*path[:at], *path[at + 1 :]], root)
    for at in range(len(chain)):
        with pytest.raises(NotVerified):
            verify_consistency(earlier, old, count, root, [*chain[:at], wrong, *chain[at + 1 :]])
    with pytest.raises(NotVerified):
        verify_consistency(earlier, wrong, count, root, chain)
    if earlier:
        with pytest.raises(NotVerified):
            verify_consistency(earlier, old, count, wrong, chain)
    with pytest.raises(NotVerified):
        verify_consistency(earlier, old, count, root, [*chain, wrong])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_another_history_is_a_fork(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 60))
    earlier = data.draw(st.integers(1, count - 1))
    made, hashes = forest(count)
    changed = data.draw(st.integers(0, earlier - 1))
    other = Forest()
    other.append(*hashes[:changed], leaf_hash(b"other"), *hashes[changed + 1 :])
    with pytest.raises(NotVerified) as e:
        verify_consistency(
            earlier, made.tree(earlier).root(), count, other.tree().root(), other.tree().consistency(earlier)
        )
    assert e.value.code == "log.fork"


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_second_implementation_agrees(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 64))
    leaves = [f"leaf {n}".encode() for n in range(count)]
    theirs, ours = InmemoryTree(algorithm="sha256"), Forest()
    for leaf in leaves:
        theirs.append_entry(leaf)
    ours.append(*map(leaf_hash, leaves))
    root = ours.tree().root()
    assert theirs.get_root() == root
    index, earlier = data.draw(st.integers(0, count - 1)), data.draw(st.integers(1, count))
    proof = theirs.prove_inclusion(index + 1, count)
    other_inclusion(leaf_hash(leaves[index]), root, proof)
    # They give the leaf itself as the first element of a path.
    assert proof.path[1:] == ours.tree().inclusion(index)
    chain = theirs.prove_consistency(earlier, count)
    other_consistency(ours.tree(earlier).root(), root, chain)


def test_what_is_not_there_cannot_be_asked_for() -> None:
    made, _ = forest(3)
    for ask in (
        lambda: made.tree().inclusion(3),
        lambda: made.tree().consistency(4),
        lambda: Tree(-1, made.tree()._node),
    ):
        with pytest.raises(BadInput):
            ask()


def test_trees_that_cannot_be_continued() -> None:
    made, _ = forest(5)
    root = made.tree().root()
    for arguments in (
        (6, root, 5, root, []),
        (2, root, 5, root, []),
        (3, root, 5, root, []),
        (-1, root, 5, root, []),
    ):
        with pytest.raises(NotVerified):
            verify_consistency(*arguments)
    with pytest.raises(NotVerified):
        verify_inclusion(root, 0, 5, [bytes(32)] * (merkle.MAX_PROOF + 1), root)
