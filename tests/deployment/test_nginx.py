"""The configuration of nginx that we make, read by a real nginx before a real TLS server that notes what comes through.

Needs nginx (Debian: nginx-light); without it the configuration is only read.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.flower import runtime
from fedvfm.runtime import processes
from fedvfm.server import state_folder
from fedvfm.server.network import nginx
from fedvfm.state import state
from fedvfm.trust import locked_recipe
from tests.deployment import doors

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")
ROUTES = {*((route, "POST") for route in runtime.FLEET_ROUTES), ("/health", "GET")}


def make_server(folder: Path, address: str, *names: str) -> state_folder.State:
    rows = state.Manifest.of([state.ArraySpec("head.bias", (2,), "head")])
    values = {"backbone": {"name": "some/backbone", "sha256": "ab" * 32}, "data": {"class_names": ["rest", "cell"]}}
    chosen = schema.parse(schema.Recipe, values, "recipe")
    initial = state.AdapterState({"head.bias": np.ones(2, np.float32)})
    locked = locked_recipe.LockedRecipe.of(chosen, rows, initial, "ab" * 32, 1000)
    return state_folder.init(folder, state_folder.Plan("trial", address, names, ("north",)), locked)


def test_the_configuration_opens_the_same_routes_as_our_own_proxy() -> None:
    text = nginx.render("9092", "/c.pem", "/k.pem", "server:8443", "/ca.pem", resolver="127.0.0.11")
    assert set(re.findall(r"location = (\S+) \{", text)) == {route for route, _ in ROUTES}
    assert text.count("proxy_pass https://$behind/") == len(ROUTES)
    assert "location / { return 404; }" in text
    assert "proxy_ssl_verify on;" in text
    assert "client_max_body_size 32m;" in text
    assert "resolver 127.0.0.11 valid=10s;\n    set $behind server:8443;" in text
    assert "resolver" not in nginx.render("9092", "/c.pem", "/k.pem", "server:8443", "/ca.pem")
    assert text.count("{") == text.count("}")


def test_only_what_nginx_needs_is_written(tmp_path: Path) -> None:
    where = make_server(tmp_path / "server", "fed.example:8443", "server")
    made = nginx.Front(tmp_path / "edge", "8443", "server:8443").write(where)
    assert sorted(path.name for path in made.parent.iterdir()) == [
        "authority.pem",
        "nginx.conf",
        "server.key",
        "server.pem",
    ]
    assert {path.stat().st_mode & 0o777 for path in made.parent.iterdir()} == {0o600}
    assert "proxy_ssl_name server;" in made.read_text()
    assert "authority.key" not in made.read_text()
    alone = make_server(tmp_path / "alone", "192.0.2.7:8443")
    with pytest.raises(errors.ConfigError, match="certify --san localhost"):
        nginx.Front(tmp_path / "edge2", "8443", "192.0.2.8:8443").write(alone)


# -- for real ----------------------------------------------------------------------------------------------------------


class Public(doors.Public):
    def raw(self, data: bytes) -> bytes:
        """What comes back for these bytes, until the end or a pause."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        with self.context().wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            secure.sendall(data)
            secure.settimeout(2)
            found = b""
            with contextlib.suppress(TimeoutError, OSError):
                while piece := secure.recv(65536):
                    found += piece
            return found


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    folder = tmp_path_factory.mktemp("nginx")
    where = make_server(folder / "server", "127.0.0.1:1", "server")
    behind, port, inner = doors.Behind(), processes.free_port(), processes.free_port()
    front = nginx.Front(
        folder / "edge",
        f"127.0.0.1:{port}",
        f"127.0.0.1:{inner}",
        "127.0.0.11",
        str(folder),
        str(folder / "refused.jsonl"),
    )
    made = front.write(where)
    assert NGINX is not None
    words = folder / "words.txt"
    with doors.serving(behind.server(where.certificate, where.key, inner)):
        with words.open("w") as log:
            process = subprocess.Popen([NGINX, "-e", "stderr", "-c", str(made), "-g", "daemon off;"], stderr=log)
        found = Public(port, behind, where.authority, folder / "refused.jsonl")
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, words.read_text()
            assert time.monotonic() < deadline, words.read_text()
            with contextlib.suppress(httpx.TransportError), found.client() as client:
                if client.get("/health").status_code == 200:
                    break
            time.sleep(0.05)
        behind.seen.clear()
        yield found
        process.terminate()
        process.wait(30)


@needs_nginx
def test_what_a_supernode_needs_passes(public: Public) -> None:
    public.behind.seen.clear()
    with public.client() as client:
        for route, method in sorted(ROUTES):
            answer = client.request(method, route, content=None if method == "GET" else b"x" * 7)
            assert (answer.status_code, answer.content) == (200, b"pong")
        piece = np.random.default_rng(0).bytes(6 * 1024 * 1024)
        assert client.post("/v1/fleet/push-object", content=piece, timeout=60).status_code == 200
        chunked = client.post("/v1/fleet/push-object", content=iter([b"a" * 1000] * 3))
        assert chunked.status_code == 200
    sizes = [size for _, route, _, size in public.behind.seen if route == "/v1/fleet/push-object"]
    assert sizes == [7, 6 * 1024 * 1024, 3000]


