"""Allowed hours: on the clock of a zone, across midnight, and on the two days of the year that have not 24 hours."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvfm.config import schedule

BERLIN = "Europe/Berlin"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def closes(texts: list[str], now: str, zone: str = "UTC") -> str | None:
    found = schedule.parse(texts, zone).closes(at(now))
    return None if found is None else f"{found:%Y-%m-%dT%H:%M}"


@pytest.mark.parametrize(
    ("text", "now", "end"),
    [  # 2026-11-23 is a Monday
        ("mon-fri 08:00-17:00", "2026-11-23T07:59:59", None),
        ("mon-fri 08:00-17:00", "2026-11-23T08:00:00", "2026-11-23T17:00"),
        ("mon-fri 08:00-17:00", "2026-11-23T16:59:59", "2026-11-23T17:00"),
        ("mon-fri 08:00-17:00", "2026-11-23T17:00:00", None),
        ("mon-fri 08:00-17:00", "2026-11-28T12:00:00", None),
        ("mon-fri 19:00-06:00", "2026-11-23T05:00:00", None),  # Sunday's night is nobody's
        ("mon-fri 19:00-06:00", "2026-11-28T05:59:00", "2026-11-28T06:00"),  # Friday's night ends on Saturday
        ("mon-fri 19:00-06:00", "2026-11-28T06:00:00", None),
        ("sat 22:00-24:00", "2026-11-28T23:59:00", "2026-11-29T00:00"),
        ("sat,sun 00:00-24:00", "2026-11-28T03:00:00", "2026-11-30T00:00"),  # two windows that touch are one
        ("sun 22:00-02:00", "2026-11-30T01:00:00", "2026-11-30T02:00"),
        ("fri-mon 10:00-11:00", "2026-11-23T10:30:00", "2026-11-23T11:00"),
        ("fri-mon 10:00-11:00", "2026-11-24T10:30:00", None),
        ("daily 22:00-05:30", "2026-11-25T02:00:00", "2026-11-25T05:30"),
    ],
)
def test_windows_of_the_week(text: str, now: str, end: str | None) -> None:
    assert closes([text], now) == end


def test_a_night_is_as_long_as_the_clock_says() -> None:
    """Berlin: 2026-03-29 02:00 becomes 03:00, 2026-10-25 03:00 becomes 02:00."""
    night = ["daily 22:00-06:00"]
    for begin, end, length in (
        ("2026-03-28T21:00", "2026-03-29T04:00", 7),
        ("2026-10-24T20:00", "2026-10-25T05:00", 9),
        ("2026-11-20T21:00", "2026-11-21T05:00", 8),
    ):
        assert closes(night, begin, BERLIN) == end
        assert at(end) - at(begin) == timedelta(hours=length)
        assert closes(night, (at(begin) - timedelta(seconds=1)).isoformat()[:19], BERLIN) is None


def test_times_that_do_not_come_or_come_twice() -> None:
    assert closes(["sun 01:00-02:30"], "2026-03-29T00:30", BERLIN) == "2026-03-29T01:00", "ends with the leap"
    assert closes(["sun 02:30-04:00"], "2026-03-29T01:00", BERLIN) == "2026-03-29T02:00", "begins with the leap"
    assert closes(["sun 02:10-02:50"], "2026-03-29T01:00", BERLIN) is None, "is left out that day"
    twice = schedule.parse(["sun 02:00-02:30"], BERLIN)
    assert twice.closes(at("2026-10-25T00:10")) == at("2026-10-25T00:30"), "the first time the clock shows it"
    assert twice.closes(at("2026-10-25T01:10")) is None, "and not once more"


def test_when_it_opens_again() -> None:
    found = schedule.parse(["mon-fri 19:00-06:00"], BERLIN)
    assert found.opens(at("2026-11-28T12:00")) == at("2026-11-30T18:00")
    assert schedule.parse([], "UTC").opens(at("2026-11-28T12:00")) is None
    assert schedule.parse([], "UTC").closes(at("2026-11-28T12:00")) is None
    always = schedule.parse(["daily 00:00-24:00"], BERLIN).closes(at("2026-03-28T12:00"))
    assert always is not None
    assert always > at("2026-04-04T00:00")


@given(
    moment=st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)).map(lambda one: one.replace(tzinfo=UTC)),
    begin=st.integers(0, 1439),
    length=st.integers(1, 1439),
    zone=st.sampled_from([BERLIN, "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "UTC"]),
)
def test_inside_is_what_the_clock_shows(moment: datetime, begin: int, length: int, zone: str) -> None:
    """Away from the changes of summer time a moment is inside where the clock shows a time of the window."""
    end = (begin + length) % 1440
    texts = [f"daily {begin // 60:02d}:{begin % 60:02d}-{end // 60:02d}:{end % 60:02d}"]
    found = schedule.parse(texts, zone)
    local = moment.astimezone(found.zone)
    offsets = {(local + timedelta(days=days)).utcoffset() for days in (-2, -1, 0, 1, 2)}
    if len(offsets) > 1:
        return
    since = (local.hour * 60 + local.minute - begin) % 1440
    over = found.closes(moment)
    assert (over is not None) == (since < length)
    assert over is None or moment < over <= moment + timedelta(minutes=length)


@pytest.mark.parametrize(
    ("texts", "zone", "words"),
    [
        (["mon 9-17"], "UTC", "write days and times as"),
        (["Mon 09:00-17:00"], "UTC", "write days and times as"),
        (["noday 09:00-17:00"], "UTC", "the days are mon, tue"),
        (["mon- 09:00-17:00"], "UTC", "'mon- 09:00-17:00': the days are"),
        (["mon-fun 09:00-10:00"], "UTC", "'mon-fun 09:00-10:00': the days are"),
        (["mon-wed-fri 09:00-10:00"], "UTC", "the days are"),
        (["mon 09:60-17:00"], "UTC", "from 00:00 to 24:00"),
        (["mon 24:00-03:00"], "UTC", "from 00:00 to 24:00"),
        (["mon 09:00-24:30"], "UTC", "from 00:00 to 24:00"),
        (["mon 09:00-09:00"], "UTC", "a whole day is 00:00-24:00"),
        (["mon 09:00-10:00"], "", "time_zone ="),
        (["mon 09:00-10:00"], "Mars/Olympus", "'Mars/Olympus' is not known here"),
        (["mon 09:00-10:00"], "../../etc/passwd", "is not known here"),
    ],
)
def test_what_is_no_window(texts: list[str], zone: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        schedule.parse(texts, zone)
