"""One thread for all state, with two lines before it: what administrators, heartbeats and moves want, then what endpoints want.

A herd of endpoints can make a line of thousands of jobs; who revokes one of them must not stand behind it. Of every
`SHARE` jobs one is taken from the second line, so nobody waits for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")

SHARE: Final = 16
BATCH: Final = 8  # jobs that are finished together at most


@dataclass(frozen=True, slots=True)
class Done:
    """A job that has run: its result, or what it raised."""

    future: Future[Any]
    result: Any
    error: BaseException | None


Finish = Callable[[list[Done]], None]  # settles the futures of jobs that are finished together


@dataclass(frozen=True, slots=True)
class _Job:
    future: Future[Any]
    run: Callable[[], Any]
    finish: Finish | None

    def done(self) -> Done:
        try:
            return Done(self.future, self.run(), None)
        except BaseException as e:
            return Done(self.future, None, e)


class Worker:
    """Runs jobs one after the other until `stop`."""

    def __init__(self, name: str) -> None:
        self._first: deque[_Job] = deque()
        self._second: deque[_Job] = deque()
        self._last: _Job | None = None
        self._in_a_row = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T], *, second: bool = False, finish: Finish | None = None) -> Future[T]:
        """Put a job in a line. Jobs of the second line with an equal `finish` that stand together are finished together.

        Raises RuntimeError after `stop`.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._last is not None:
                raise RuntimeError("the worker has stopped")
            (self._second if second else self._first).append(_Job(future, job, finish))
            self._changed.notify()
        return future

    def stop(self, last: Callable[[], None]) -> Future[None]:
        """Run what waits, then `last`, and end."""
        future: Future[None] = Future()
        with self._changed:
            if self._last is not None:
                raise RuntimeError("the worker has stopped")
            self._last = _Job(future, last, None)
            self._changed.notify()
        return future

    def abandon(self) -> None:
        """Cancel what waits in the second line: whoever asked for it has gone."""
        with self._changed:
            dropped, self._second = self._second, deque()
        for job in dropped:
            job.future.cancel()

    # ---- the thread

    def _run(self) -> None:
        while True:
            job = self._next()
            ran: list[Done] = []
            finish = job.finish
            following: _Job | None = job
            while following is not None:
                if following.future.set_running_or_notify_cancel():
                    ran.append(following.done())
                following = self._alike(finish) if finish is not None and len(ran) < BATCH else None
            if ran:
                (finish or settle)(ran)
            if job is self._last:
                return

    def _next(self) -> _Job:
        with self._changed:
            while not (self._first or self._second or self._last):
                self._changed.wait()
            if self._first and (self._in_a_row < SHARE or not self._second):
                self._in_a_row += 1
                return self._first.popleft()
            self._in_a_row = 0
            if self._second:
                return self._second.popleft()
            assert self._last is not None
            return self._last

    def _alike(self, finish: Finish) -> _Job | None:
        """The next job when it is to be finished in the same way and nobody of the first line waits."""
        with self._changed:
            if self._first or not self._second or self._second[0].finish != finish:
                return None
            return self._second.popleft()


def settle(ran: list[Done]) -> None:
    """Every job's own outcome."""
    for done in ran:
        if done.error is not None:
            done.future.set_exception(done.error)
        else:
            done.future.set_result(done.result)
