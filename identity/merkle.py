"""Merkle trees over an append-only list of leaves: hashes, proofs and their verification (RFC 6962 section 2.1, RFC 9162).

    leaf hash = SHA-256(0x00 || leaf)        node hash = SHA-256(0x01 || left || right)

`Tree` makes roots and proofs from complete subtrees only, which it asks for by (level, position): a store keeps those it
was given once and never changes them. The verifiers need no store; every hash is 32 bytes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from identity.errors import BadInput, NotVerified

HASH_LEN: Final = 32
EMPTY: Final = hashlib.sha256().digest()
MAX_PROOF: Final = 64  # more levels than any list has

Node = Callable[[int, int], bytes]  # (level, position) -> hash of the complete subtree over 2^level leaves


def leaf_hash(leaf: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """A tree of `size` leaves over stored complete subtrees. `node` is asked only for those that are complete."""

    def __init__(self, size: int, node: Node) -> None:
        if size < 0:
            raise BadInput("merkle.size", f"a tree has no {size} leaves")
        self.size = size
        self._node = node

    def root(self) -> bytes:
        return self._hash(0, self.size)

    def inclusion(self, index: int) -> list[bytes]:
        """The hashes from leaf `index` up to the root. Raises BadInput for a leaf that is not there."""
        if not 0 <= index < self.size:
            raise BadInput("merkle.index", f"no leaf {index} in a tree of {self.size}")
        path: list[bytes] = []
        begin, end = 0, self.size
        while end - begin > 1:
            middle = begin + _split(end - begin)
            if index < middle:
                path.append(self._hash(middle, end))
                end = middle
            else:
                path.append(self._hash(begin, middle))
                begin = middle
        path.reverse()
        return path

    def consistency(self, earlier: int) -> list[bytes]:
        """The hashes that lead from the tree of the first `earlier` leaves to this one. Raises BadInput."""
        if not 0 <= earlier <= self.size:
            raise BadInput("merkle.size", f"a tree of {self.size} leaves does not continue one of {earlier}")
        if earlier in {0, self.size}:
            return []
        path: list[bytes] = []
        begin, end, whole = 0, self.size, True
        while earlier != end:
            middle = begin + _split(end - begin)
            if earlier <= middle:
                path.append(self._hash(middle, end))
                end = middle
            else:
                path.append(self._hash(begin, middle))
                begin, whole = middle, False
        if not whole:
            path.append(self._hash(begin, end))
        path.reverse()
        return path

    def _hash(self, begin: int, end: int) -> bytes:
        count = end - begin
        if count == 0:
            return EMPTY
        if count & (count - 1) == 0:
            level = count.bit_length() - 1
            return self._node(level, begin >> level)
        middle = begin + _split(count)
        return node_hash(self._hash(begin, middle), self._hash(middle, end))


def grow(size: int, leaves: Iterable[bytes], node: Node) -> list[tuple[int, int, bytes]]:
    """The complete subtrees that come to be when `leaves` (leaf hashes) are appended to a tree of `size`: (level,
    position, hash), level 0 too.
    """
    fresh: dict[tuple[int, int], bytes] = {}
    for index, found in enumerate(leaves, start=size):
        level, position, digest = 0, index, found
        fresh[0, index] = digest
        while position & 1:
            left = fresh.get((level, position - 1)) or node(level, position - 1)
            digest = node_hash(left, digest)
            level, position = level + 1, position >> 1
            fresh[level, position] = digest
    return [(level, position, digest) for (level, position), digest in fresh.items()]


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Is the leaf hash at `index` of the tree? Raises NotVerified ``log.inclusion``. RFC 9162 section 2.1.3.2."""
    if not 0 <= index < size or len(path) > MAX_PROOF:
        raise _not_included()
    at, last, digest = index, size - 1, leaf
    for step in path:
        if last == 0:
            raise _not_included()
        if at & 1 or at == last:
            digest = node_hash(step, digest)
            while at and not at & 1:
                at, last = at >> 1, last >> 1
        else:
            digest = node_hash(digest, step)
        at, last = at >> 1, last >> 1
    if last or not hmac.compare_digest(digest, root):
        raise _not_included()


def verify_consistency(
    size: int, root: bytes, later_size: int, later_root: bytes, path: Sequence[bytes]
) -> None:
    """Does the later tree begin with the earlier one? Raises NotVerified ``log.fork``. RFC 9162 section 2.1.4.2."""
    if not 0 <= size <= later_size or len(path) > 2 * MAX_PROOF:
        raise _forked()
    if size in {0, later_size}:
        same = hmac.compare_digest(root, later_root if size else EMPTY)
        if path or not same:
            raise _forked()
        return
    hashes = list(path)
    if size & (size - 1) == 0:
        hashes.insert(0, root)
    if not hashes:
        raise _forked()
    at, last = size - 1, later_size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    first = second = hashes[0]
    for step in hashes[1:]:
        if last == 0:
            raise _forked()
        if at & 1 or at == last:
            first, second = node_hash(step, first), node_hash(step, second)
            while at and not at & 1:
                at, last = at >> 1, last >> 1
        else:
            second = node_hash(second, step)
        at, last = at >> 1, last >> 1
    if last or not hmac.compare_digest(first, root) or not hmac.compare_digest(second, later_root):
        raise _forked()


def _split(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << (count - 1).bit_length() - 1


def _not_included() -> NotVerified:
    return NotVerified("log.inclusion", "the transparency log does not hold this entry at that place")


def _forked() -> NotVerified:
    return NotVerified("log.fork", "the transparency log does not continue the one seen before")
