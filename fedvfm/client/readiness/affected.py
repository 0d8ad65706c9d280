"""The list of affected files, for the hospital's eyes only: the one thing a check writes that names files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedvfm.client.readiness import check, outputs
from fedvfm.data import bags
from fedvfm.storage import storage

COLUMNS = ("severity", "code", "sample", "id", "file", "message")
OPTION, HEAD = "--files", ",".join(COLUMNS).encode()


def write(made: check.Checked, path: Path) -> None:
    """Write a row a finding and sample, with file and full message, for the owner alone (0600).

    Raises:
        OutputInUse: if another kind of file is there.
        StorageError: if the disk refuses.
    """
    outputs.require(path, OPTION, HEAD)
    storage.write_text(path, storage.table(COLUMNS, _rows(made)), mode=0o600)


def _rows(made: check.Checked) -> Iterator[tuple[str, ...]]:
    severities = {one.code: one.severity for one in made.findings}
    messages = {(number, code): text for number, code, text in made.told}
    for number, code, text in made.told:
        if number == 0:
            yield severities.get(code, ""), code, "", "", "", text
    for one in made.findings:
        for number in one.samples:
            sample_id, file = _place(made, number)
            yield one.severity, one.code, str(number), sample_id, file, messages.get((number, one.code), one.problem)


def _place(made: check.Checked, number: int) -> tuple[str, str]:
    """A sample's id and file, where the source knows it; of a case of several files the folder that holds them."""
    if made.seen is None:
        return "", ""
    sample = made.seen.samples[number - 1]
    path_of = getattr(made.raw, "path_of", None)
    images = [image for image in bags.images_of([sample]) if not image.without_image]
    if path_of is None or not images:
        return sample.id, ""
    return sample.id, os.path.commonpath([path_of(image) for image in images])
