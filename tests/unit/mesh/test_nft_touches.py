"""Which commits touched our table, out of the messages of the kernel; against a model that knows every commit."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import nft
from mesh.nft_touches import REMEMBERED, Touches

OURS, THEIRS = "retinue_rtn0", "filter"
NEWSETELEM = 10 << 8 | 12


def message(kind: int, *attributes: tuple[int, bytes]) -> bytes:
    body = struct.pack("=BBH", 1, 0, 0)
    for number, value in attributes:
        body += struct.pack("=HH", 4 + len(value), number) + value + b"\0" * (-len(value) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def commit(generation: int, *tables: str) -> list[bytes]:
    """The datagrams of one commit."""
    changes = [message(NEWSETELEM, (1, t.encode() + b"\0"), (2, b"pair4\0")) for t in tables]
    return [b"".join(changes), message(nft.NEWGEN, (1, struct.pack(">I", generation)))]


class Quiet(Touches):
    """With a socket that a list plays."""

    def __init__(self, generation: int) -> None:
        super().__init__(OURS, lambda: None)
        self.waiting: list[bytes | None] = []
        self._watcher = self  # type: ignore[assignment]  # plays the watcher, too
        self._since = self._seen = generation

    def drain(self) -> bool:
        for data in self.waiting:
            if data != b"":
                self._take(data)
        self._take(b"")
        self.waiting = []
        return True


def test_only_commits_that_name_the_table_count() -> None:
    touches = Quiet(7)
    for generation, tables in ((8, [THEIRS]), (9, [THEIRS, OURS]), (10, [OURS, OURS]), (11, [])):
        touches.waiting += commit(generation, *tables)
    assert [touches.between(since, 11) for since in range(7, 12)] == [2, 2, 1, 0, 0]
    assert touches.between(7, 8) == 0
    assert touches.between(6, 11) is None, "before we looked"
    assert touches.between(7, 12) is None, "not told yet"
    assert (touches.behind(11), touches.behind(12)) == (False, True)


def test_a_commit_whose_messages_were_lost_in_part_is_not_known() -> None:
    """The kernel queues nothing after a loss until the socket is dry; the end of the same commit may then still come."""
    touches = Quiet(7)
    touches.waiting = [*commit(8, THEIRS), None]
    assert touches.between(7, 8) is None
    touches.waiting = commit(9, THEIRS)[1:]  # its beginning, which was lost, may have named our table
    assert touches.between(8, 9) is None
    touches.waiting = commit(10, OURS)
    assert touches.between(9, 10) == 1
    assert touches.between(8, 10) is None
    touches.waiting = [None, *commit(11, THEIRS)]  # what had been queued before the loss is read after it is told
    assert touches.between(10, 11) is None
    touches.waiting = commit(12, THEIRS)
    assert touches.between(11, 12) is None
    touches.waiting = commit(13, THEIRS)
    assert touches.between(12, 13) == 0


def test_more_than_is_remembered_is_not_known() -> None:
    touches = Quiet(0)
    for generation in range(1, REMEMBERED + 2):
        touches.waiting += commit(generation, OURS)
    assert touches.between(0, REMEMBERED + 1) is None
    assert touches.between(2, REMEMBERED + 1) == REMEMBERED - 1


@pytest.mark.parametrize("data", [b"\x08\0\0\0", struct.pack("=IHHII", 4, 1, 0, 0, 0), struct.pack("=IHHII", 400, 1, 0, 0, 0)])
def test_what_does_not_parse_is_not_known(data: bytes) -> None:
    touches = Quiet(1)
    touches.waiting = [data + b"\0" * 16, *commit(2, THEIRS)]
    assert touches.between(1, 2) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=12), st.data())
def test_it_never_calls_a_touched_table_untouched(commits: list[tuple[bool, bool, bool]], data: st.DataObject) -> None:
    """Losses as the kernel makes them: from a message on, everything until the socket is dry, and that may be at any time."""
    touches, truth, losing, known = Quiet(0), {}, False, 0

    def dry() -> None:
        nonlocal losing
        touches.drain()
        losing = False

    for generation, (ours, overrun, asked) in enumerate(commits, 1):
        truth[generation] = ours
        names = [THEIRS, OURS] if ours else [THEIRS]
        for datagram in [*(commit(generation, name)[0] for name in names), commit(generation)[1]]:
            if not losing and overrun and data.draw(st.booleans()):
                losing = True
                touches.waiting.insert(data.draw(st.integers(0, len(touches.waiting))), None)
            if not losing:
                touches.waiting.append(datagram)
            if data.draw(st.integers(0, 3)) == 0:
                dry()
        if asked:
            for since in range(generation):
                found = touches.between(since, generation)
                known += found is not None
                assert found is None or found == sum(truth[g] for g in range(since + 1, generation + 1)), (since, generation)
            dry()
    assert known or not any(asked for *_, asked in commits) or any(overrun for _, overrun, _ in commits)
