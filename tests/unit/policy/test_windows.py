from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.errors import BadInput
from policy.windows import Window, parse_duration, parse_instant, show_instant


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def test_durations_and_instants():
    assert [parse_duration(t) for t in ("90s", "30m", "2h", "90d", "2w")] == [90, 1800, 7200, 7_776_000, 1_209_600]
    assert parse_instant("2031-02-11T18:00Z") == at("2031-02-11T18:00")
    assert parse_instant("2031-02-11T18:00+02:00") == at("2031-02-11T16:00")
    assert parse_instant("2031-02-11") == at("2031-02-11T00:00")
    assert show_instant(0) == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize("text", ["", "2", "h", "0h", "-1h", "1.5h", "99999d", "2 h x"])
def test_bad_durations(text):
    with pytest.raises(BadInput):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "tomorrow", "2031-02-30", "2031-02-11T18:00", "1969-01-01", "2031-13-01T00:00Z", "0001-01-01T00:00+14:00"])
def test_bad_instants(text):
    with pytest.raises(BadInput):
        parse_instant(text)


@pytest.mark.parametrize(
    ("cron", "duration", "tz", "code"),
    [
        ("0 1 * *", "2h", "UTC", "time.cron"),
        ("60 1 * * *", "2h", "UTC", "time.cron"),
        ("0 24 * * *", "2h", "UTC", "time.cron"),
        ("0 1 0 * *", "2h", "UTC", "time.cron"),
        ("0 5-1 * * *", "2h", "UTC", "time.cron"),
        ("0 */0 * * *", "2h", "UTC", "time.cron"),
        ("0 *-3 * * *", "2h", "UTC", "time.cron"),
        ("0 x * * *", "2h", "UTC", "time.cron"),
        ("0 1 * * mon-", "2h", "UTC", "time.cron"),
        ("0 1 * * *", "10s", "UTC", "time.window"),
        ("0 1 * * *", "8d", "UTC", "time.window"),
        ("0 1 * * *", "soon", "UTC", "time.duration"),
        ("0 1 * * *", "2h", "Mars/Olympus", "time.zone"),
        ("0 1 * * *", "2h", "../../etc/passwd", "time.zone"),
    ],
)
def test_bad_windows(cron, duration, tz, code):
    with pytest.raises(BadInput) as caught:
        Window.parse(cron, duration, tz)
    assert caught.value.code == code


def test_a_nightly_window():
    night = Window.parse("0 1 * * *", "2h", "UTC")
    assert not night.active(at("2031-01-01T00:59:59"))
    assert night.active(at("2031-01-01T01:00"))
    assert night.active(at("2031-01-01T02:59:59"))
    assert not night.active(at("2031-01-01T03:00"))
    assert night.next_change(at("2031-01-01T00:00")) == at("2031-01-01T01:00")
    assert night.next_change(at("2031-01-01T01:30")) == at("2031-01-01T03:00")
    assert night.next_change(at("2031-01-01T03:00")) == at("2031-01-02T01:00")


def test_over_midnight_lists_steps_names_and_zones():
    late = Window.parse("30 23 * * fri,sat", "3h", "UTC")
    assert late.active(at("2031-01-04T01:00"))  # a Saturday, from Friday night
    assert not late.active(at("2031-01-03T01:00"))
    office = Window.parse("0 8-16/4 * jan-mar mon-fri", "1h", "Europe/Berlin")
    assert office.active(at("2031-01-03T07:30"))  # 8:30 in Berlin
    assert office.active(at("2031-01-03T11:00"))
    assert not office.active(at("2031-04-03T07:30"))
    assert Window.parse("0 0 13 * fri", "1h", "UTC").active(at("2031-01-13T00:30"))  # either, as cron has it
    assert Window.parse("0 0 13 * fri", "1h", "UTC").active(at("2031-01-03T00:30"))
    assert Window.parse("5/20 0 * * 7", "1m", "UTC").active(at("2031-01-05T00:25"))


def test_windows_that_never_close_or_never_open():
    always = Window.parse("* * * * *", "1h", "UTC")
    now = at("2031-01-01T00:00")
    assert always.active(now)
    assert always.next_change(now) > now + 7 * 86_400  # nothing changes before it
    assert Window.parse("0 0 30 feb *", "1h", "UTC").next_change(now) is None
    leap = Window.parse("0 0 29 feb *", "1h", "UTC")
    assert leap.next_change(now) == at("2032-02-29T00:00")
    assert Window.parse("0 0 30 feb *", "1h", "UTC").next_change(at("9999-12-30T00:00")) is None


@given(
    st.sampled_from(("0 1 * * *", "*/15 * * * *", "30 23 * * fri", "0 0 1 * *", "0 2 * * sun", "0 */6 * * *")),
    st.sampled_from(("1m", "15m", "2h", "30h", "7d")),
    st.sampled_from(("UTC", "Europe/Berlin", "America/New_York")),
    st.integers(at("2031-01-01T00:00"), at("2032-12-31T00:00")),
)
@settings(max_examples=80, deadline=None)
def test_nothing_changes_before_the_next_change(cron, duration, tz, now):
    window = Window.parse(cron, duration, tz)
    change = window.next_change(now)
    assert change is not None
    assert change > now
    before = window.active(now)
    step = max(1, (change - now) // 50)
    assert all(window.active(t) == before for t in range(now, change, step))
    assert window.active(change - 1) == before
    if change - now < 6 * 86_400:
        assert window.active(change) != before
