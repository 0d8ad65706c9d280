"""What stands round a site: a hospital's proxy that asks for a password, and a clock that is wrong."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedvfm.runtime import processes

pytestmark = pytest.mark.slow
DEBIANS = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
PROBE = """
import time
began = time.monotonic()
time.sleep(0.2)
assert 0.1 < time.monotonic() - began < 10
print(time.time())
"""
USER = "radiology"
WORKING, REFUSED = (3.0, -60.0, -240.0), (60.0, 3600.0, -3600.0)
"""Seconds a site's clock is ahead of the coordinator's."""
HOST = "127.0.0.2"
"""A loopback address that no program sends past a proxy."""


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """URL of a hospital's proxy without user and password, its password, and its log."""
    port, password, log = processes.free_port(), secrets.token_urlsafe(24), tmp_path / "hospital-proxy.log"
    script = str(Path(__file__).with_name("hospital_proxy.py"))
    process = subprocess.Popen([sys.executable, script, str(port), str(log)], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(f"{USER}:{password}\n")
    process.stdin.flush()
    yield f"127.0.0.1:{port}", password, log
    process.kill()
    process.wait()
    process.stdin.close()


def test_a_hospitals_proxy_and_a_wrong_clock(federation: Any, table: Any, hospital: Any) -> None:
    """South goes through the proxy; the clock of east is set wrong while it runs."""
    fed = federation(rounds=12, host=HOST)
    clock = fed.folder / "clock"
    faked = clock_of(clock)
    fed.start("server")
    fed.start("east", **faked)
    behind_a_proxy(fed, table, hospital)
    if faked:
        for ahead in (*WORKING, *REFUSED):
            skewed(fed, table, clock, ahead)
        clock.write_text("+0\n")
    fed.done()
    fed.whole()
    if not faked:
        pytest.skip("the proxy was tested; a wrong clock needs a libfaketime that Python can sleep under, or cc")


def clock_of(file: Path) -> dict[str, str]:
    """The environment of a process whose clock is off by what stands in a file; nothing where that cannot be done.

    Debian's libfaketime where Python can sleep under it, else the few lines beside this file and a compiler.
    """
    ours = file.with_name("clock.so")
    source = Path(__file__).with_name("clock.c")
    if shutil.which("cc") is not None:
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", ours, source], check=True)
    for library in (DEBIANS, ours):
        found = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        if library.exists() and works(file, found):
            return found
    return {}


def works(file: Path, environment: Mapping[str, str]) -> bool:
    file.write_text("+1000\n")
    try:
        answer = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        file.write_text("+0\n")
    return answer.returncode == 0 and abs(float(answer.stdout) - time.time() - 1000) < 100


def behind_a_proxy(fed: Any, table: Any, hospital: tuple[str, str, Path]) -> None:
    """First with a wrong password: one clear line, nothing gets out; then with the right one."""
    place, password, log = hospital
    wrong = secrets.token_urlsafe(24)
    began = time.monotonic()
    fed.start("south", HTTPS_PROXY=f"http://{USER}:{wrong}@{place}", HTTP_PROXY=f"http://{USER}:{wrong}@{place}")
    fed.until(lambda: "the proxy answered 407 to CONNECT" in fed.said("south"), "the site names the password", "south")
    told = time.monotonic() - began
    fed.until(lambda: log.read_text().count("refused CONNECT") >= 3, "the SuperNode asks too", "south")
    assert "opened" not in log.read_text()
    assert not fed.entries("south", "received", kind="handshake"), "nothing goes past the proxy"
    assert fed.said("south").count("407") == 1
    fed.started["south"].terminate()
    fed.started["south"].wait(600)
    table.row("hospital proxy, wrong password", f"the site says after {told:.0f} s: the proxy answered 407", 0, 0.0)

    began = time.monotonic()
    fed.start("south", HTTPS_PROXY=f"http://{USER}:{password}@{place}", HTTP_PROXY=f"http://{USER}:{password}@{place}")
    taken = fed.finished(1) - began
    targets = {line.split()[2] for line in log.read_text().splitlines() if line.startswith("opened")}
    assert targets == {fed.server.about.address}, "loopback goes past the proxy, all else through it"
    for secret in (password, wrong):
        nowhere(fed, secret)
    table.row("hospital proxy (CONNECT, password)", "works; the password is in no log and no argument", 0, taken)


def nowhere(fed: Any, secret: str) -> None:
    """A password is in no file of any end, and in no process's arguments."""
    for process in psutil.process_iter(["cmdline"]):
        assert not any(secret in word for word in process.info["cmdline"] or []), process
    for path in fed.folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert secret.encode() not in path.read_bytes(), path


def skewed(fed: Any, table: Any, clock: Path, ahead: float) -> None:
    """A site's clock jumps. Refused, it says so by name; set right, it comes back by itself."""
    hurt = fed.round() + 1
    before, well = fed.said("east").count("clock: this clock is"), fed.said("east").count("clock: is well again")
    began = time.monotonic()
    clock.write_text(f"{ahead:+g}\n")
    name = f"site's clock {abs(ahead):g} s {'ahead' if ahead > 0 else 'behind'}"
    if ahead in WORKING:
        if fed.round() < fed.rounds - 2:
            table.row(name, "works", 0, fed.finished(hurt) - began)
        return
    fed.until(lambda: fed.said("east").count("clock: this clock is") > before, "the site names its clock", "east")
    told = time.monotonic() - began
    clock.write_text("+0\n")
    right = time.monotonic()
    fed.faulted.add(hurt)
    taken = fed.finished(fed.round() + 1) - right
    # What is wrong is said once: the next jump is told only after this one was seen to be over.
    fed.until(lambda: fed.said("east").count("clock: is well again") > well, "the site sees that it is right", "east")
    happened = (
        f"refused (401); the site says after {told:.0f} s how its clock is wrong; back by itself; from the right time"
    )
    table.row(name, happened, 0, taken)
    assert os.environ.get("LD_PRELOAD") is None
