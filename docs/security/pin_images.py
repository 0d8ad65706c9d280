"""Pins the base images of both Dockerfiles by the digest that a registry names now. Needs Docker and a network.

    python docs/security/pin_images.py             # asks, and writes the ARG lines
    python docs/security/pin_images.py --check     # ends with 1 where an image is not pinned; asks nobody

A tag can be moved to other bytes, a digest cannot. Docker takes `name:tag@sha256:...` and looks at the digest alone.
Pin where you build, look at what changed, and build from that commit; to take up a newer image, run it again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = (ROOT / "server" / "Dockerfile", ROOT / "client" / "Dockerfile")
IMAGES = {"PYTHON": "python", "DEBIAN": "debian"}
"""Argument with the tag -> image; the digest's argument is called after it."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
ASK = ("docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}")


def arguments(text: str) -> dict[str, str]:
    """The arguments of a Dockerfile with their defaults."""
    return {name: value.strip('"') for name, value in re.findall(r"^ARG (\w+)=(\S*)$", text, re.MULTILINE)}


def ask(image: str) -> str:
    """The digest of an image in its registry: that of the list of all platforms.

    Raises:
        ValueError: if there is none to be had.
    """
    try:
        done = subprocess.run([*ASK, image], capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{image}: docker cannot be asked: {error}") from error
    said = done.stdout.strip()
    if done.returncode or not DIGEST.fullmatch(said):
        raise ValueError(f"{image}: no digest: {(done.stderr.strip() or said)[:300]}")
    return said


def pinned(text: str) -> dict[str, bool]:
    """Image with its tag -> whether the Dockerfile names its digest."""
    values = arguments(text)
    return {
        f"{image}:{values[name]}": bool(re.fullmatch(rf"@{DIGEST.pattern}", values.get(f"{name}_DIGEST", "")))
        for name, image in IMAGES.items()
        if name in values
    }


def with_digests(text: str, known: dict[str, str]) -> str:
    """The Dockerfile with digests; ``known``: image with its tag -> digest."""
    values = arguments(text)
    for name, image in IMAGES.items():
        if name in values:
            digest = known[f"{image}:{values[name]}"]
            text, count = re.subn(rf"(?m)^ARG {name}_DIGEST=.*$", f'ARG {name}_DIGEST="@{digest}"', text)
            if count != 1:
                raise ValueError(f"there is no line ARG {name}_DIGEST")
    return text


def main() -> int:
    """Ask and write, or look alone; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether both files name digests")
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    given = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in given.files}
    images = sorted({image for text in texts.values() for image in pinned(text)})
    if given.check:
        free = sorted({image for text in texts.values() for image, done in pinned(text).items() if not done})
        print("\n".join(f"{image}: by its tag alone" for image in free) or "every base image is pinned by its digest")
        return 1 if free else 0
    try:
        known = {image: ask(image) for image in images}
        made = {path: with_digests(text, known) for path, text in texts.items()}
    except ValueError as error:
        print(f"nothing was changed: {error}", file=sys.stderr)
        return 2
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    print("\n".join(f"{image}@{digest}" for image, digest in known.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
