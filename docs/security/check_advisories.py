"""Compares the locks with a file of advisories that you downloaded; nothing is asked of a network.

    python docs/security/check_advisories.py ADVISORIES [--lock PATH ...] [--accept ID ...]

ADVISORIES is in the OSV form: one JSON or YAML file with an advisory, a list of them, or {"vulns": [...]}; a folder of
such files (a checkout of PyPA's advisory-database); or a zip of them (OSV's export of PyPI). Ends with 0 where no
package of a lock is affected, with 1 where one is, with 2 where the file cannot be read or says nothing of PyPI. What
cannot be compared (a version that is none, a range of commits alone) counts as affected: look yourself, then --accept
its id.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

sys.path.insert(0, str(Path(__file__).parent))

import locks

NAMES = (".json", ".yaml", ".yml")
LARGEST = 64 << 20
"""Bytes of one advisory file."""


def _parsed(name: str, data: bytes) -> list[Any]:
    if len(data) > LARGEST:
        raise ValueError(f"{name}: over {LARGEST:,} bytes")
    try:
        body = json.loads(data) if name.endswith(".json") else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{name}: neither JSON nor YAML: {str(error)[:200]}") from error
    if isinstance(body, dict) and isinstance(body.get("vulns"), list):
        body = body["vulns"]
    rows = body if isinstance(body, list) else [body]
    if not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows):
        raise ValueError(f"{name}: not in the OSV form: an advisory without an id")
    return rows


def advisories(path: Path) -> Iterator[dict[str, Any]]:
    """Every advisory of a file, folder or zip.

    Raises:
        ValueError: for what is not in the OSV form.
    """
    if path.is_dir():
        for file in sorted(each for each in path.rglob("*") if each.suffix in NAMES and ".git" not in each.parts):
            yield from _parsed(file.name, file.read_bytes())
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            for about in packed.infolist():
                if about.filename.endswith(NAMES):
                    if about.file_size > LARGEST:
                        raise ValueError(f"{about.filename}: over {LARGEST:,} bytes")
                    yield from _parsed(about.filename, packed.read(about))
    else:
        yield from _parsed(path.name, path.read_bytes())


def _inside(version: Version, events: Sequence[dict[str, str]]) -> bool:
    """Whether a version lies between an event that introduces the fault and the one that ends it.

    Raises:
        InvalidVersion: if an event names no version.
    """

    def place(event: dict[str, str]) -> tuple[Version, int]:
        (kind, text), *_ = event.items()
        number = Version("0.dev0") if text == "0" else Version(text)
        return number, ("fixed", "introduced", "last_affected", "limit").index(kind)

    affected = False
    for event in sorted(events, key=place):
        number, _ = place(event)
        if "introduced" in event and version >= number:
            affected = True
        if ("fixed" in event and version >= number) or ("last_affected" in event and version > number):
            affected = False
    return affected


def _same(number: str, other: str) -> bool:
    """Whether two ways of writing are one version: 2.1 is 2.1.0."""
    try:
        return Version(number) == Version(other)
    except (InvalidVersion, TypeError):
        return False


def affects(entry: dict[str, Any], number: str) -> str:
    """Why a version of a package is affected by one entry of an advisory; empty where it is not."""
    listed = entry.get("versions") or ()
    if number in listed or any(_same(number, each) for each in listed):
        return "listed"
    ranges = [each for each in entry.get("ranges") or () if each.get("type") in ("ECOSYSTEM", "SEMVER")]
    if not any(each.get("events") for each in ranges):
        return "" if listed else "no versions are stated: look yourself"
    try:
        version = Version(number)
        return "in a range" if any(_inside(version, each.get("events") or ()) for each in ranges) else ""
    except (InvalidVersion, ValueError):
        return "its versions cannot be compared: look yourself"


def hits(path: Path, pins: Sequence[locks.Pin]) -> tuple[list[tuple[str, str, str, str]], int, str]:
    """Affected packages (id, package, version, why), how many advisories of PyPI were read, and the newest's date.

    Raises:
        ValueError: for what is not in the OSV form.
    """
    by_name: dict[str, set[str]] = {}
    for pin in pins:
        by_name.setdefault(pin.name, set()).add(pin.version)
    affected, count, newest = [], 0, ""
    for advisory in advisories(path):
        entries = [
            each for each in advisory.get("affected") or () if each.get("package", {}).get("ecosystem") == "PyPI"
        ]
        if not entries or advisory.get("withdrawn"):
            continue
        count, newest = count + 1, max(newest, str(advisory.get("modified", "")))
        for entry in entries:
            name = locks.normal(str(entry["package"].get("name", "")))
            for number in sorted(by_name.get(name, ())):
                why = affects(entry, number)
                if why:
                    names = {advisory["id"], *(advisory.get("aliases") or ())}
                    affected.append((" ".join(sorted(names)), name, number, why))
    return sorted(set(affected)), count, newest


def main() -> int:
    """Print what is affected; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("advisories", type=Path)
    parser.add_argument("--lock", type=Path, action="append", help="in place of the three locks and torch")
    parser.add_argument("--accept", action="append", default=[], help="an id that a person looked at; repeatable")
    given = parser.parse_args()
    try:
        pins = [pin for path in given.lock or () for pin in locks.read(path)]
        pins = pins or [pin for which in locks.LOCKS for pin in locks.installed(which)]
        affected, count, newest = hits(given.advisories, pins)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, zipfile.BadZipFile) as error:
        print(f"cannot be read: {error}", file=sys.stderr)
        return 2
    if not count:
        print(f"{given.advisories}: no advisory about PyPI in it; is it the right file?", file=sys.stderr)
        return 2
    left = [row for row in affected if not set(row[0].split()) & set(given.accept)]
    for ids, name, number, why in left:
        print(f"{name} {number}: {ids} ({why})")
    print(
        f"{len({pin.name for pin in pins})} packages, {count:,} advisories, the newest of {newest or 'no date'}: "
        f"{len(left)} affected, {len(affected) - len(left)} accepted",
        file=sys.stderr,
    )
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
