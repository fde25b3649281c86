"""Time in policies: instants, durations and recurring windows. Pure: now is an argument, in seconds since the epoch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from typing import Final
from zoneinfo import ZoneInfo

from identity.errors import BadInput

DAY: Final = 86_400
MAX_DURATION: Final = 3_660 * DAY
MAX_WINDOW: Final = 7 * DAY
HORIZON_DAYS: Final = 9 * 366  # a 29 February may be eight years away
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": DAY, "w": 7 * DAY}
_DURATION: Final = re.compile(r"([0-9]{1,9})([smhdw])")
_DAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_PART: Final = re.compile(r"(\*|[a-z0-9]+)(?:-([a-z0-9]+))?(?:/([0-9]{1,2}))?")


def parse_duration(text: str) -> int:
    """Seconds of ``90s``, ``30m``, ``2h``, ``90d``, ``2w``. Raises BadInput."""
    match = _DURATION.fullmatch(text.strip())
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= MAX_DURATION:
        raise BadInput(
            "time.duration", f"not a duration: {ascii(text)[:40]}", hint="write 90s, 30m, 2h, 90d or 2w"
        )
    return seconds


def parse_instant(text: str) -> int:
    """Seconds since the epoch of ``2031-02-11T18:00Z`` or ``2031-02-11`` (midnight UTC). Raises BadInput."""
    word = text.strip()
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", word, re.ASCII):
            when = datetime.combine(date.fromisoformat(word), datetime.min.time(), UTC)
        else:
            when = datetime.fromisoformat(word)
        seconds = int(when.timestamp()) if when.tzinfo is not None else -1
    except (ValueError, OverflowError):
        seconds = -1
    if seconds < 0:
        raise BadInput("time.instant", f"not an instant: {ascii(text)[:40]}",
                       hint="write 2031-02-11T18:00Z (a zone is needed) or a date, which means midnight UTC")  # fmt: skip
    return seconds


def show_instant(seconds: int) -> str:
    """``2031-02-11T18:00:00Z``."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _field(text: str, low: int, high: int, names: tuple[str, ...], first: int) -> frozenset[int]:
    out: set[int] = set()
    for part in text.lower().split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(part)
        step = int(match[3] or 1)

        def number(word: str) -> int:
            return names.index(word) + first if word in names else int(word)

        if match[1] == "*":
            if match[2]:
                raise ValueError(part)
            a, b = low, high
        else:
            a = number(match[1])
            b = number(match[2]) if match[2] else (high if match[3] else a)
        if not low <= a <= b <= high or step < 1:
            raise ValueError(part)
        out.update(range(a, b + 1, step))
    return frozenset(out)


@dataclass(frozen=True)
class Window:
    """A recurring window: it opens at each minute the cron expression names, in `tz`, for `seconds`."""

    cron: str
    seconds: int
    tz: str

    @classmethod
    def parse(cls, cron: str, duration: str, tz: str) -> Window:
        """Raises BadInput. Five fields (minute, hour, day, month, weekday); at most a week long."""
        seconds = parse_duration(duration)
        if seconds < 60 or seconds > MAX_WINDOW:
            raise BadInput("time.window", "a window lasts from one minute to one week")
        window = cls(" ".join(cron.split()), seconds, tz)
        try:
            window.fields  # noqa: B018 -- parsed once, here, so that nothing can fail later
        except ValueError:
            raise BadInput("time.cron", f"not a cron expression: {ascii(cron)[:60]}",
                           hint='write "minute hour day month weekday", for example "0 1 * * mon-fri"') from None  # fmt: skip
        try:
            window.zone  # noqa: B018
        except (OSError, ValueError, KeyError):
            raise BadInput(
                "time.zone",
                f"not a known time zone: {ascii(tz)[:40]}",
                hint="write UTC or a name such as Europe/Berlin",
            ) from None
        return window

    @cached_property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.tz)

    @cached_property
    def fields(
        self,
    ) -> tuple[frozenset[int], frozenset[int], frozenset[int], frozenset[int], frozenset[int], bool, bool]:
        words = self.cron.split()
        if len(words) != 5:
            raise ValueError(self.cron)
        minute, hour, day, month, weekday = words
        weekdays = _field(weekday, 0, 7, _DAYS, 0)
        return (
            _field(minute, 0, 59, (), 0), _field(hour, 0, 23, (), 0), _field(day, 1, 31, (), 0),
            _field(month, 1, 12, _MONTHS, 1), frozenset(d % 7 for d in weekdays), day.startswith("*"), weekday.startswith("*"),
        )  # fmt: skip

    def _opens_on(self, day: date) -> bool:
        _, _, days, months, weekdays, any_day, any_weekday = self.fields
        if day.month not in months:
            return False
        in_days, in_week = day.day in days, day.isoweekday() % 7 in weekdays
        # As cron has it: when both are restricted, either is enough.
        return in_days and in_week if any_day or any_weekday else in_days or in_week

    def _openings(self, day: date) -> list[int]:
        if not self._opens_on(day):
            return []
        minutes, hours = self.fields[0], self.fields[1]
        return sorted(
            {
                int(datetime(day.year, day.month, day.day, h, m, tzinfo=self.zone).timestamp())
                for h in hours
                for m in minutes
            }
        )

    def _local_day(self, now: int) -> date:
        return datetime.fromtimestamp(now, self.zone).date()

    def last_opening(self, now: int) -> int | None:
        """The newest opening at or before `now` whose window could still be open."""
        day = self._local_day(now)
        for back in range(self.seconds // DAY + 3):
            for opening in reversed(self._openings(day - timedelta(days=back))):
                if opening <= now:
                    return opening
        return None

    def active(self, now: int) -> bool:
        """Is the window open at `now`? The closing instant is outside."""
        opening = self.last_opening(now)
        return opening is not None and now < opening + self.seconds

    def next_change(self, now: int) -> int | None:
        """Nothing changes before this instant; None when nothing changes within nine years."""
        if self.active(now):
            close = now
            while close < now + 8 * DAY:
                opening = self.last_opening(close)
                if opening is None or opening + self.seconds <= close:
                    break
                close = opening + self.seconds
            return close
        return next((opening for opening in self._ahead(now) if opening > now), None)

    def _ahead(self, now: int) -> Iterator[int]:
        day = self._local_day(now)
        for forward in range(HORIZON_DAYS):
            try:
                yield from self._openings(day + timedelta(days=forward))
            except (OverflowError, ValueError):  # the calendar ends
                return
