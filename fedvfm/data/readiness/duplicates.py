"""The same image twice: by the bytes of files, by pixels, across splits, and with two truths."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from fedvfm.data.readiness import dataset, finding, survey

Rows = Sequence[survey.Row]


def findings(seen: dataset.Looked) -> list[finding.Finding]:
    """All findings about duplicates. Blank images are left out: two of them say nothing."""
    rows = [row for row in seen.found.rows if not row.blank]
    files = _file_groups(rows)
    pixels = [group for group in _groups(rows, lambda row: row.pixels) if not _one_volume(group)]
    same = [group for group in pixels if not _same_bytes(group)]
    return [*_files(files), *_pixels(same), *_across(seen, pixels), *_conflicts(seen, pixels)]


def _groups(rows: Iterable[survey.Row], key: Callable[[survey.Row], Hashable]) -> list[list[survey.Row]]:
    grouped: dict[Hashable, list[survey.Row]] = {}
    for row in rows:
        found = key(row)
        if found is not None:
            grouped.setdefault(found, []).append(row)
    return [group for group in grouped.values() if len(group) > 1]


def _file_groups(rows: Rows) -> list[list[survey.Row]]:
    """Rows whose files have the same bytes; slices of one file are no duplicates of each other."""
    return [group for group in _groups(rows, lambda row: row.file) if not _one_volume(group)]


def _one_volume(group: Rows) -> bool:
    """Whether all are slices of one volume: neighbouring slices may be equal."""
    return group[0].volume is not None and len({row.volume for row in group}) == 1


def _same_bytes(group: Rows) -> bool:
    return group[0].file is not None and len({row.file for row in group}) == 1


def _numbers(groups: Iterable[Rows]) -> list[int]:
    return [row.number for group in groups for row in group]


def _files(groups: Sequence[Rows]) -> list[finding.Finding]:
    if not groups:
        return []
    count = sum(len({row.path for row in group}) - 1 for group in groups)
    files = finding.number(count, "file is", "files are")
    problem = f"{files} a copy of another, byte by byte" if count == 1 else f"{files} copies of others, byte by byte"
    return [finding.make("duplicate-files", problem, count, _numbers(groups))]


def _pixels(groups: Sequence[Rows]) -> list[finding.Finding]:
    if not groups:
        return []
    count = sum(len(group) - 1 for group in groups)
    problem = f"{finding.number(count, 'image')} with the pixels of another image in another file"
    return [finding.make("duplicate-pixels", problem, count, _numbers(groups))]


def _across(seen: dataset.Looked, groups: Sequence[Rows]) -> list[finding.Finding]:
    leaks = [
        group
        for group in groups
        if {"test"} < {seen.split_of.get(row.number, "") for row in group} & {"train", "val", "test"}
    ]
    if not leaks:
        return []
    problem = f"{finding.number(len(leaks), 'image')} in the test split and in another split too"
    return [finding.make("duplicate-across-splits", problem, len(leaks), _numbers(leaks))]


def _conflicts(seen: dataset.Looked, groups: Sequence[Rows]) -> list[finding.Finding]:
    torn = [group for group in groups if len({(row.mask, row.sample.truth) for row in group}) > 1]
    if not torn:
        return []
    what = "masks" if seen.segmentation else "labels"
    problem = f"{finding.number(len(torn), 'image')} in several copies with different {what}"
    return [finding.make("duplicate-conflict", problem, len(torn), _numbers(torn))]
