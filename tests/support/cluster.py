"""A stand-in for a cluster's scheduler: ``cluster.py ROOT submit FOLDER``, ``query JOB``, ``cancel JOB``.

Jobs are real processes in a network namespace of their own that has no interface up (``unshare --net``), with a bare
environment. ROOT/plan says what becomes of the next jobs, a word a line: "run" (the default, once the file is used up),
"kill=POINT" (killed at this fault point), "lost" (gone at once), "wait" (never begins), "refuse" (taken by nobody).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

ALONE = ("unshare", "--map-root-user", "--net")
SCRIPT = """
cut -d: -f1 /proc/net/dev | tail -n +3 | tr -d ' ' > "$ROOT/interfaces"
env | cut -d= -f1 | sort > "$ROOT/environment"
if "$PYTHON" -c 'import socket; socket.create_connection(("127.0.0.1", 9), 2)' 2> "$ROOT/connect"; then exit 9; fi
exec "$PYTHON" -m fedvfm.client.batch.job "$FOLDER"
"""


def permitted() -> bool:
    """Whether this machine lets a user make a network namespace."""
    if shutil.which(ALONE[0]) is None:
        return False
    return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0


def settings(root: Path, **more: object) -> str:
    """The table ``[batch]`` of a site's file."""
    root.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).absolute()), str(root)]
    rows: dict[str, object] = {
        "spool": str(root / "spool"),
        "submit": [*command, "submit", "{folder}"],
        "query": [*command, "query", "{job}"],
        "cancel": [*command, "cancel", "{job}"],
        "poll_s": 0.1,
    }
    rows |= more
    return "[batch]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rows.items())


def log(root: Path) -> list[str]:
    """What the scheduler was asked, a verb each."""
    path = root / "asked"
    return path.read_text().split() if path.exists() else []


def _next(root: Path) -> str:
    path = root / "plan"
    words = path.read_text().split() if path.exists() else []
    path.write_text("\n".join(words[1:]))
    return words[0] if words else "run"


def _submit(root: Path, folder: str) -> int:
    word = _next(root)
    if word == "refuse":
        print("error: Batch job submission failed: Invalid partition", file=sys.stderr)
        return 1
    if word in ("lost", "wait"):
        print(f"Submitted batch job {word}")
        return 0
    given = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "ROOT": str(root),
        "FOLDER": folder,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "FEDVFM_CACHE": str(root / "no-cache"),
        "OMP_NUM_THREADS": "1",
    }
    if word.startswith("kill="):
        given |= {"FEDVFM_FAULT_POINT": word.removeprefix("kill="), "PYTEST_CURRENT_TEST": "a job"}
    process = subprocess.Popen(
        [*ALONE, "sh", "-c", SCRIPT],
        env=given,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    print(f"Submitted batch job {process.pid}")
    return 0


def _alive(job: str) -> bool:
    if not job.isdigit():
        return job == "wait"
    try:
        return psutil.Process(int(job)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(place: str, verb: str, what: str) -> int:
    root = Path(place)
    with (root / "asked").open("a") as file:
        file.write(f"{verb}\n")
    (root / f"seen-by-{verb}").write_text("\n".join(sorted(os.environ)))
    if verb == "submit":
        return _submit(root, what)
    if verb == "query":
        print("RUNNING" if _alive(what) else "", end="")
        return 0
    if what.isdigit() and _alive(what):
        psutil.Process(int(what)).kill()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
