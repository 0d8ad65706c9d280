"""The proxy through real TLS sockets, before a real HTTP server that notes what comes through."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

from fedvfm.flower import guards, long_poll, runtime
from fedvfm.runtime import processes
from fedvfm.server.network import proxy, refused_requests
from fedvfm.trust import certificates, keys, signed_documents
from tests.deployment import doors


@dataclass
class Behind(doors.Behind):
    """Stands where the SuperLink stands."""

    answer: bytes = b""
    later: bytes = b""
    pulls: int = 0

    def reply(self, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        if headers.get("flwr-public-key") == "stranger":
            return 401, b'{"detail":"Invalid SuperNode authentication"}'
        if headers.get("flwr-public-key") == "disk-full":
            return 500, b"Internal Server Error"
        if path.endswith("pull-messages"):
            self.pulls += 1
            return 200, self.later if self.pulls >= 3 else b""
        return 200, self.answer


@dataclass
class Public(doors.Public):
    refusals: list[tuple[str, str]]

    def raw(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
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
def public(certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Public]:
    behind, refusals = Behind(), []
    monkeypatch.setattr(proxy, "HEAD_S", 0.5)
    monkeypatch.setattr(proxy, "PIECE_S", 0.5)
    upstream = behind.server(certified / "server.pem", certified / "server.key", processes.free_port())
    settings = proxy.Settings(
        "127.0.0.1",
        processes.free_port(),
        str(certified / "server.pem"),
        str(certified / "server.key"),
        f"127.0.0.1:{upstream.config.port}",
        str(certified / "ca.pem"),
        str(tmp_path / "refused.jsonl"),
        hold_s=2.0,
        most_parts=40,
    )
    log = refused_requests.Refusals(settings.log)

    def told(what: str, client: str) -> None:
        refusals.append((what, client))
        log(what, client)

    with doors.serving(upstream), doors.serving(proxy.server(settings, told)):
        yield Public(settings.port, behind, certified / "ca.pem", tmp_path / "refused.jsonl", refusals)


HEADERS = {
    "content-type": "application/protobuf",
    "flwr-public-key": "abc",
    "flwr-signature": "def",
    "flwr-timestamp": "now",
}


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
    ],
    ids=["another's name", "an instruction", "no answer", "many parts", "no push", "a long head"],
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
        answer = client.post(route, headers={**HEADERS, "flwr-public-key": "stranger"})
    assert answer.status_code == 401
    assert public.refusals == [("key", "127.0.0.1")]


@pytest.mark.parametrize("route", ["/v1/fleet/send-node-heartbeat", guards.PULL_ROUTE])
def test_a_fault_of_the_superlink_is_a_pause_to_a_supernode(public: Public, route: str) -> None:
    with public.client() as client:
        answer = client.post(route, headers={**HEADERS, "flwr-public-key": "disk-full"})
    assert answer.status_code == 503, "after a 500 its heartbeat would end for good"
    assert public.refusals == []


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
        head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: {proxy.MAX_BODY + 1}\r\n\r\n"
        wire.sendall(head.encode())
        assert wire.recv(4096).startswith(b"HTTP/1.1 413 ")
    assert len(public.behind.seen) == seen
    assert public.refusals == [("size", "127.0.0.1")]


def test_an_answer_of_many_megabytes_comes_whole(public: Public) -> None:
    public.behind.answer = os.urandom(7_000_000)
    with public.client() as client:
        assert client.post("/v1/fleet/pull-object", headers=HEADERS).content == public.behind.answer


def test_a_slow_head_a_slow_body_and_a_huge_head_are_cut(public: Public) -> None:
    with public.raw() as wire:
        wire.sendall(b"POST /v1/fleet/get-run HTTP/1.1\r\n")
        started = time.monotonic()
        with contextlib.suppress(OSError):  # reset, or closed
            for _ in range(40):
                wire.sendall(b"X-A: b\r\n")
                time.sleep(0.1)
            assert wire.recv(10) == b""
        assert time.monotonic() - started < 3
    with public.raw() as wire:
        wire.sendall(b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
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
    assert [what for what, _ in public.refusals] == ["framing", "unknown-route"]
    assert public.behind.seen == []
    with socket.create_connection(("127.0.0.1", public.port), timeout=5) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(OSError):
            assert b"200" not in plain.recv(4096)


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
        assert 0.4 < time.monotonic() - started < 2.0
    assert [row[3] for row in public.behind.seen] == [3, 3, 3]


def test_the_superlink_is_asked_to_hold_as_long_as_is_left_whatever_the_site_says(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = long_poll.HEADER.decode()
    with public.client() as client:
        client.post(guards.PULL_ROUTE, content=b"who", headers={**HEADERS, name: "9999"})
        asked = [float(row[2][name]) for row in public.behind.seen]
        assert 1.5 < asked[0] <= 2.0
        assert asked == sorted(asked, reverse=True)
        # Beyond so many that wait, the SuperLink is asked to answer at once.
        monkeypatch.setattr(proxy, "LONG_POLLS", 0)
        public.behind.seen.clear()
        client.post(guards.PULL_ROUTE, content=b"who", headers=HEADERS)
        assert {row[2][name] for row in public.behind.seen} == {"0"}
        public.behind.seen.clear()
        client.post("/v1/fleet/get-run", headers={**HEADERS, name: "9999"})
        assert name not in public.behind.seen[0][2], "no other question is held, and no site says for how long"


def test_it_is_held_no_longer_than_said_and_not_for_a_site_that_left(public: Public) -> None:
    with public.client() as client:
        started = time.monotonic()
        assert client.post(guards.PULL_ROUTE, headers=HEADERS).content == b""
        assert 1.9 < time.monotonic() - started < 6.0
    before = public.behind.pulls
    with public.raw() as wire:
        wire.sendall(f"POST {guards.PULL_ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        time.sleep(0.1)
    time.sleep(1.0)
    assert public.behind.pulls <= before + 2


def test_a_superlink_that_is_away_is_502_so_that_a_supernode_asks_again(certified: Path) -> None:
    settings = proxy.Settings(
        "127.0.0.1",
        processes.free_port(),
        str(certified / "server.pem"),
        str(certified / "server.key"),
        f"127.0.0.1:{processes.free_port()}",
        str(certified / "ca.pem"),
    )
    with doors.serving(proxy.server(settings, lambda what, client: None)):
        context = ssl.create_default_context(cafile=certified / "ca.pem")
        with httpx.Client(verify=context, trust_env=False) as client:
            for route in ("/v1/fleet/get-run", guards.PULL_ROUTE):
                assert client.post(f"https://127.0.0.1:{settings.port}{route}", content=b"").status_code == 502


def test_the_program_holds_no_secret_in_its_arguments(tmp_path: Path) -> None:
    settings = proxy.Settings("127.0.0.1", 1, "c", "k", "u", "a")
    program = replace(settings).program(tmp_path / "proxy.json")
    assert program.command[-1] == str(tmp_path / "proxy.json")
    assert (tmp_path / "proxy.json").stat().st_mode & 0o777 == 0o600
