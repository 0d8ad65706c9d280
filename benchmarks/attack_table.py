"""The attack table: every attack against a real federation of fedvfm and against Flower as it comes.

    python benchmarks/attack_table.py [--page docs/security/attacks.md]

Real SuperLinks, proxies, SuperNodes and executors on loopback, and nodes that lie; a quarter of an hour on two cores.
Writes the tables between the page's markers. What another user of the machine reaches is tried where this runs as root.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import block

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "deployment"), str(ROOT)]

from attacks import table  # noqa: E402 - the attacks lie beside their tests


def tiny(folder: Path) -> Any:
    """The tiny experiment of the command line's tests: its data and its backbone."""
    spec = importlib.util.spec_from_file_location("fedvfm_cli_conftest", ROOT / "tests" / "cli" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.write(folder, None)  # its commands are started here, as processes of their own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "security" / "attacks.md")
    given = parser.parse_args()
    folders = {name: Path(tempfile.mkdtemp(prefix=f"fedvfm-attacks-{name}-")) for name in ("tiny", "ours", "stock")}
    try:
        found = table.attack_ours(folders["ours"], tiny(folders["tiny"]), as_nobody=os.getuid() == 0)
        if found.code != 0 or found.canary or found.secrets or found.open_files:
            sys.exit(f"an attack came through: {found.code}, {found.canary}, {found.secrets}, {found.open_files}")
        block.write(given.page, "attacks", table.markdown(found, table.attack_stock(folders["stock"])))
        print(f"{given.page}: written; the federation took {found.seconds:g} s")
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
