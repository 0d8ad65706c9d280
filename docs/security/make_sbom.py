"""Writes a software bill of materials for each end (CycloneDX 1.6) and the list of licences, from the locks.

python docs/security/make_sbom.py

Names, versions and who asks for what come from the locks. Licences come from what is installed here at the version of
the lock; of a package that is not, what the list said before is kept. The same locks give the same bytes: no time, no
random number is in it.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import locks

HERE = Path(__file__).parent
PAGE = HERE / "licences.md"
UNKNOWN = "not stated"
_ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|", re.MULTILINE)
_CLASSIFIER = "License :: OSI Approved :: "
_SPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # of names that are addresses, RFC 4122 appendix C
STRONG = re.compile(r"\b(A?GPL|GNU (Affero )?General Public)", re.IGNORECASE)
"""Licences that bind what is linked with them; LGPL and MPL bind changes of the package itself."""


def licence(name: str, version: str, before: Mapping[str, str]) -> str:
    """What a package states of its licence, in one line."""
    try:
        about = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return before.get(name, UNKNOWN)
    if about["Version"].partition("+")[0] != version:
        return before.get(name, UNKNOWN)
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    named = [text.removeprefix(_CLASSIFIER) for text in about.get_all("Classifier") or () if _CLASSIFIER in text]
    first = str(about.get("License") or "").strip().splitlines()
    plain = first[0].strip() if first and len(first[0]) < 60 else ""
    return "; ".join(named) or plain or UNKNOWN


def before() -> dict[str, str]:
    """The licences that the list names now."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return {row[0]: row[2].strip() for row in _ROW.findall(text)}


def version() -> str:
    """Of fedvfm."""
    project = tomllib.loads((locks.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def _purl(name: str, number: str) -> str:
    return f"pkg:pypi/{name}@{number}"


def _component(pin: locks.Pin, stated: str) -> dict[str, Any]:
    known = {} if stated == UNKNOWN else {"licenses": [{"license": {"name": stated}}]}
    rows = {"fedvfm:marker": pin.marker, "fedvfm:files": str(len(pin.hashes)) if pin.hashes else ""}
    rows["fedvfm:not-in-the-lock"] = "" if pin.hashes else "its build depends on the machine"
    properties = [{"name": name, "value": value} for name, value in rows.items() if value]
    return {
        "type": "library",
        "bom-ref": _purl(pin.name, pin.version),
        "name": pin.name,
        "version": pin.version,
        "scope": "required",
        **known,
        "purl": _purl(pin.name, pin.version),
        "properties": properties,
    }


def bill(which: str, licences: Mapping[str, str]) -> dict[str, Any]:
    """The bill of one end."""
    pins, own = locks.installed(which), f"pkg:pypi/fedvfm@{version()}"
    refs = {pin.name: _purl(pin.name, pin.version) for pin in pins}
    needs: dict[str, list[str]] = {own: [], **{ref: [] for ref in refs.values()}}
    for pin in pins:
        for parent in pin.asked_by:
            key = own if parent == "fedvfm" else refs.get(parent)
            if key is not None:
                needs[key].append(refs[pin.name])
    body = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": "fedvfm",
                "version": version(),
                "description": f"fedvfm, {which}",
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                "purl": own,
            }
        },
        "components": [_component(pin, licences[pin.name]) for pin in pins],
        "dependencies": [{"ref": ref, "dependsOn": sorted(some)} for ref, some in sorted(needs.items())],
    }
    number = uuid.uuid5(_SPACE, json.dumps(body, sort_keys=True))
    return {**body, "serialNumber": f"urn:uuid:{number}"}


def page(licences: Mapping[str, str]) -> str:
    """The list of licences."""
    ends = {which: {pin.name: pin for pin in locks.installed(which)} for which in locks.LOCKS}
    rows: list[Sequence[str]] = []
    for name in sorted(licences):
        where = [which for which, pins in ends.items() if name in pins]
        number = next(ends[which][name].version for which in where)
        rows.append((f"`{name}`", number, licences[name].replace("|", "/"), ", ".join(where)))
    strong = [f"`{name}`" for name, stated in sorted(licences.items()) if STRONG.search(stated.replace("LGPL", ""))]
    silent = [f"`{name}`" for name, stated in sorted(licences.items()) if stated == UNKNOWN]
    lines = [
        "# Licences of what is installed",
        "",
        "Made by `python docs/security/make_sbom.py` from the locks; a test holds names and versions equal to them. A",
        "licence is what the package says of itself. Bills of materials (CycloneDX 1.6, JSON) lie beside this page:",
        "`server.cdx.json`, `site.cdx.json`, `demo.cdx.json`.",
        "",
        f"Packages whose licence binds what is linked with them (GPL, AGPL): {', '.join(strong) or 'none'}.",
        "",
        f"Packages that state none, or are not installed where this was made: {', '.join(silent) or 'none'}.",
        "",
        "| package | version | licence | in |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page and the three bills."""
    kept = before()
    every = {pin.name: pin.version for which in locks.LOCKS for pin in locks.installed(which)}
    licences = {name: licence(name, number, kept) for name, number in every.items()}
    PAGE.write_text(page(licences), encoding="utf-8")
    for which in locks.LOCKS:
        path = HERE / f"{which}.cdx.json"
        path.write_text(json.dumps(bill(which, licences), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
