"""Bills of materials and the list of licences are true of the locks; stored advisories are found in them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
HERE = ROOT / "docs" / "security"
CHECK = HERE / "check_advisories.py"
# What CycloneDX 1.6 asks of the parts that are used (bom-1.6.schema.json), and that nothing else is there.
SCHEMA = {
    "type": "object",
    "required": ["bomFormat", "specVersion", "version", "serialNumber", "metadata", "components", "dependencies"],
    "additionalProperties": False,
    "properties": {
        "bomFormat": {"const": "CycloneDX"},
        "specVersion": {"const": "1.6"},
        "version": {"type": "integer", "minimum": 1},
        "serialNumber": {"pattern": "^urn:uuid:[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$"},
        "metadata": {
            "type": "object",
            "required": ["component"],
            "additionalProperties": False,
            "properties": {"component": {"$ref": "#/$defs/component"}},
        },
        "components": {"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/component"}},
        "dependencies": {
            "type": "array",
            "uniqueItems": True,
            "items": {
                "type": "object",
                "required": ["ref"],
                "additionalProperties": False,
                "properties": {
                    "ref": {"type": "string"},
                    "dependsOn": {"type": "array", "uniqueItems": True, "items": {"type": "string"}},
                },
            },
        },
    },
    "$defs": {
        "component": {
            "type": "object",
            "required": ["type", "name", "version", "purl", "bom-ref"],
            "additionalProperties": False,
            "properties": {
                "type": {"enum": ["application", "library"]},
                "bom-ref": {"type": "string", "minLength": 1},
                "name": {"type": "string"},
                "version": {"type": "string"},
                "description": {"type": "string"},
                "scope": {"enum": ["required", "optional", "excluded"]},
                "purl": {"pattern": "^pkg:pypi/[a-z0-9.-]+@.+$"},
                "licenses": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["license"],
                        "additionalProperties": False,
                        "properties": {
                            "license": {
                                "type": "object",
                                "additionalProperties": False,
                                "minProperties": 1,
                                "maxProperties": 1,
                                "properties": {"id": {"const": "Apache-2.0"}, "name": {"type": "string"}},
                            }
                        },
                    },
                },
                "properties": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name", "value"],
                        "additionalProperties": False,
                        "properties": {"name": {"type": "string"}, "value": {"type": "string"}},
                    },
                },
            },
        }
    },
}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


locks = load("locks")
sbom = load("make_sbom")
ENDS = sorted(locks.LOCKS)


@pytest.mark.parametrize("which", ENDS)
def test_a_bill_is_true_of_its_lock(which: str) -> None:
    bill = json.loads((HERE / f"{which}.cdx.json").read_text())
    jsonschema.validate(bill, SCHEMA)
    # Read anew by the plainest means.
    text = locks.LOCKS[which].read_text()
    rows = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)(.*)$", text, re.MULTILINE)
    wanted = {(locks.normal(name), number) for name, number, rest in rows if "'never'" not in rest}
    if which != "server":
        wanted |= set(re.findall(r"^(torch)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    found = {(each["name"], each["version"]) for each in bill["components"]}
    assert found == wanted, "run: python docs/security/make_sbom.py"
    refs = {each["bom-ref"] for each in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert len(refs) == len(bill["components"]) + 1
    tree = {row["ref"]: row["dependsOn"] for row in bill["dependencies"]}
    assert set(tree) == refs
    assert {ref for some in tree.values() for ref in some} == refs - {bill["metadata"]["component"]["bom-ref"]}, (
        "nothing is there that nobody asks for"
    )


def test_licences_are_what_the_packages_say() -> None:
    text = sbom.PAGE.read_text()
    listed = sbom.before()
    every = {pin.name: pin.version for which in ENDS for pin in locks.installed(which)}
    assert set(listed) == set(every), "run: python docs/security/make_sbom.py"
    compared = 0
    for name, number in every.items():
        try:
            here = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        if here == number:
            compared += 1
            assert listed[name] == sbom.licence(name, number, {}).replace("|", "/"), name
    assert compared > 0.9 * len(every)
    assert "(GPL, AGPL): none." in text


@pytest.mark.parametrize("which", ENDS)
def test_the_same_locks_give_the_same_bytes(which: str) -> None:
    made = json.dumps(sbom.bill(which, sbom.before()), indent=1, ensure_ascii=False) + "\n"
    assert made == (HERE / f"{which}.cdx.json").read_text()


# -- advisories --------------------------------------------------------------------------------------------------------

LOCK = """bad-package==1.4.2 \\
    --hash=sha256:{hash}
    # via fedvfm (pyproject.toml)
