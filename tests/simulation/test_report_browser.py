"""The report in a real browser: it renders, it is as wide as the screen, and it asks nobody for anything."""

from __future__ import annotations

import contextlib
import html.parser
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; install it to check the report in a browser"),
]


def render(page: Path, profile: Path, *options: str, width: int = 1280) -> str:
    """The page's DOM after Chromium has laid it out."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"]
    # What the browser itself wants from its maker finds no address; only this machine can be reached.
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    command += [f"--user-data-dir={profile}", f"--window-size={width},900", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def asked_by_page(log: Path) -> set[str]:
    """Addresses the page asked for, from Chromium's network log; requests of the browser itself have no origin."""
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    started = [
        event for event in events if "url" in event and event.get("initiator", "not an origin") != "not an origin"
    ]
    return {event["url"] for event in started if not event["url"].startswith(("data:", "file:"))}


def with_probe(page: Path, to: Path) -> Path:
    """A copy that writes its own width into the title, which the page itself, having no script, cannot."""
    probe = (
        "<script>addEventListener('load', () => { const wide = [...document.querySelectorAll('body *')]"
        ".filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);"
        "document.title = JSON.stringify({view: innerWidth, page: document.documentElement.scrollWidth, wide,"
        "broken: [...document.images].filter(i => !i.naturalWidth).length}); })</script></body>"
    )
    text = page.read_text(encoding="utf-8").replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    )
    to.write_text(text.replace("</body>", probe), encoding="utf-8")
    return to


class Dom(html.parser.HTMLParser):
    """Sections, addresses and the title of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.sections: list[str | None] = []
        self.addresses: list[str] = []
        self.title, self._in_title = "", False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.sections.append(given.get("id"))
        self.addresses += [str(given[name]) for name in ("src", "href", "srcset", "data") if given.get(name)]
        self._in_title = tag == "title" and not self.title

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data


@contextlib.contextmanager
def counting_server() -> Iterator[tuple[str, list[str]]]:
    """A web server of this machine and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_page_renders_with_all_sections_and_only_its_own_data(tiny_run: Path, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    dom = Dom(render(tiny_run / "report.html", tmp_path / "profile", f"--log-net-log={log}"))
    first = ["benefit", "home", "arms", "findings", "sites"]
    assert dom.sections == [*first, "samples", "matrix", "training", "bytes", "hospitals", "environment"]
    assert dom.addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in dom.addresses)
    assert dom.title == "Boxes <tiny> & drawn"
    assert asked_by_page(log) == set()


@pytest.mark.parametrize("width", [1280, 520])
def test_nothing_is_wider_than_the_screen_or_broken(tiny_run: Path, tmp_path: Path, width: int) -> None:
    page = with_probe(tiny_run / "report.html", tmp_path / "page.html")
    seen = json.loads(Dom(render(page, tmp_path / "profile", width=width)).title)
    assert seen["view"] == width
    assert seen["page"] <= width
    assert seen["wide"] == []
    assert seen["broken"] == 0


def test_the_policy_stops_what_someone_might_put_in(tiny_run: Path, tmp_path: Path) -> None:
    source = (tiny_run / "report.html").read_text(encoding="utf-8")
    with counting_server() as (address, asked):
        beacon = f'<img src="{address}/beacon"><script>fetch("{address}/script")</script></body>'
        for name, text in (("held", source), ("free", source.replace("Content-Security-Policy", "X-Nothing"))):
            (tmp_path / f"{name}.html").write_text(text.replace("</body>", beacon), encoding="utf-8")
        render(tmp_path / "held.html", tmp_path / "profile-1")
        assert asked == []
        log = tmp_path / "net.json"
        render(tmp_path / "free.html", tmp_path / "profile-2", f"--log-net-log={log}")
        assert "/beacon" in asked, "the test itself would not see a request"
        assert f"{address}/beacon" in asked_by_page(log)
