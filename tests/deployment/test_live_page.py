"""The live pages of a real federation, in a real browser where there is one: they follow it, and end nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client.gate import policy
from fedvfm.runtime import page_server, processes
from tests.deployment import browser, two_hospitals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
ROUNDS, LONG_S = 3, 900.0
END = "finished; the final adapter waits for your decision"


@pytest.fixture
def two(tiny: Any, tmp_path: Path) -> Iterator[two_hospitals.Two]:
    with two_hospitals.enrolled(tiny, tmp_path, tiny.recipe) as made:
        allowed = policy.accepting(policy.Facts.of(made.locked)).replace("units = 10", "units = 1")
        for site in two_hospitals.SITES:
            made.settings(site).write_text(tiny.site(site) + allowed)
        yield made


def read(run: Path) -> dict[str, Any]:
    """What a page says, for scripts; nothing where it does not answer."""
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException, errors.EngineError):
        url = page_server.read_address(run).url
        with urllib.request.urlopen(f"{url}status.json", timeout=LONG_S) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found
    return {}


def test_pages_follow_a_federation_to_its_end(two: two_hospitals.Two, until: Any, tmp_path: Path) -> None:
    server_run, east_run = two.server.folder / "run", two.folder / "east" / "run"
    server = two.start_server("--page", "--stay")
    clients = [two.start("client", "start", f"{site}.toml", "--state", site, "--page") for site in two.names]
    assert until(lambda: read(server_run) and read(east_run), LONG_S), two.said()
    tokens = {run: page_server.read_address(run).token for run in (server_run, east_run)}
    with contextlib.ExitStack() as during:
        tab = during.enter_context(browser.opened(tmp_path / "profile")) if browser.CHROMIUM else None
        if tab is not None:
            tab.size(1280, 900, dark=False)
            tab.open(page_server.read_address(server_run).url)
            tab.until("document.getElementById('connection')?.textContent.startsWith('live')")
            tab.ask("window.sameDocument = true")
        journal = two.run / "journal.jsonl"
        assert until(lambda: journal.exists() and journal.read_text().count("\n") >= 1, LONG_S), two.said()

        # Killed, the page comes back by itself, and nothing else is touched.
        page = processes.running(processes.pid_path(server_run, page_server.NAME))
        assert page is not None
        os.kill(page, signal.SIGKILL)
        assert until(lambda: read(server_run).get("finished"), LONG_S), two.said()
        now = read(server_run)
        assert (now["finished_rounds"], now["phase"]) == (ROUNDS, "finished")
        assert {row["acceptance"] for row in now["sites"].values()} == {"pending"}
        assert now["today"]["kinds"]["train"]["messages"] == 2 * ROUNDS
        assert server.poll() is None
        if tab is not None:
            check_browser(tab, two, tmp_path)

    site = read(east_run)
    (row,) = site["recipes"].values()
    assert (row["round"], row["rounds"], row["rounds_used"], row["max_rounds"]) == (ROUNDS, ROUNDS, ROUNDS, ROUNDS)
    assert site["now"]["says"].startswith(END)
    # Every hospital's console tells of the end while it runs; once it has ended it has told everything, and once.
    assert until(lambda: two.said().count(END) == 2, LONG_S), two.said()
    assert all(client.poll() is None for client in clients)
    two.end()
    said = two.said()
    for number in range(1, ROUNDS + 1):
        assert said.count(f"round {number} of {ROUNDS}: trained on ") == 2, "a line a round at each hospital's console"
    assert said.count(END) == 2
    for run, token in tokens.items():
        assert token not in said
        logs = b"".join(path.read_bytes() for path in run.glob("*.log"))
        assert token.encode() not in logs


def check_browser(tab: browser.Tab, two: two_hospitals.Two, folder: Path) -> None:
    """The same document is still there and shows the end; on a phone and in the dark nothing is too wide."""
    tab.until("document.body.innerText.includes('finished after round 3 of 3')")
    assert tab.ask("window.sameDocument"), "it was not loaded again"
    tab.until("document.querySelectorAll('figure svg').length >= 3")
    address = page_server.read_address(two.server.folder / "run").url
    assert {request.removeprefix(address) for request in tab.requests} <= {
        "",
        "events",
        "page.css",
        "page.js",
        "data:,",
    }
    backgrounds = set()
    for width, dark in ((1280, False), (390, True)):
        tab.size(width, 844, dark=dark)
        assert tab.too_wide() == []
        assert tab.ask("document.documentElement.scrollWidth") <= width
        backgrounds.add(tab.ask("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    blocked = [text for text in tab.complaints if "Content Security Policy" in text or "exception" in text.lower()]
    assert blocked == []
    tab.ask("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = true\">')")
    tab.ask("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = true'}))")
    assert not tab.ask("window.ran"), "the policy lets no script of anybody else run"
