"""The live page's server: who may read it, what it sends when, and that it writes its token nowhere else."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fedvfm import errors
from fedvfm.report import live_page, page
from fedvfm.runtime import page_server, processes

TOKEN = "t" * 43


class Shown:
    """A file and what the page says of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.looks = path, 0
        self.set("first")

    def set(self, text: str) -> None:
        self.path.write_text(text)

    def look(self) -> live_page.Content:
        self.looks += 1
        text = self.path.read_text()
        if text == "damaged":
            raise errors.CheckpointError("line 3 does not continue the chain")
        parts = {"head": "<p>always</p>", "body": page.paragraph(text)}
        return live_page.Content("Town", parts, {"text": text})


class Terminal(io.StringIO):
    """A stream that is a terminal, or is not."""

    def __init__(self, is_one: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_one  # type: ignore[method-assign]


class Page:
    """The server, and requests to it."""

    def __init__(self, port: int, shown: Shown, source: page_server.Source) -> None:
        self.port, self.shown, self.source = port, shown, source

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read().decode()

    def parts(self, number: int, between: Callable[[], object] = lambda: None) -> list[dict[str, str]]:
        """The first events of a stream; ``between`` is done once the first has come."""
        connection, events = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10), []
        with contextlib.closing(connection):
            connection.request("GET", f"/{TOKEN}/events")
            answer = connection.getresponse()
            while len(events) < number:
                line = answer.readline().decode()
                if line.startswith("data: "):
                    events.append(json.loads(line[6:]))
                    between() if len(events) == 1 else None
        return events


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setattr(page_server, "LOOK_S", 0.02)
    shown = Shown(tmp_path / "file")
    source = page_server.Source(shown.look, lambda: [shown.path])
    app = page_server.application(TOKEN, source)
    port = processes.free_port()
    server = uvicorn.Server(page_server.settings(app, port))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Page(port, shown, source)
    finally:
        server.should_exit = True
        thread.join()


def test_it_opens_with_the_token_on_this_machine_and_in_no_other_way(served: Page, capfd: Any) -> None:
    whole = f"/{TOKEN}/"
    assert served.ask(whole)[0] == 200
    for path in (
        "/",
        "/events",
        f"/{TOKEN}",
        f"/{TOKEN[:-1]}/",
        f"/{TOKEN}x/",
        "//" + whole,
    ):
        assert served.ask(path)[0] == 404, path
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example:80", "", "0.0.0.0:1"):
        assert served.ask(whole, Host=host)[0] == 421, host
    assert served.ask(whole, Host="localhost:9999")[0] == 200, "an SSH tunnel has a port of its own"
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert served.ask(whole, method)[0] == 405
    assert served.ask(whole + "nothing")[0] == 404
    assert TOKEN not in "".join(capfd.readouterr())


def test_every_answer_forbids_what_a_page_of_ours_does_not_need(served: Page) -> None:
    for path in ("/", f"/{TOKEN}/", f"/{TOKEN}/page.js", f"/{TOKEN}/page.css", f"/{TOKEN}/status.json"):
        headers = served.ask(path)[1]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert (headers["cache-control"], headers["referrer-policy"]) == ("no-store", "no-referrer")
        assert headers["x-frame-options"] == "DENY"
        assert "server" not in headers
    text = served.ask(f"/{TOKEN}/")[2]
    assert not re.search(r"<script(?! src=)|\son\w+=|style=|https?://", text), "nothing inline, nothing from elsewhere"
    assert served.ask(f"/{TOKEN}/page.js")[1]["content-type"].startswith("text/javascript")
    assert json.loads(served.ask(f"/{TOKEN}/status.json")[2]) == {"text": "first"}


def test_only_parts_that_changed_are_sent_and_nothing_is_made_anew_without_a_change(served: Page) -> None:
    first, second = served.parts(2, lambda: served.shown.set("<b>second</b>"))
    assert set(first) == {"head", "body"}
    assert second == {"body": "<p>&lt;b&gt;second&lt;/b&gt;</p>"}
    looks = served.shown.looks
    for _ in range(3):
        time.sleep(0.03)
        assert "second" in served.ask(f"/{TOKEN}/")[2]
    assert served.shown.looks == looks


def test_what_cannot_be_read_is_said_and_what_can_comes_back(served: Page) -> None:
    _, second = served.parts(2, lambda: served.shown.set("damaged"))
    assert "This cannot be read now: line 3 does not continue the chain" in second["head"]
    assert second["body"] == ""
    time.sleep(0.03)
    served.shown.set("mended")
    assert "<p>mended</p>" in served.parts(1)[0]["body"]


def test_files_that_cannot_be_named_end_nothing(served: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the state folder's own file is damaged."""

    def damaged() -> list[Path]:
        raise errors.TrustError("federation file: is no strict JSON")

    monkeypatch.setattr(served.source, "_files", damaged)
    time.sleep(0.03)
    status, _, text = served.ask(f"/{TOKEN}/")
    assert (status, "This cannot be read now: federation file: is no strict JSON" in text) == (200, True)


def test_few_may_look_on_at_a_time(served: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "MOST_STREAMS", 0)
    assert served.ask(f"/{TOKEN}/events")[0] == 503


def test_the_address_is_new_each_time_private_and_never_in_a_command(tmp_path: Path, said: Any) -> None:
    programs: list[processes.Program] = []
    for _ in range(2):
        page_server.start(programs.append, tmp_path, "fedvfm.server.live_page", "STATE")
        address = page_server.read_address(tmp_path)
        assert address.token not in " ".join([*programs[-1].command, *said()])
    assert stat.S_IMODE((tmp_path / page_server.FILE).stat().st_mode) == 0o600
    assert len(address.token) == 43
    assert said()[0] == said()[1] == f"page: its address is the url in {tmp_path / page_server.FILE}"
    assert page_server.read_address(tmp_path).url == f"http://127.0.0.1:{address.port}/{address.token}/"
    for _ in range(2):
        page_server.forget(tmp_path)
        assert not (tmp_path / page_server.FILE).exists(), "the page has ended"


@pytest.mark.parametrize(("out", "err"), [(True, True), (False, True), (True, False)])
def test_the_address_is_said_where_nothing_goes_into_a_file(
    out: bool, err: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records go to standard error, or as JSON to standard output."""
    monkeypatch.setattr(sys, "stdout", Terminal(out))
    monkeypatch.setattr(sys, "stderr", Terminal(err))
    words = page_server.introduce(tmp_path, page_server.Address(80, TOKEN))
    assert (TOKEN in words) == (out and err)


def test_a_port_that_is_taken_is_one_error(tmp_path: Path, served: Page) -> None:
    with pytest.raises(
        errors.EngineError, match=f"the page cannot be at 127.0.0.1:{served.port}: Address already in use"
    ):
        page_server.prepare(tmp_path, served.port)