REFUSED = [
    ("POST", "/v1/control/list-nodes", 403),
    ("POST", "/v1/control/start-run", 403),
    ("POST", "/control/start-run", 403),
    ("POST", "/v1/runtime/acquire-task", 403),
    ("GET", "/docs", 403),
    ("GET", "/openapi.json", 403),
    ("GET", "/redoc", 403),
    ("POST", "/v1/fleet/nothing", 404),
    ("POST", "/v1/fleet/", 404),
    ("POST", "/v1/fleet/pull-messages/", 404),
    ("POST", "/v1/fleet/pull-messages?x=1", 404),
    ("POST", "/v1/fleet/pull-messages?", 404),
    ("POST", "//v1/fleet/pull-messages", 404),
    ("POST", "/v1//fleet/pull-messages", 404),
    ("POST", "/v1/fleet/%70ull-messages", 404),
    ("POST", "/x/../v1/fleet/pull-messages", 404),
    ("POST", "/v1/fleet/../control/list-nodes", 403),
    ("POST", "/v1/fleet/..%2fcontrol/list-nodes", 403),
    ("POST", "/v1/fleet/pull-messages%00", 400),
    ("POST", "/V1/FLEET/PULL-MESSAGES", 404),
    ("GET", "/v1/fleet/pull-messages", 405),
    ("PUT", "/v1/fleet/push-object", 405),
    ("DELETE", "/v1/fleet/push-object", 405),
    ("OPTIONS", "/v1/fleet/push-object", 405),
    ("HEAD", "/health", 405),
    ("POST", "/health", 405),
    ("GET", "/health?x", 404),
    ("GET", "/", 404),
    ("GET", "/metrics", 404),
    ("TRACE", "/health", 405),
    ("CONNECT", "127.0.0.1:9091", 400),
    ("PRI", "*", 400),
]


@needs_nginx
@pytest.mark.parametrize(("method", "target", "status"), REFUSED, ids=lambda value: str(value)[:40])
def test_everything_else_is_refused_and_never_seen_behind(
    public: Public, method: str, target: str, status: int
) -> None:
    public.behind.seen.clear()
    head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    answer = public.raw(head.encode())
    assert answer.split(b" ", 2)[1:2] == [str(status).encode()], answer[:300]
    assert public.behind.seen == []
    assert b"nginx/" not in answer, "the version is not told"


@needs_nginx
def test_requests_that_smuggle_another(public: Public) -> None:
    """Two lengths, an upgrade, a request in a body: what is behind sees one request at most, of an open route."""
    inner = b"POST /v1/control/list-nodes HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    route = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\n"
    attempts = {
        "both lengths": route + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner,
        "two lengths": route + b"Content-Length: 0\r\nContent-Length: 70\r\n\r\n" + inner,
        "odd coding": route + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + inner,
        "upgrade": route + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n",
        "no host": b"POST /v1/fleet/get-run HTTP/1.1\r\n\r\n",
        "two hosts": route + b"Host: y\r\nContent-Length: 0\r\n\r\n",
        "a long head": route + b"X: " + b"a" * 40_000 + b"\r\n\r\n",
        "old HTTP": b"GET /v1/control/list-nodes\r\n\r\n",
        "absolute": b"POST http://127.0.0.1/v1/control/list-nodes HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    }
    for name, data in attempts.items():
        public.behind.seen.clear()
        public.raw(data)
        assert all(one[:2] == ("POST", "/v1/fleet/get-run") for one in public.behind.seen), name
        assert len(public.behind.seen) <= 1, name


@needs_nginx
def test_a_body_over_the_limit_and_another_authority(public: Public) -> None:
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 40000000\r\n\r\n"
    assert b" 413 " in public.raw(head)[:30]
    with socket.create_connection(("127.0.0.1", public.port), timeout=10) as plain:
        stranger = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            stranger.wrap_socket(plain, server_hostname="127.0.0.1")
    old = public.context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", public.port), timeout=10) as plain:
        refused = pytest.raises((ssl.SSLError, ConnectionError))
        with refused:
            old.wrap_socket(plain, server_hostname="127.0.0.1")


@needs_nginx
def test_refusals_are_logged_and_answers_are_not(public: Public) -> None:
    with public.client() as client:
        client.get("/health")
        client.post("/v1/control/list-nodes")

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in public.log.read_text().splitlines()]

    deadline = time.monotonic() + 20
    while not any(line["refused"] == 403 for line in lines()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert {line["refused"] for line in lines()} & {200} == set()
    assert {line["client"] for line in lines()} == {"127.0.0.1"}
