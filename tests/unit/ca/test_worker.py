"""The two lines before the working thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from ca.worker import BATCH, SHARE, Done, Worker, settle

WAIT = 10.0


class Rig:
    """A worker that stands still until `go`, and what it ran."""

    def __init__(self) -> None:
        self.worker = Worker("test")
        self.ran: list[object] = []
        self.finished: list[list[object]] = []
        self.gate = threading.Event()
        began = threading.Event()

        def hold() -> None:
            began.set()
            assert self.gate.wait(WAIT)

        self.worker.submit(hold)
        assert began.wait(WAIT)

    def put(self, name: object, *, second: bool = False, together: bool = False) -> Future[object]:
        def job() -> object:
            self.ran.append(name)
            return name

        return self.worker.submit(job, second=second, finish=self.finish if together else None)

    def finish(self, ran: list[Done]) -> None:
        self.finished.append([d.result for d in ran])
        settle(ran)

    def end(self) -> None:
        self.gate.set()
        self.worker.stop(lambda: self.ran.append("last")).result(WAIT)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.gate.set()


def test_the_first_line_goes_first_and_the_last_job_last(rig: Rig) -> None:
    rig.put("e1", second=True)
    rig.put("e2", second=True)
    rig.put("a1")
    rig.put("a2")
    rig.end()
    assert rig.ran == ["a1", "a2", "e1", "e2", "last"]


def test_the_second_line_has_its_share(rig: Rig) -> None:
    for n in range(3 * SHARE):
        rig.put(n)
    for _ in range(2):
        rig.put("endpoint", second=True)
    rig.end()
    assert rig.ran.index("endpoint") <= SHARE
    assert rig.ran[SHARE + 1 :].index("endpoint") <= SHARE
    assert [r for r in rig.ran if isinstance(r, int)] == list(range(3 * SHARE))


def test_alike_jobs_are_finished_together(rig: Rig) -> None:
    futures = [rig.put(n, second=True, together=True) for n in range(BATCH + 3)]
    rig.put("alone", second=True)
    futures.append(rig.put("after", second=True, together=True))
    rig.end()
    assert [f.result(WAIT) for f in futures] == [*range(BATCH + 3), "after"]
    assert rig.finished == [[*range(BATCH)], [*range(BATCH, BATCH + 3)], ["after"]]


def test_a_batch_ends_when_somebody_of_the_first_line_waits(rig: Rig) -> None:
    def asks() -> None:
        rig.ran.append("asks")
        rig.put("admin")

    rig.worker.submit(asks, second=True, finish=rig.finish)
    after = rig.put("e", second=True, together=True)
    rig.gate.set()
    after.result(WAIT)
    rig.end()
    assert rig.ran == ["asks", "admin", "e", "last"]
    assert len(rig.finished) == 2


def test_an_error_is_its_own_jobs(rig: Rig) -> None:
    def fails() -> None:
        raise ValueError("x")

    failed = rig.worker.submit(fails, second=True, finish=rig.finish)
    fine = rig.put("fine", second=True, together=True)
    rig.end()
    with pytest.raises(ValueError, match="x"):
        failed.result(WAIT)
    assert fine.result(WAIT) == "fine"


@pytest.mark.parametrize("together", [False, True])
def test_a_job_that_is_cancelled_while_it_waits_does_not_run(rig: Rig, together: bool) -> None:
    gone = rig.put("gone", second=True, together=together)
    stays = rig.put("stays", second=True, together=together)
    assert gone.cancel()
    rig.end()
    assert stays.result(WAIT) == "stays"
    assert rig.ran == ["stays", "last"]


def test_the_second_line_can_be_abandoned(rig: Rig) -> None:
    asked = [rig.put(name, second=True) for name in ("e1", "e2")]
    first = rig.put("a1")
    rig.worker.abandon()
    rig.end()
    assert rig.ran == ["a1", "last"]
    assert first.result(WAIT) == "a1"
    assert all(future.cancelled() for future in asked)


def test_nothing_is_taken_after_the_end(rig: Rig) -> None:
    rig.end()
    nothing: Callable[[], None] = lambda: None
    with pytest.raises(RuntimeError):
        rig.worker.submit(nothing)
    with pytest.raises(RuntimeError):
        rig.worker.stop(nothing)
