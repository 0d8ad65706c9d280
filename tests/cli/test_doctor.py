"""``fedvfm doctor`` against real faults: each row is provoked by what it names."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import resource
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from fedvfm.client import doctor
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import policy
from fedvfm.doctor import host as machine
from fedvfm.doctor import network
from fedvfm.model import locking
from fedvfm.report import finding
from fedvfm.runtime import health, processes
from fedvfm.server import state_folder as enrolment
from fedvfm.trust import certificates, keys, recipes, signed_documents

NOT_READY = 20


class Ends:
    """A coordinator's and a site's folders, made by the real functions, and ``doctor`` by the real command line."""

    def __init__(self, cli: Any, tiny: Any, root: Path, port: int) -> None:
        self.cli, self.root, self.port = cli, root, port
        recipe = root / "recipe.json"
        self.locked = locking.make(recipes.written(tiny.experiment))
        locking.write(recipe, self.locked)
        plan = enrolment.Plan("trial", f"localhost:{port}", ("127.0.0.1",), ("east", "south"))
        self.server = enrolment.init(root / "server", plan, self.locked)
        invite = joining.read_invite(self.server.invite_path("east"), self.server.fingerprint())
        self.site = joining.join(root / "site", invite, self.locked.hash)
        self.settings = root / "site.toml"
        self.write_settings(tiny)

    def write_settings(self, tiny: Any, more: str = "", rules: str | None = None) -> None:
        own = f'name = "east"\n{more}include = ["east"]\n[data]\nsource = "folder"\npath = "{tiny.data}"\n'
        allowed = policy.accepting(policy.Facts.of(self.locked)).replace("units = 10", "units = 1")
        allowed = allowed if rules is None else rules
        self.settings.write_text(own + allowed)

    def rows(self, *arguments: Any) -> tuple[int, dict[str, list[dict[str, str]]]]:
        answer = self.cli("doctor", *arguments, "--json")
        found = json.loads(answer.out)
        assert found["ready"] is (answer.code == 0), answer.err
        assert answer.code in (0, NOT_READY)
        by_check: dict[str, list[dict[str, str]]] = {}
        for one in found["rows"]:
            assert one["why"]
            assert one["remedy"] or one["severity"] == "ok"
            by_check.setdefault(one["check"], []).append(one)
        return answer.code, by_check

    def of_server(self, *more: Any) -> tuple[int, dict[str, list[dict[str, str]]]]:
        return self.rows("server", "--state", self.server.folder, *more)

    def of_site(self, *more: Any) -> tuple[int, dict[str, list[dict[str, str]]]]:
        return self.rows("client", self.settings, "--state", self.site.folder, "--no-data", *more)


@pytest.fixture
def ends(cli: Any, tiny: Any, tmp_path: Path) -> Ends:
    return Ends(cli, tiny, tmp_path, processes.free_port())


def only(rows: dict[str, list[dict[str, str]]], check: str, severity: str) -> dict[str, str]:
    """The one row of a check that is not well."""
    found = [one for one in rows[check] if one["severity"] != "ok"]
    assert [one["severity"] for one in found] == [severity], rows[check]
    return found[0]


# -- a TLS server that says what a test wants --------------------------------------------------------------------------


class Says(socketserver.ThreadingTCPServer):
    """Answers GET /health over TLS, with a clock of its own."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, certificate: Path, key: Path, ahead: float, status: int = 200) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)
        self.ahead, self.status, self.seen = ahead, status, []
        super().__init__(("127.0.0.1", port), Answers)


