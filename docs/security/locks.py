"""What the locks of coordinator, site and demo hold: name, version, marker, file hashes, who asks for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCKS = {
    "server": ROOT / "server" / "requirements.lock",
    "site": ROOT / "client" / "requirements.lock",
    "demo": ROOT / "client" / "demo.lock",
}
TORCH = re.compile(r"^(torch)==(\S+)$", re.MULTILINE)
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)(?:\s*;\s*([^\\]*?))?\s*\\?$")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_VIA = re.compile(r"^\s+#\s+(?:via\s+)?(\S.*)$")
_NEVER = "sys_platform == 'never'"


def normal(name: str) -> str:
    """A package's name as the index spells it: lower case, dashes."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Pin:
    """One package of a lock.

    Attributes:
        name: normalised.
        version: exactly.
        marker: of the environments that it is installed in; empty for all.
        hashes: sha256 of every file that may be installed.
        asked_by: names of packages that need it; "fedvfm" for those that the project asks for.
    """

    name: str
    version: str
    marker: str = ""
    hashes: tuple[str, ...] = ()
    asked_by: tuple[str, ...] = ()


def read(path: Path) -> list[Pin]:
    """The packages that a lock installs somewhere, by name.

    Raises:
        ValueError: for a line that is none of a lock, or a package without a hash.
    """
    pins, name, version, marker = [], "", "", ""
    hashes: list[str] = []
    parents: list[str] = []

    def close() -> None:
        if name and marker != _NEVER:
            if not hashes:
                raise ValueError(f"{path}: {name}=={version} has no hash")
            pins.append(Pin(name, version, marker, tuple(hashes), tuple(sorted(set(parents)))))

    for line in path.read_text(encoding="utf-8").splitlines():
        pin, digest, via = _PIN.match(line), _HASH.search(line), _VIA.match(line)
        if pin:
            close()
            name, version, marker = normal(pin[1]), pin[2], pin[3] or ""
            hashes, parents = [], []
        elif digest:
            hashes.append(digest[1])
        elif via and name:
            parent = via[1].partition(" (")[0].strip()
            if not parent.startswith(("-c", "-r", "--", "via")):
                parents.append(normal(parent))
        elif line.strip() and not line.lstrip().startswith("#"):
            raise ValueError(f"{path}: what is '{line[:80]}'?")
    close()
    return sorted(pins, key=lambda each: each.name)


def torch() -> Pin:
    """torch, which stands in no lock, as its build depends on the machine: its version is that of the constraints."""
    (match,) = TORCH.findall((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    return Pin("torch", match[1], asked_by=("fedvfm",))


def installed(which: str) -> list[Pin]:
    """All packages of an end, torch among them where it trains."""
    pins = read(LOCKS[which])
    return pins if which == "server" else sorted([*pins, torch()], key=lambda each: each.name)
