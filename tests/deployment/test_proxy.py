"""The proxy through real TLS sockets, before a real HTTP server that notes what comes through."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supernode import node_auth_http_interceptor

from fedvfm.doctor import network
from fedvfm.flower import guards, long_poll, runtime
from fedvfm.flower import supernode as flower_supernode
from fedvfm.report import finding
from fedvfm.runtime import processes
from fedvfm.server.network import connections, node_keys, proxy, refused_requests, turns
from fedvfm.trust import certificates, keys, signed_documents
from tests.deployment import doors

LONG_S = 600.0
"""For what takes no time: a busy machine is slow."""


@dataclass
class Behind(doors.Behind):
    """Stands where the SuperLink stands."""

    answer: bytes = b""
    later: bytes = b""
    pulls: int = 0

    def reply(self, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        if headers.get("x-flwr-client") == "unregistered":
            return 401, b'{"detail":"Invalid SuperNode authentication"}'
        if headers.get("x-flwr-client") == "disk-full":
            return 500, b"Internal Server Error"
        if path.endswith("pull-messages"):
            self.pulls += 1
            return 200, self.later if self.pulls >= 3 else b""
        return 200, self.answer


@dataclass
class Public(doors.Public):
    refusals: list[tuple[str, str]]

    def raw(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        return self.context().wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, now = tmp_path_factory.mktemp("tls"), signed_documents.now()
    authority_key, authority = certificates.make_authority("test", now)
    key, certificate = certificates.make_server(authority_key, authority, ("127.0.0.1",), now)
    (folder / "ca.pem").write_text(certificates.to_pem(authority))
    (folder / "server.pem").write_text(certificates.to_pem(certificate))
    keys.write_private(folder / "server.key", key, pem=True)
    return folder


@pytest.fixture
def public(
    request: pytest.FixtureRequest, certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Public]:
    """The door; a parameter says how long it holds an empty answer. Nobody is cut whom a busy machine keeps waiting."""
    behind, refusals = Behind(), []
    for name in ("HEAD_S", "PIECE_S"):
        monkeypatch.setattr(proxy, name, LONG_S)
    upstream = behind.server(certified / "server.pem", certified / "server.key", processes.free_port())
    settings = proxy.Settings(
        "127.0.0.1",
        processes.free_port(),
        str(certified / "server.pem"),
        str(certified / "server.key"),
        f"127.0.0.1:{upstream.config.port}",
        str(certified / "ca.pem"),
        str(tmp_path / "keys.txt"),
        str(tmp_path / "refused.jsonl"),
        hold_s=getattr(request, "param", LONG_S),
        most_parts=40,
    )
    node_keys.write(tmp_path / "keys.txt", [keys.public_text(KEY)])
    log = refused_requests.Refusals(settings.log)

    def told(what: str, client: str) -> None:
        refusals.append((what, client))
        log(what, client)

    with doors.serving(upstream), doors.serving(proxy.server(settings, told)):
        yield Public(settings.port, behind, certified / "ca.pem", tmp_path / "refused.jsonl", refusals)


def test_a_site_learns_how_it_stands_by_its_own_signature_alone(public: Public, tmp_path: Path) -> None:
    def said(headers: dict[str, str]) -> str:
        with httpx.Client(verify=public.context(), trust_env=False) as client:
            answer = client.get(f"https://127.0.0.1:{public.port}/health", headers=headers)
            assert answer.status_code == 200
            return str(answer.headers.get("fedvfm-standing", ""))

    mine, address = guards.signed_headers(KEY), f"127.0.0.1:{public.port}"
    assert said({}) == ""
    assert said(mine) == "approved"
    assert said({**mine, "flwr-signature": guards.signed_headers(keys.make())["flwr-signature"]}) == "unknown"
    assert said(guards.signed_headers(keys.make())) == "unknown"
    assert flower_supernode.standing(address, public.authority.read_bytes(), KEY) == "approved"
    node_keys.write(tmp_path / "keys.txt", [keys.public_text(KEY)], [keys.public_text(KEY)])
    assert flower_supernode.standing(address, public.authority.read_bytes(), KEY) == "dropped"
    with public.client() as client:
        assert client.post("/v1/fleet/get-run", headers=HEADERS).status_code == 200, "its key is still let in"
    assert flower_supernode.standing("127.0.0.1:9", public.authority.read_bytes(), KEY) == ""


KEY = keys.make()


def signed(key: keys.Private = KEY, seconds: float = 0.0) -> dict[str, str]:
    """What Flower's own SuperNode says of itself with every request; of ``seconds`` ago."""
    request = httpx.Request("POST", "https://x/")
    interceptor = node_auth_http_interceptor.NodeAuthHttpInterceptor(key, key.public_key())
    with pytest.MonkeyPatch.context() as patch:
        then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
        patch.setattr(node_auth_http_interceptor, "now", lambda: then)
        interceptor.intercept(SimpleNamespace(request=request), lambda context: httpx.Response(200))  # type: ignore[arg-type]
    return {
        "content-type": "application/protobuf",
        **{k: v for k, v in request.headers.items() if k.startswith("flwr-")},
    }