class Answers(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, Says)
        with contextlib.suppress(OSError), server.context.wrap_socket(self.request, server_side=True) as secure:
            server.seen.append(secure.recv(4096).split(b"\r\n")[0].decode())
            date = formatdate(time.time() + server.ahead, usegmt=True)
            secure.sendall(
                f"HTTP/1.1 {server.status} X\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )


Speak = Callable[..., Says]


@pytest.fixture
def speak(ends: Ends) -> Iterator[Speak]:
    """Starts a TLS server at the coordinator's address."""
    made: list[Says] = []

    def start(certificate: Path | None = None, key: Path | None = None, ahead: float = 0.0, status: int = 200) -> Says:
        server = Says(ends.port, certificate or ends.server.certificate, key or ends.server.key, ahead, status)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        made.append(server)
        return server

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


def write_pair(folder: Path, authority: str, names: tuple[str, ...], made: datetime.datetime) -> tuple[Path, Path]:
    """A server certificate of a new authority with this common name."""
    folder.mkdir()
    authority_key, root = certificates.make_authority(authority, made)
    key, certificate = certificates.make_server(authority_key, root, names, made)
    (folder / "server.pem").write_text(certificates.to_pem(certificate))
    keys.write_private(folder / "server.key", key, pem=True)
    return folder / "server.pem", folder / "server.key"


# -- the coordinator ---------------------------------------------------------------------------------------------------


def test_a_fresh_coordinator_waits_for_its_sites_and_a_joined_one_is_ready(ends: Ends) -> None:
    code, rows = ends.of_server()
    assert code == NOT_READY
    told = "0 sites are approved, the quorum is 2 (all, with 2 that are invited)"
    assert told in only(rows, "quorum", "blocker")["problem"]
    assert "not joined yet: east, south" in only(rows, "invites", "warning")["problem"]
    enrolment.approve(ends.server, ends.site.request)
    code, rows = ends.of_server()
    assert code == 0
    well = {check for check, found in rows.items() if all(one["severity"] == "ok" for one in found)}
    assert well >= {"authority", "certificate", "clock", "disk", "files", "port", "quorum", "state", "versions"}
    shown = ends.cli("doctor", "server", "--state", ends.server.folder)
    assert shown.out.endswith("ready\n")
    assert f"0.0.0.0:{ends.port} is free" in shown.out
    settings = ends.root / "server.toml"
    settings.write_text('quorum = 2\nwithout = ["sotuh"]\n')
    code, rows = ends.of_server("--config", settings)
    assert code == NOT_READY
    assert {one["problem"] for one in rows["quorum"] if one["severity"] == "blocker"} == {
        "'without' names sites that are not on the roster: sotuh",
        "1 sites are approved, the quorum is 2",
    }
    settings.write_text('without = ["south"]\n')
    code, rows = ends.of_server("--config", settings)
    assert (code, rows["quorum"][0]["problem"]) == (0, "1 sites are approved, the quorum is 1")


def test_a_taken_port_and_an_address_of_another_machine(ends: Ends) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", ends.port))
        other.listen()
        code, rows = ends.of_server("--listen", f"127.0.0.1:{ends.port}")
        found = only(rows, "port", "blocker")
        assert code == NOT_READY
        assert f"127.0.0.1:{ends.port} is taken by process {os.getpid()}" in found["problem"]
        assert "--listen host:port" in found["remedy"]
    _, rows = ends.of_server("--listen", f"192.0.2.1:{ends.port}")
    assert "give --listen an address of this machine" in only(rows, "port", "blocker")["remedy"]


@pytest.mark.parametrize(
    ("days", "severity", "words"), [(-900, "blocker", "expired at"), (-810, "warning", "expires in 1")]
)
def test_an_old_certificate(ends: Ends, days: int, severity: str, words: str) -> None:
    made = signed_documents.now() + datetime.timedelta(days=days)
    authority = certificates.read_pem(ends.server.authority.read_text(), "")
    root = keys.read_private(ends.server.authority_key)
    key, certificate = certificates.make_server(root, authority, ("localhost",), made)
    ends.server.certificate.write_text(certificates.to_pem(certificate))
    keys.write_private(ends.server.key, key, pem=True)
    _, rows = ends.of_server()
    found = only(rows, "certificate", severity)
    assert words in found["problem"]
    assert "fedvfm server certify" in found["remedy"]


def test_certificates_that_do_not_belong(ends: Ends) -> None:
    where = ends.server
    before = where.certificate.read_text(), where.key.read_bytes()
    authority = certificates.read_pem(where.authority.read_text(), "")
    key, certificate = certificates.make_server(
        keys.read_private(where.authority_key), authority, ("elsewhere.example",), signed_documents.now()
    )
    where.certificate.write_text(certificates.to_pem(certificate))
    assert "is not the key of" in only(ends.of_server()[1], "certificate", "blocker")["problem"]
    keys.write_private(where.key, key, pem=True)
    found = only(ends.of_server()[1], "certificate", "blocker")
    assert found["problem"] == "it is for elsewhere.example, but sites connect to localhost"
    assert "certify --san localhost" in found["remedy"]
    pem, other = write_pair(ends.root / "other", "trial", ("localhost",), signed_documents.now())
    where.certificate.write_text(pem.read_text())
    where.key.write_bytes(other.read_bytes())
    assert "is not signed by" in only(ends.of_server()[1], "certificate", "blocker")["problem"]
    where.certificate.write_text(before[0])
    where.key.write_bytes(before[1])
    where.authority_key.rename(ends.root / "kept-elsewhere")
    assert "the federation runs without it" in only(ends.of_server()[1], "authority", "warning")["problem"]


def test_a_key_the_world_can_read(ends: Ends) -> None:
    ends.server.key.chmod(0o644)
    _, rows = ends.of_server()
    found = only(rows, "files", "blocker")
    assert f"{ends.server.key} (0644)" in found["problem"]
    assert "chmod -R go-rwx" in found["remedy"]
    assert "others can read it" in only(rows, "certificate", "blocker")["problem"]
    ends.site.key.chmod(0o640)
    assert "site.key (0640)" in json.dumps(ends.of_site()[1]["files"])


def test_a_full_disk(ends: Ends) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (machine.PROBE_BYTES // 2, before[1]))
    try:
        found = machine.disk(ends.server.folder, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.severity == "blocker"
    assert "cannot write" in found.problem
    assert not (ends.server.folder / machine.PROBE).exists()
    short = machine.disk(ends.server.folder, 1 << 60)
    assert short.severity == "blocker"
    assert "MiB needed" in short.problem


def test_the_disk_that_a_site_needs_does_not_grow_with_the_rounds(ends: Ends) -> None:
    """It holds the last update of a recipe, not all: a whole network over 100 rounds was refused for want of space."""
    many = ends.locked.model_copy(update={"recipe": ends.locked.recipe.model_copy(update={"rounds": 1000})})
    one = ends.locked.model_copy(update={"recipe": ends.locked.recipe.model_copy(update={"rounds": 1})})
    assert doctor._need([many]) == doctor._need([one])
    assert doctor._need([one, many]) - doctor._need([one]) == doctor._need([one]) - doctor._need([])
    sizes = sum(4 * spec.size for spec in ends.locked.manifest)
    assert 4 * sizes < doctor._need([one]) - doctor._need([]) < 20 * sizes


def test_a_clock_that_went_back(ends: Ends) -> None:
    log = ends.server.audit_path
    lines = log.read_text()
    year = signed_documents.stamp(signed_documents.now())[:4]
    log.unlink()
    real, later = signed_documents.now, signed_documents.now() + datetime.timedelta(days=400)
    signed_documents.now = lambda: later  # type: ignore[assignment]
    try:
        _ = ends.server.audit
    finally:
        signed_documents.now = real  # type: ignore[assignment]
    found = only(ends.of_server()[1], "clock", "blocker")
    assert f"it is {year}-" in found["problem"]
    assert "the audit log was written at" in found["problem"]
    log.write_text(lines)


def test_another_release_of_flower_and_of_fedvfm(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {one.severity for one in machine.versions({"site 'x'": machine.metadata.version("fedvfm")})} == {"ok"}
    (other,) = machine.versions({"site 'x'": "0.0.9"})
    assert (other.severity, "site 'x' has 0.0.9" in other.problem) == ("warning", True)
    old = ends.root / "old" / "flwr-1.30.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.30.0\n")
    monkeypatch.syspath_prepend(old.parent)
    found = only(ends.of_server()[1], "versions", "blocker")
    assert "flwr 1.30.0 is installed; this release of fedvfm is for flwr" in found["problem"]


def test_folders_that_are_none(ends: Ends) -> None:
    code, rows = ends.rows("server", "--state", ends.root / "nothing")
    assert code == NOT_READY
    assert "is no server's state folder" in only(rows, "state", "blocker")["problem"]
    _, rows = ends.rows("client", ends.settings, "--state", ends.server.folder)
    assert "is no site's state folder" in only(rows, "state", "blocker")["problem"]
    _, rows = ends.rows("client", ends.root / "none.toml", "--state", ends.site.folder)
    assert "cannot be read" in only(rows, "state", "blocker")["problem"]


# -- the site ----------------------------------------------------------------------------------------------------------


def test_a_site_that_is_ready(ends: Ends, speak: Speak) -> None:
    server = speak()
    code, rows = ends.rows("client", ends.settings, "--state", ends.site.folder, "--limit", "4")
    assert code == 0, rows
    assert server.seen == ["GET /health HTTP/1.1"]
    well = {check for check, found in rows.items() if all(one["severity"] == "ok" for one in found)}
    assert well >= {
        "approval",
        "backbone",
        "certificate",
        "clock",
        "device",
        "health",
        "policy",
        "reach",
        "versions",
        "precision",
    }


@pytest.mark.parametrize(
    ("ahead", "severity", "words"),
    [
        (-60, "blocker", "60 s ahead of the coordinator's"),
        (-3600, "blocker", "3600 s ahead"),
        (400, "blocker", "behind the coordinator's"),
        (100, "warning", "behind the coordinator's"),
    ],
)
def test_clock_skew_against_the_coordinators_date(
    ends: Ends, speak: Speak, ahead: float, severity: str, words: str
) -> None:
    """The server lies about the time; the threshold is Flower's own."""
    speak(ahead=ahead)
    found = only(ends.of_site()[1], "clock", severity)
    assert words in found["problem"]
    assert "NTP" in found["remedy"]


def test_the_thresholds_are_flowers() -> None:
    from flwr.common import constant

    assert constant.SYSTEM_TIME_TOLERANCE == network.AHEAD_S
    assert constant.TIMESTAMP_TOLERANCE + constant.SYSTEM_TIME_TOLERANCE == network.BEHIND_S


def test_an_intercepting_proxy_is_named(ends: Ends, speak: Speak) -> None:
    server = speak(*write_pair(ends.root / "gateway", "Hospital Web Gateway", ("localhost",), signed_documents.now()))
    found = only(ends.of_site()[1], "intercepted", "blocker")
    assert "shows a certificate from 'Hospital Web Gateway authority'" in found["problem"]
    assert f"let localhost:{ends.port} pass unopened" in found["remedy"]
    assert server.seen in ([], [""]), "nothing was sent through it"


def test_another_authority_of_the_same_name(ends: Ends, speak: Speak) -> None:
    speak(*write_pair(ends.root / "again", "trial", ("localhost",), signed_documents.now()))
    found = only(ends.of_site()[1], "certificate", "blocker")
    assert "made a new one since this site joined" in found["problem"]
    assert "ask for a new invite" in found["remedy"]


def test_an_expired_certificate_and_one_for_another_name(ends: Ends, speak: Speak, tmp_path: Path) -> None:
    root = keys.read_private(ends.server.authority_key)
    authority = certificates.read_pem(ends.server.authority.read_text(), "")
    folder = tmp_path / "made"
    folder.mkdir()

    def pair(name: str, host: str, days: int) -> tuple[Path, Path]:
        made = signed_documents.now() + datetime.timedelta(days=days)
        key, certificate = certificates.make_server(root, authority, (host,), made)
        (folder / f"{name}.pem").write_text(certificates.to_pem(certificate))
        keys.write_private(folder / f"{name}.key", key, pem=True)
        return folder / f"{name}.pem", folder / f"{name}.key"

    server = speak(*pair("old", "localhost", -900))
    assert "it expired at" in only(ends.of_site()[1], "certificate", "blocker")["problem"]
    server.context.load_cert_chain(*pair("early", "localhost", 20))
    assert "it is good from" in only(ends.of_site()[1], "certificate", "blocker")["problem"]
    server.context.load_cert_chain(*pair("other", "elsewhere.example", 0))
    found = only(ends.of_site()[1], "certificate", "blocker")
    assert found["problem"] == "it is for elsewhere.example, not for localhost"


def test_a_coordinator_that_is_not_there(ends: Ends, speak: Speak) -> None:
    found = only(ends.of_site()[1], "reach", "blocker")
    assert "nobody listens there" in found["problem"]
    speak(status=502)
    assert "answers 502 to GET /health" in only(ends.of_site()[1], "health", "blocker")["problem"]


def test_something_else_than_tls_listens_there(ends: Ends) -> None:
    with socket.create_server(("127.0.0.1", ends.port)) as plain:

        def greet() -> None:
            one, _ = plain.accept()
            one.sendall(b"220 mail.example ESMTP\r\n")
            one.close()

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        assert "no TLS is spoken there" in only(ends.of_site()[1], "reach", "blocker")["problem"]
        thread.join(10)


class Gate(socketserver.BaseRequestHandler):
    """A hospital's proxy that asks for a password."""

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(1)
        target = head.split()[1].decode()
        if b"Proxy-Authorization: Basic dTpwJkA=" not in head:  # u:p&@
            self.request.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return
        with socket.create_connection((target.partition(":")[0], int(target.partition(":")[2]))) as there:
            self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=self.copy, args=(there, self.request), daemon=True)
            back.start()
            self.copy(self.request, there)
            back.join(5)

    @staticmethod
    def copy(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := one.recv(65536):
                other.sendall(piece)
            other.shutdown(socket.SHUT_WR)


def test_through_a_proxy_with_a_password(ends: Ends, speak: Speak, monkeypatch: pytest.MonkeyPatch) -> None:
    speak()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Gate) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        port = proxy.server_address[1]
        for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        _, rows = ends.of_site()
        found = only(rows, "reach", "blocker")
        assert "the proxy answered 407 to CONNECT" in found["problem"]
        assert "HTTPS_PROXY: http://USER:PASSWORD@" in found["remedy"]
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:p%26%40@127.0.0.1:{port}")
        code, rows = ends.of_site()
        assert code == 0
        assert rows["reach"][0]["problem"].startswith(f"localhost:{ends.port} through the proxy 127.0.0.1:{port}")
        assert "p&@" not in json.dumps(rows)
        assert "p%26%40" not in json.dumps(rows)
        told = only(rows, "proxy-settings", "warning")
        assert "HTTPS_PROXY set, but NO_PROXY does not name 127.0.0.1, localhost" in told["problem"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        _, rows = ends.of_site()
        assert rows["proxy-settings"][0]["severity"] == "ok"
        assert "through the proxy" not in rows["reach"][0]["problem"], "NO_PROXY is heeded"
        proxy.shutdown()


def test_what_the_site_itself_has_wrong(ends: Ends, speak: Speak, tiny: Any, tmp_path: Path) -> None:
    speak()
    ends.write_settings(tiny, 'device = "cuda:7"\n', rules="")
    _, rows = ends.of_site()
    assert "'cuda:7': torch sees no" in only(rows, "device", "blocker")["problem"]
    refused = only(rows, "policy", "blocker")
    assert "max_rounds (asked 3; allowed none)" in refused["problem"]
    assert "--print-policy" in refused["remedy"]
    ends.settings.write_text(ends.settings.read_text().replace('name = "east"', 'name = "west"'))
    assert "this state folder joined as 'east'" in only(ends.of_site()[1], "state", "blocker")["problem"]
    ends.write_settings(tiny)
    joining.withdraw(ends.site, ends.locked.hash)
    found = only(ends.of_site()[1], "approval", "warning")
    assert f"fedvfm client approve {ends.locked.hash[:12]}" in found["remedy"]


def test_weights_with_other_bytes(ends: Ends, speak: Speak, tiny: Any) -> None:
    speak()
    weights = tiny.backbone / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        found = only(ends.of_site()[1], "backbone", "blocker")
    finally:
        weights.write_bytes(before)
    assert "the recipe pins" in found["problem"]
    assert "fedvfm weights" in found["remedy"]


def test_the_datas_faults_are_rows(ends: Ends, speak: Speak, tiny: Any, tmp_path: Path) -> None:
    speak()
    empty = tmp_path / "empty"
    (empty / "images").mkdir(parents=True)
    (empty / "masks").mkdir()
    ends.settings.write_text(ends.settings.read_text().replace(str(tiny.data), str(empty)))
    code, rows = ends.rows("client", ends.settings, "--state", ends.site.folder)
    assert code == NOT_READY
    assert any(one["severity"] == "blocker" for one in rows["data"])


# -- accounts and the health probe -------------------------------------------------------------------------------------


def test_other_accounts() -> None:
    """Whoever may log in beside us is named; system accounts are not."""
    import pwd

    people = [one for one in pwd.getpwall() if 1000 <= one.pw_uid < 60000 and "nologin" not in one.pw_shell]
    found = machine.other_users(own=-1)
    assert (found.severity == "warning") is bool(people)
    assert all(one.pw_name in found.problem for one in people[: machine.SHOWN])


def test_the_health_probe(cli: Any) -> None:
    states = {"superlink": True, "proxy": True}
    address = f"127.0.0.1:{processes.free_port()}"
    with health.serving(address, lambda: states):
        assert cli("doctor", "health", address).out == "serving\n"
        states["proxy"] = False
        answer = cli("doctor", "health", address, "--json")
        assert (answer.code, json.loads(answer.out)["serving"]) == (11, False)
        assert cli("doctor", "health", address, "--service", "superlink").code == 0
        assert "not found" in cli("doctor", "health", address, "--service", "nothing").err
        second = pytest.raises(health.errors.EngineError, match="cannot listen there")
        with second, health.serving(address, lambda: states):
            pass
    gone = cli("doctor", "health", address)
    assert gone.code == 11
    assert "unavailable" in gone.err


def test_rows_are_ranked() -> None:
    rows = [finding.ok("disk", "x"), finding.warning("clock", "y", "z"), finding.blocker("port", "a", "b")]
    assert [one.check for one in finding.ranked(rows)] == ["port", "clock", "disk"]
    assert finding.lines(rows)[-1] == "not ready: 1 blocker"
    assert finding.lines(rows[:1]) == ["ok       disk: x", "ready"]
