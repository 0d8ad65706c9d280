"""Allowed hours: windows of the week on a zone's clock, across midnight and over the changes of summer time."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAILY = "daily"
DAY_MINUTES = 24 * 60
AHEAD_DAYS = 8
"""A week and a day: the same windows come again."""

_FORM = re.compile(r"([a-z,-]+) (\d\d):(\d\d)-(\d\d):(\d\d)")
_EXAMPLE = '"mon-fri 19:00-06:00", "sat,sun 00:00-24:00" or "daily 22:00-05:30"'


@dataclass(frozen=True)
class Window:
    """A span that comes again every week.

    Attributes:
        days: on which it begins, 0 is Monday.
        begin: minutes since midnight of that day.
        end: minutes since the same midnight; over 1440 where it ends on the day after.
    """

    days: frozenset[int]
    begin: int
    end: int


@dataclass(frozen=True)
class Hours:
    """When a site computes, on the clock of its zone."""

    windows: tuple[Window, ...]
    zone: zoneinfo.ZoneInfo

    def closes(self, now: datetime) -> datetime | None:
        """When the hours that ``now`` lies in are over; None outside them. Windows without a gap are one."""
        return next((end for begin, end in self._spans(now) if begin <= now < end), None)

    def opens(self, now: datetime) -> datetime | None:
        """When the next hours begin; None where there are none at all."""
        return next((begin for begin, _ in self._spans(now) if begin > now), None)

    def _spans(self, now: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Begin and end in order, joined where they touch, from the day before ``now`` on."""
        begun: tuple[datetime, datetime] | None = None
        for begin, end in sorted(self._instances(now.astimezone(self.zone).date() - timedelta(days=1))):
            if begun is not None and begin <= begun[1]:
                begun = (begun[0], max(begun[1], end))
                continue
            if begun is not None:
                yield begun
            begun = (begin, end)
        if begun is not None:
            yield begun

    def _instances(self, first: date) -> Iterator[tuple[datetime, datetime]]:
        for day in (first + timedelta(days=number) for number in range(AHEAD_DAYS + 2)):
            midnight = datetime(day.year, day.month, day.day)
            for window in self.windows:
                begin, end = (
                    _instant(midnight + timedelta(minutes=at), self.zone) for at in (window.begin, window.end)
                )
                if day.weekday() in window.days and begin < end:
                    yield begin, end


def _instant(wall: datetime, zone: zoneinfo.ZoneInfo) -> datetime:
    """The first moment at which the zone's clock shows ``wall`` or later.

    A time that comes twice in autumn is its first coming; one that spring leaves out is the moment of the leap. So a
    window never lasts longer than its begin and end on the clock say.
    """
    moment = min(wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    while moment.astimezone(zone).replace(tzinfo=None) < wall:
        moment += timedelta(minutes=1)
    return moment


def parse(texts: Sequence[str], zone: str) -> Hours:
    """Hours from the site's file: ``["mon-fri 19:00-06:00"]`` and ``"Europe/Berlin"``.

    A window belongs to the day on which it begins: the one above ends on Saturday at six.

    Raises:
        ValueError: naming what is wrong and how it is written.
    """
    return Hours(tuple(_window(text) for text in texts), _zone(zone))


def _zone(name: str) -> zoneinfo.ZoneInfo:
    if not name:
        raise ValueError('state the zone of the hours: time_zone = "Europe/Berlin"')
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f'time_zone \'{name[:60]}\' is not known here; write it as "Europe/Berlin" or "UTC", and install the '
            "system's package tzdata if it is missing"
        ) from None


def _window(text: str) -> Window:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text[:60]}': write days and times as {_EXAMPLE}")
    days, *parts = match.groups()
    from_hour, from_minute, to_hour, to_minute = (int(part) for part in parts)
    begin, end = 60 * from_hour + from_minute, 60 * to_hour + to_minute
    if begin >= DAY_MINUTES or end > DAY_MINUTES or from_minute > 59 or to_minute > 59:
        raise ValueError(f"'{text}': times run from 00:00 to 24:00")
    if begin == end:
        raise ValueError(f"'{text}': begins when it ends; a whole day is 00:00-24:00")
    return Window(_days(days, text), begin, end if end > begin else end + DAY_MINUTES)


def _days(words: str, text: str) -> frozenset[int]:
    """``mon-fri``, ``sat,sun``, ``fri-mon`` (over the week's end) or ``daily``."""
    if words == DAILY:
        return frozenset(range(7))
    numbers: set[int] = set()
    for part in words.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not set(ends) <= set(DAYS):
            raise ValueError(f"'{text[:60]}': the days are {', '.join(DAYS)} or daily, written as {_EXAMPLE}")
        begin, end = DAYS.index(ends[0]), DAYS.index(ends[-1])
        numbers.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    return frozenset(numbers)