HEADERS: dict[str, str] = {}
"""Those of a known node, signed anew for every test."""


def head(headers: Mapping[str, str] = HEADERS) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


@pytest.fixture(autouse=True)
def _signed_now() -> None:
    HEADERS.update(signed())


def push(node: int = 7, source: int = 7, to: int = 1, answers: str = "m1", parts: int = 1) -> bytes:
    about = Metadata(src_node_id=source, dst_node_id=to, reply_to_message_id=answers)
    tree = ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id="1" * 64) for _ in range(parts - 1)])
    made = PushMessagesRequest(
        node=Node(node_id=node), messages_list=[ProtoMessage(metadata=about)], message_object_trees=[tree]
    )
    return made.SerializeToString()


OWN_PUSH = push()


@pytest.mark.parametrize(
    ("body", "status", "what"),
    [
        (push(source=8), 403, "foreign-node"),  # an answer in another's name
        (push(source=1, to=8, answers=""), 403, "foreign-node"),  # an instruction, as if from the coordinator
        (push(answers=""), 403, "foreign-node"),
        (push(parts=41), 413, "size"),
        (b"\xff" * 20, 400, "framing"),
        (push() + b"\x00" * 3_000_000, 413, "size"),
        (push() + push(), 413, "size"),
    ],
    ids=["another's name", "an instruction", "no answer", "many parts", "no push", "a long head", "two messages"],
)
def test_a_node_speaks_for_itself_alone_and_in_few_parts(public: Public, body: bytes, status: int, what: str) -> None:
    with public.client() as client:
        assert client.post("/v1/fleet/push-messages", content=body, headers=HEADERS).status_code == status
        assert client.post("/v1/fleet/push-messages", content=iter([body]), headers=HEADERS).status_code == status
        assert client.post("/v1/fleet/push-messages", content=push(parts=40), headers=HEADERS).status_code == 200
    assert public.refusals == [(what, "127.0.0.1")] * 2
    assert [path for _, path, _, _ in public.behind.seen] == ["/v1/fleet/push-messages"]


def test_every_fleet_route_goes_through_with_its_headers(public: Public) -> None:
    public.behind.answer = b"reply"
    with public.client() as client:
        for route in sorted(runtime.FLEET_ROUTES - {guards.PULL_ROUTE}):
            answer = client.post(route, content=OWN_PUSH, headers=HEADERS)
            assert (answer.status_code, answer.content) == (200, b"reply")
        assert client.get("/health").status_code == 200
    assert len(public.behind.seen) == 12
    method, path, headers, size = public.behind.seen[0]
    assert (method, path, size) == ("POST", "/v1/fleet/activate-node", len(OWN_PUSH))
    assert public.behind.seen[6][1::2] == ("/v1/fleet/push-messages", len(OWN_PUSH))
    assert {key: headers[key] for key in HEADERS} == HEADERS
    assert public.refusals == []


