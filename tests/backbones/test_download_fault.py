"""``weights fetch`` tells a typo, a gated repository, a proxy and no network apart; real servers on loopback."""

from __future__ import annotations

import base64
import datetime
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedvfm import errors
from fedvfm.backbones import stored
from fedvfm.config import schema
from fedvfm.trust import certificates, keys

HEADERS = {
    "someone/typo": (404, "RepoNotFound"),
    "someone/private": (401, ""),
    "someone/gated": (403, "GatedRepo"),
    "someone/gated-to-strangers": (401, "GatedRepo"),
    "someone/old": (404, "RevisionNotFound"),
    "someone/broken": (500, ""),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as Hugging Face does for these repositories; as a proxy it lets nothing through."""

    def do_GET(self) -> None:
        name = next((name for name in HEADERS if f"/models/{name}" in self.path), "someone/broken")
        status, code = HEADERS[name]
        self.send_response(status)
        self.send_header("X-Error-Code", code) if code else None
        body = json.dumps({"error": "no"}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        """To a proxy: one name of a user is refused, another is asked for its password."""
        given = base64.b64decode(self.headers.get("Proxy-Authorization", "").removeprefix("Basic "))
        self.send_error(407 if given.startswith(b"stranger:") else 403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import huggingface_hub
    import huggingface_hub.constants

    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


def fetch(monkeypatch: pytest.MonkeyPatch, place: str, name: str, revision: str | None = None) -> errors.WeightsError:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
    with pytest.raises(errors.WeightsError) as caught:
        stored.fetch(schema.BackboneConfig(name=name, revision=revision))
    assert caught.value.exit_code == errors.WeightsError.exit_code
    return caught.value


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("someone/typo", "weights-unknown"),
        ("someone/private", "weights-unknown"),
        ("someone/gated", "weights-gated"),
        ("someone/gated-to-strangers", "weights-gated"),
        ("someone/old", "weights-unknown"),
        ("someone/broken", "weights"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, server: str, name: str, code: str) -> None:
    error = fetch(monkeypatch, f"http://{server}", name, "v1" if name == "someone/old" else None)
    assert error.code == code, error


def test_a_slip_is_told_the_nearest(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    monkeypatch.setitem(HEADERS, "facebook/dinov2-smal", (404, "RepoNotFound"))
    error = fetch(monkeypatch, f"http://{server}", "facebook/dinov2-smal")
    assert (error.code, "facebook/dinov2-small'" in str(error)) == ("weights-unknown", True)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(monkeypatch, "http://127.0.0.1:9", "someone/typo").code == "network"


def test_nothing_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(monkeypatch, "http://127.0.0.1:9", "someone/typo").code == "network"


@pytest.mark.parametrize(("user", "alive"), [("me", True), ("stranger", True), ("me", False)])
def test_a_proxy_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, server: str, user: str, alive: bool
) -> None:
    """One that refuses (403), one that wants another password (407), one that is dead."""
    proxy = server if alive else "127.0.0.1:9"
    monkeypatch.setenv("HTTPS_PROXY", f"http://{user}:secret@{proxy}")
    error = fetch(monkeypatch, "https://huggingface.co", "someone/typo")
    assert error.code == "proxy", error
    assert proxy in str(error)
    assert "secret" not in str(error)


def test_a_certificate_that_is_not_trusted_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where a hospital's proxy opens what is encrypted: the remedy is its authority."""
    now = datetime.datetime.now(datetime.UTC)
    key, certificate = certificates.make_server(*certificates.make_authority("a proxy", now), ["127.0.0.1"], now)
    keys.write_private(tmp_path / "key.pem", key, pem=True)
    (tmp_path / "certificate.pem").write_text(certificates.to_pem(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        error = fetch(monkeypatch, f"https://127.0.0.1:{listening.server_address[1]}", "someone/typo")
        listening.shutdown()
        thread.join()
    assert (error.code, "SSL_CERT_FILE" in str(error)) == ("proxy", True), error