good==2.0 \\
    --hash=sha256:{hash}
"""


def advisory(name: str, number: str = "OSV-1", **entry: Any) -> dict[str, Any]:
    package = {"ecosystem": "PyPI", "name": name}
    affected = [{"package": package, **entry}]
    return {"id": number, "aliases": ["CVE-0000-1"], "modified": "2026-01-02T00:00:00Z", "affected": affected}


def ranged(*events: dict[str, str]) -> dict[str, Any]:
    return {"ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "requirements.lock"
    path.write_text(LOCK.format(hash="0" * 64))
    return path


def check(path: Path, lock: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), str(path), "--lock", str(lock), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("entry", "hit"),
    [
        (ranged({"introduced": "0"}, {"fixed": "1.4.3"}), True),
        (ranged({"introduced": "0"}, {"fixed": "1.4.2"}), False),
        (ranged({"introduced": "1.5"}), False),
        (ranged({"introduced": "1.0"}, {"last_affected": "1.4.2"}), True),
        (ranged({"introduced": "1.0"}, {"last_affected": "1.4.1"}), False),
        (ranged({"fixed": "1.2"}, {"introduced": "0"}, {"introduced": "1.4"}, {"fixed": "1.4.9"}), True),
        (ranged({"introduced": "0"}, {"fixed": "1.2"}, {"introduced": "1.4.3"}), False),
        ({"versions": ["1.4.2"]}, True),
        ({"versions": ["1.4.1"]}, False),
        (ranged({"introduced": "not a version"}), True),
        ({"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]}, True),
        ({"ranges": [{"type": "ECOSYSTEM", "events": []}]}, True),
        ({"versions": ["1.4.2.0"]}, True),
        ({"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}], "versions": ["1.0"]}, False),
    ],
)
def test_whether_a_version_is_affected(entry: dict[str, Any], hit: bool) -> None:
    module = load("check_advisories")
    assert bool(module.affects(entry, "1.4.2")) is hit


def test_an_affected_package_is_denied_until_a_person_accepts_it(tmp_path: Path, lock: Path) -> None:
    rows = [
        advisory("Bad_Package", **ranged({"introduced": "0"}, {"fixed": "1.5"})),
        advisory("good", "OSV-2", **ranged({"introduced": "0"}, {"fixed": "1.0"})),
        {**advisory("good", "OSV-3", versions=["2.0"]), "withdrawn": "2026-01-01T00:00:00Z"},
        {"id": "OSV-4", "affected": [{"package": {"ecosystem": "npm", "name": "good"}, "versions": ["2.0"]}]},
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"vulns": rows}))
    done = check(path, lock)
    assert (done.returncode, done.stdout) == (1, "bad-package 1.4.2: CVE-0000-1 OSV-1 (in a range)\n")
    assert "2 packages, 2 advisories, the newest of 2026-01-02" in done.stderr
    assert check(path, lock, "--accept", "CVE-0000-1").returncode == 0


def test_folders_of_yaml_and_zips_are_read(tmp_path: Path, lock: Path) -> None:
    folder = tmp_path / "vulns" / "bad-package"
    folder.mkdir(parents=True)
    row = advisory("bad-package", versions=["1.4.2"])
    (folder / "PYSEC-1.yaml").write_text(yaml.safe_dump(row))
    assert check(tmp_path / "vulns", lock).returncode == 1
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        packed.writestr("OSV-1.json", json.dumps(row))
    assert check(tmp_path / "all.zip", lock).returncode == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}', '[{"id": "OSV-9", "affected": []}]'])
def test_what_says_nothing_is_no_clean_bill(tmp_path: Path, lock: Path, text: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    done = check(path, lock)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_the_locks_are_read_whole() -> None:
    for which in ENDS:
        pins = locks.read(locks.LOCKS[which])
        assert all(len(digest) == 64 for pin in pins for digest in pin.hashes)
        assert all(pin.asked_by for pin in pins), "each says who asks for it"


@pytest.mark.parametrize("text", ["a==1\n", "what is this\n"])
def test_a_lock_without_hashes_or_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.lock").write_text(text)
    with pytest.raises(ValueError, match=r"has no hash|what is"):
        locks.read(tmp_path / "a.lock")