@pytest.mark.parametrize(
    ("method", "path", "status", "what"),
    [
        ("POST", "/v1/control/start-run", 403, "control"),
        ("POST", "/v1/control/register-node", 403, "control"),
        ("POST", "/v1/runtime/acquire-task", 403, "runtime"),
        ("POST", "/v1/runtime/pull-messages", 403, "runtime"),
        ("POST", "/v1/responses", 403, "responses"),
        ("GET", "/docs", 403, "docs"),
        ("GET", "/openapi.json", 403, "openapi"),
        ("GET", "/", 404, "unknown-route"),
        ("POST", "/v1/fleet/../control/start-run", 404, "unknown-route"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run", 404, "unknown-route"),
        ("POST", "/v1/%66leet/get-run", 404, "unknown-route"),
        ("POST", "//v1/control/start-run", 403, "control"),
        ("POST", "/v1/fleet/get-run/", 404, "unknown-route"),
        ("POST", "/v1/fleet/get-run?x=1", 404, "unknown-route"),
        ("POST", "https://127.0.0.1/v1/control/start-run", 404, "unknown-route"),
        ("GET", "/v1/fleet/get-run", 405, "method"),
        ("PUT", "/v1/fleet/get-run", 405, "method"),
        ("POST", "/health", 405, "method"),
        ("CONNECT", "127.0.0.1:22", 404, "unknown-route"),
    ],
)
def test_everything_else_is_refused_and_never_seen(
    public: Public, method: str, path: str, status: int, what: str
) -> None:
    with public.raw() as wire:
        wire.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi".encode())
        head = wire.recv(4096).decode()
    assert head.startswith(f"HTTP/1.1 {status} "), head
    assert public.behind.seen == []
    assert public.refusals == [(what, "127.0.0.1")]
    (line,) = [json.loads(text) for text in public.log.read_text().splitlines()]
    assert (line["refused"], line["client"], line["count"]) == (what, "127.0.0.1", 1)
    assert public.log.stat().st_mode & 0o777 == 0o600


def test_a_flood_of_refusals_is_few_lines(public: Public) -> None:
    started = time.monotonic()
    with public.client() as client:
        for _ in range(30):
            assert client.get("/docs").status_code == 403
    assert len(public.refusals) == 30
    assert 1 <= len(public.log.read_text().splitlines()) <= 2 + time.monotonic() - started


@pytest.mark.parametrize("route", ["/v1/fleet/get-run", guards.PULL_ROUTE])
def test_a_key_the_superlink_refuses_is_told(public: Public, route: str) -> None:
    with public.client() as client:
        answer = client.post(route, headers={**HEADERS, "x-flwr-client": "unregistered"})
    assert answer.status_code == 401
    assert public.refusals == [("key", "127.0.0.1")]


@pytest.mark.parametrize("route", ["/v1/fleet/send-node-heartbeat", guards.PULL_ROUTE])
def test_a_fault_of_the_superlink_is_a_pause_to_a_supernode(public: Public, route: str) -> None:
    with public.client() as client:
        answer = client.post(route, headers={**HEADERS, "x-flwr-client": "disk-full"})
    assert answer.status_code == 503, "after a 500 its heartbeat would end for good"
    assert public.refusals == [("fault", "127.0.0.1")]


def test_bodies_over_five_megabytes_pass_and_those_over_the_cap_do_not(public: Public) -> None:
    with public.client() as client:
        assert client.post("/v1/fleet/push-object", content=os.urandom(6_000_000), headers=HEADERS).status_code == 200
        assert public.behind.seen[-1][3] == 6_000_000

        def pieces() -> Iterator[bytes]:
            yield from (b"x" * 1_000_000 for _ in range(8))

        assert client.post("/v1/fleet/push-object", content=pieces(), headers=HEADERS).status_code == 200
        assert public.behind.seen[-1][3] == 8_000_000
    seen = len(public.behind.seen)
    with public.raw() as wire:
        first = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: {proxy.MAX_PART + 1}\r\n"
        wire.sendall(f"{first}{head()}\r\n".encode())
        assert wire.recv(4096).startswith(b"HTTP/1.1 413 ")
    assert len(public.behind.seen) == seen
    assert public.refusals == [("size", "127.0.0.1")]


def test_an_answer_of_many_megabytes_comes_whole(public: Public) -> None:
    public.behind.answer = os.urandom(7_000_000)
    with public.client() as client:
        assert client.post("/v1/fleet/pull-object", headers=HEADERS).content == public.behind.answer


def test_a_slow_head_a_slow_body_and_a_huge_head_are_cut(public: Public, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as hurried, contextlib.ExitStack() as held:
        hurried.setattr(proxy, "HEAD_S", 0.5)
        wire = held.enter_context(public.raw())
        with contextlib.suppress(OSError):  # reset, or closed
            wire.sendall(b"POST /v1/fleet/get-run HTTP/1.1\r\n")
            for _ in range(600):
                wire.sendall(b"X-A: b\r\n")
                time.sleep(0.1)
            pytest.fail("a head that never ends is read on")
    assert public.refusals == [("slow", "127.0.0.1")]
    with monkeypatch.context() as hurried, contextlib.ExitStack() as held:
        hurried.setattr(proxy, "PIECE_S", 0.5)
        wire = held.enter_context(public.raw())
        first = "POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
        wire.sendall(f"{first}{head()}\r\nabc".encode())
        assert wire.recv(4096).startswith(b"HTTP/1.1 408 ")
    with public.raw() as wire:
        with contextlib.suppress(OSError):
            wire.sendall(b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 40_000 + b"\r\n\r\n")
        with contextlib.suppress(OSError):
            assert wire.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert all(size == 0 or (path.endswith("get-run") and size < 10) for _, path, _, size in public.behind.seen)
    assert ("slow", "127.0.0.1") in public.refusals


def test_smuggling_and_old_or_new_protocols_are_refused(public: Public) -> None:
    two = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
    two += b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with public.raw() as wire:
        wire.sendall(two + b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        wire.recv(4096)
    with public.raw() as wire:
        wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 404 ")
    with public.raw() as wire:
        wire.sendall(b"\x00\x01 garbage\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert [what for what, _ in public.refusals] == ["framing", "unknown-route", "framing"]
    assert public.behind.seen == []
    with socket.create_connection(("127.0.0.1", public.port), timeout=5) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(OSError):
            assert b"200" not in plain.recv(4096)


@pytest.mark.parametrize("name", ["flwr-signature", "flwr-any", "content-type", "x-flwr-client", "Content-Encoding"])
def test_a_header_that_matters_stands_there_once(public: Public, name: str) -> None:
    """Else the SuperLink may read another one than was judged here."""
    twice = f"{name}: a\r\n{name.title()}: a\r\n"
    with public.raw() as wire:
        first = "POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
        wire.sendall(f"{first}{head()}{twice}\r\n".encode())
        assert wire.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert public.refusals == [("framing", "127.0.0.1")]
    assert public.behind.seen == []


def test_old_tls_and_a_foreign_authority_are_refused(public: Public, tmp_path: Path) -> None:
    old = public.context()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)), socket.create_connection(("127.0.0.1", public.port)) as plain:
        old.wrap_socket(plain, server_hostname="127.0.0.1")
    _, foreign = certificates.make_authority("foreign", signed_documents.now())
    (tmp_path / "foreign.pem").write_text(certificates.to_pem(foreign))
    with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("127.0.0.1", public.port)) as plain:
        ssl.create_default_context(cafile=tmp_path / "foreign.pem").wrap_socket(plain, server_hostname="127.0.0.1")


def test_an_empty_answer_for_messages_is_held_until_there_is_one(public: Public) -> None:
    public.behind.later = b"a message"
    with public.client() as client:
        started = time.monotonic()
        answer = client.post(guards.PULL_ROUTE, content=b"who", headers=HEADERS)
        assert (answer.status_code, answer.content) == (200, b"a message")
        assert 0.4 < time.monotonic() - started < LONG_S
    assert [row[3] for row in public.behind.seen] == [3, 3, 3]


def test_the_superlink_is_asked_to_hold_as_long_as_is_left_whatever_the_site_says(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, public.behind.later = long_poll.HEADER.decode(), b"a message"
    with public.client() as client:
        client.post(guards.PULL_ROUTE, content=b"who", headers={**HEADERS, name: "9999"})
        asked = [float(row[2][name]) for row in public.behind.seen]
        assert LONG_S / 2 < asked[0] <= LONG_S
        assert asked == sorted(asked, reverse=True)
        # Beyond so many that wait, the SuperLink is asked to answer at once.
        monkeypatch.setattr(proxy, "LONG_POLLS", 0)
        public.behind.seen.clear()
        public.behind.pulls = 0
        client.post(guards.PULL_ROUTE, content=b"who", headers=HEADERS)
        assert {row[2][name] for row in public.behind.seen} == {"0"}
        public.behind.seen.clear()
        client.post("/v1/fleet/get-run", headers={**HEADERS, name: "9999"})
        assert name not in public.behind.seen[0][2], "no other question is held, and no site says for how long"


@pytest.mark.parametrize("public", [1.0], indirect=True)
def test_it_is_held_no_longer_than_said(public: Public) -> None:
    with public.client() as client:
        started = time.monotonic()
        assert client.post(guards.PULL_ROUTE, headers=HEADERS).content == b""
        assert 0.9 < time.monotonic() - started < LONG_S


def test_it_is_not_held_for_a_site_that_left(public: Public) -> None:
    with public.raw() as wire:
        wire.sendall(f"POST {guards.PULL_ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n{head()}\r\n".encode())
        assert _until(lambda: public.behind.pulls)

    def quiet() -> bool:
        before = public.behind.pulls
        time.sleep(1.0)  # while it is held, the SuperLink is asked twice a second
        return public.behind.pulls == before

    assert _until(quiet)


def test_a_superlink_that_is_away_is_502_so_that_a_supernode_asks_again(certified: Path, tmp_path: Path) -> None:
    node_keys.write(tmp_path / "keys.txt", [keys.public_text(KEY)])
    settings = proxy.Settings(
        "127.0.0.1",
        processes.free_port(),
        str(certified / "server.pem"),
        str(certified / "server.key"),
        f"127.0.0.1:{processes.free_port()}",
        str(certified / "ca.pem"),
        str(tmp_path / "keys.txt"),
    )
    with doors.serving(proxy.server(settings, lambda what, client: None)):
        context = ssl.create_default_context(cafile=certified / "ca.pem")
        with httpx.Client(verify=context, trust_env=False) as client:
            for route in ("/v1/fleet/get-run", guards.PULL_ROUTE):
                url = f"https://127.0.0.1:{settings.port}{route}"
                assert client.post(url, content=b"", headers=HEADERS).status_code == 502


def test_the_program_holds_no_secret_in_its_arguments(tmp_path: Path) -> None:
    settings = proxy.Settings("127.0.0.1", 1, "c", "k", "u", "a", "keys")
    program = replace(settings).program(tmp_path / "proxy.json")
    assert program.command[-1] == str(tmp_path / "proxy.json")
    assert (tmp_path / "proxy.json").stat().st_mode & 0o777 == 0o600


# -- who is let in, before a body is read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "route", "status"),
    [
        (lambda: {}, "get-run", 401),
        (lambda: signed(keys.make()), "get-run", 401),
        (lambda: signed(keys.make()), "activate-node", 412),
        (lambda: {}, "activate-node", 401),
        (lambda: {**HEADERS, "flwr-timestamp": signed(seconds=1)["flwr-timestamp"]}, "get-run", 401),
        (lambda: signed(seconds=400), "get-run", 401),
        (lambda: signed(seconds=-20), "get-run", 401),
        (lambda: {**HEADERS, "flwr-signature": "?"}, "push-object", 401),
        (lambda: {**HEADERS, "flwr-timestamp": "2026-01-01T00:00:00"}, "push-object", 401),
    ],
    ids=["none", "unknown", "unknown, online", "none, online", "other time", "old", "early", "no base64", "naive"],
)
def test_who_is_not_known_is_refused_by_the_head_alone(
    public: Public, headers: Callable[[], dict[str, str]], route: str, status: int
) -> None:
    with public.raw() as wire:
        first = f"POST /v1/fleet/{route} HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n"
        wire.sendall(f"{first}{head(headers())}\r\n".encode())
        assert wire.recv(4096).startswith(f"HTTP/1.1 {status} ".encode()), "not a byte of the body was sent"
    assert public.behind.seen == []
    assert public.refusals == [("key", "127.0.0.1")]


def test_a_revoked_key_is_out_at_once_on_a_connection_it_holds_and_a_new_one_in(public: Public, tmp_path: Path) -> None:
    other = keys.make()
    with public.client() as client, public.client() as second:
        assert client.post("/v1/fleet/get-run", headers=HEADERS).status_code == 200
        node_keys.write(tmp_path / "keys.txt", [keys.public_text(other)])
        assert client.post("/v1/fleet/get-run", headers=HEADERS).status_code == 401
        assert second.post("/v1/fleet/get-run", headers=signed(other)).status_code == 200
        (tmp_path / "keys.txt").write_text("damaged\n")
        assert second.post("/v1/fleet/get-run", headers=signed(other)).status_code == 200


def test_strangers_are_cut_those_that_say_nothing_first_and_a_known_node_is_not(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PER_ADDRESS", 6)
    monkeypatch.setattr(connections, "TLS_S", 600.0)  # nobody is cut for his silence, however slow the machine is
    with contextlib.ExitStack() as held, public.client() as client:
        assert client.post("/v1/fleet/get-run", headers=HEADERS).status_code == 200
        speaks = held.enter_context(public.raw())
        silent = [socket.create_connection(("127.0.0.1", public.port)) for _ in range(30)]
        for one in silent:
            held.enter_context(one)
        assert _until(lambda: sum(map(_is_reset, silent)) >= 25, 60)
        assert ("connections", "127.0.0.1") in public.refusals
        speaks.sendall(f"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n{head()}\r\n".encode())
        assert speaks.recv(4096).startswith(b"HTTP/1.1 200 "), "it began TLS: who says nothing goes before it"
        assert client.post("/v1/fleet/get-run", headers=HEADERS).status_code == 200
        with public.client() as another:
            assert another.post("/v1/fleet/get-run", headers=HEADERS).status_code == 200


def test_a_stranger_has_little_time_to_begin_tls_to_end_it_and_to_show_a_key(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, slow = ("127.0.0.1", public.port), ("slow", "127.0.0.1")
    with monkeypatch.context() as hurried:
        hurried.setattr(connections, "TLS_S", 0.4)
        with socket.create_connection(address) as silent, socket.create_connection(address) as half:
            half.sendall(b"\x16\x03\x01\x00\xc8\x01")
            assert _until(lambda: _is_reset(silent) and _is_reset(half), connections.STRANGER_S / 2)
    assert public.refusals == [slow] * 2
    monkeypatch.setattr(connections, "STRANGER_S", 1.5)
    with _let_in(public) as asks, contextlib.suppress(OSError):
        for _ in range(600):  # it asks for what is open to all, again and again
            asks.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            if not asks.recv(4096):
                break
            time.sleep(0.1)
        else:
            pytest.fail("a stranger stays")
    assert public.refusals.count(slow) >= 3


def _let_in(public: Public) -> ssl.SSLSocket:
    """A stranger with TLS; on a busy machine his time may be over before that is begun."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            return public.raw()
    return public.raw()


def test_whoever_is_cut_as_tls_ends_is_reset_at_once(public: Public, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, cut = proxy.Impatient.connection_made, []

    def cut_first(self: proxy.Impatient, transport: Any) -> None:
        if not cut:
            cut.append(self.guest)
            self.loop.call_soon(self.guest.door._cut, self.guest, "connections")
        arrived(self, transport)

    monkeypatch.setattr(proxy.Impatient, "connection_made", cut_first)
    with public.raw() as wire:
        wire.settimeout(15)
        with contextlib.suppress(ConnectionError):
            assert wire.recv(1) == b""
    assert public.refusals == [("connections", "127.0.0.1")]
    assert cut[0].transport.is_closing(), "a polite end would take 30 s"


@pytest.mark.parametrize("route", [proxy.HEARTBEAT, guards.PULL_ROUTE])
def test_what_nobody_expected_is_a_pause_to_a_supernode(
    public: Public, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """After a 500 its heartbeat ends for good."""

    async def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("File descriptor 9 is used by transport")

    with public.client() as client, monkeypatch.context() as patch:
        patch.setattr(httpx.AsyncClient, "send", broken)
        assert client.post(route, headers=HEADERS).status_code == 503
    assert ("fault", "127.0.0.1") in public.refusals


def test_health_is_asked_for_once_however_many_want_to_know(public: Public) -> None:
    started = time.monotonic()
    with public.client() as client:
        assert [client.get("/health").status_code for _ in range(20)] == [200] * 20
    assert len(public.behind.seen) <= 2 + (time.monotonic() - started) / proxy.HEALTH_S


def test_a_key_has_so_many_connections_and_then_it_is_told_of_load(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PER_KEY", 2)
    with public.client() as first, public.client() as second, public.client() as third:
        assert first.post("/v1/fleet/get-run", headers=HEADERS).status_code == 200
        assert second.post("/v1/fleet/get-run", headers=HEADERS).status_code == 200
        answer = third.post("/v1/fleet/get-run", headers=HEADERS)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        second.close()
        assert _until(lambda: third.post("/v1/fleet/get-run", headers=HEADERS).status_code == 200)
    assert ("load", "127.0.0.1") in public.refusals
    way = network.Route("127.0.0.1", public.port)
    told = {row.check: row for row in network.examine(way, public.authority)}
    assert told["load"].severity == finding.BLOCKER, "its people read of load, not of a server that is down"
    assert "health" not in told


def test_bodies_wait_for_room_and_what_is_held_back_ends_in_a_503(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "WAIT_S", 0.3)
    monkeypatch.setattr(proxy, "PIECE_S", 1.5)
    with contextlib.ExitStack() as held, public.client() as client:

        def no_room() -> bool:
            for _ in range(turns.SHARE // 2 - 1):  # what one key may have at most, and not one byte of it comes
                wire = held.enter_context(public.raw())
                first = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: {proxy.MAX_PART}\r\n"
                wire.sendall(f"{first}{head()}\r\n".encode())
            time.sleep(0.3)  # where their heads are read later, or they were cut already, it is tried again
            answer = client.post("/v1/fleet/push-object", content=b"x" * 3_000_000, headers=HEADERS)
            return answer.status_code == 503

        assert _until(no_room)
        assert client.post("/v1/fleet/send-node-heartbeat", content=b"x", headers=HEADERS).status_code == 200
        assert _until(
            lambda: client.post("/v1/fleet/push-object", content=b"x" * 3_000_000, headers=HEADERS).status_code == 200
        )
    assert ("load", "127.0.0.1") in public.refusals


def _until(true: Any, seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_reset(wire: socket.socket) -> bool:
    wire.setblocking(False)
    try:
        return wire.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
