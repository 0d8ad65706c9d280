"""What whoever reaches a port can ask for: routes, keys and certificates, each by a real request over TLS."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.common import serde
from flwr.proto import control_pb2, runtime_pb2
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from attacks import bundles, fleet
from fedvfm.runtime import processes
from fedvfm.server.network import connections
from fedvfm.trust import certificates, keys, signed_documents


@dataclass(frozen=True)
class Target:
    """A federation's public port.

    Attributes:
        authority: PEM of whom its certificate is from.
        canary: a folder where code that should not run would write.
        revoked: file of a private key that was let in once and is not any more.
    """

    address: str
    authority: bytes
    canary: Path
    revoked: Path

    def client(self, **headers: str) -> httpx.Client:
        """Of HTTP over TLS."""
        context = ssl.create_default_context(cadata=self.authority.decode())
        return httpx.Client(
            base_url=f"https://{self.address}",
            verify=context,
            trust_env=False,
            timeout=60.0,
            headers={"content-type": "application/protobuf", **headers},
        )

    def post(self, route: str, message: Any) -> httpx.Response:
        """A request without any key, as an anonymous stranger."""
        with self.client() as client:
            return client.post(route, content=message.SerializeToString())


Stranger = Callable[[Target], str]
SILENT = 400
CUT = "all cut after 10 s"
STRANGERS: dict[str, tuple[str, Stranger]] = {}


def stranger(name: str, title: str) -> Callable[[Stranger], Stranger]:
    def keep(attack: Stranger) -> Stranger:
        STRANGERS[name] = (title, attack)
        return attack

    return keep


def start_request(bundle: bytes) -> Any:
    """What starts a run of an app bundle."""
    return control_pb2.StartRunRequest(fab=serde.fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})))


@stranger("control-list", "Control API: list the nodes")
def _list(target: Target) -> str:
    return str(target.post("/v1/control/list-nodes", control_pb2.ListNodesRequest()).status_code)


@stranger("control-register", "Control API: register a key of one's own")
def _register(target: Target) -> str:
    key = public_key_to_bytes(keys.make().public_key())
    return str(
        target.post(
            "/v1/control/register-node", control_pb2.RegisterNodeRequest(public_key=key, name="stranger")
        ).status_code
    )


@stranger("runtime", "Runtime API: take the ServerApp's task")
def _runtime(target: Target) -> str:
    answer = target.post(
        "/v1/runtime/acquire-task", runtime_pb2.AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    )
    return str(answer.status_code)


@stranger("docs", "the API's own documentation")
def _docs(target: Target) -> str:
    with target.client() as client:
        return str(client.get("/openapi.json").status_code)


@stranger("foreign-bundle", "an app bundle that ships its own fedvfm, started through the port")
def _bundle(target: Target) -> str:
    return str(target.post("/v1/control/start-run", start_request(bundles.foreign(target.canary))).status_code)


def _activation(target: Target, key: Any) -> str:
    node = fleet.Node(target.address, target.authority, key)
    try:
        node.activate()
    except Exception as error:
        return fleet.status_of(error)
    node.close()
    return "200"


@stranger("unknown-key", "a key that nobody approved")
def _unknown(target: Target) -> str:
    return _activation(target, keys.make())


@stranger("revoked-key", "a key that was revoked")
def _revoked(target: Target) -> str:
    return _activation(target, fleet.read_key(target.revoked))


@stranger("no-key", "messages asked for without any key")
def _no_key(target: Target) -> str:
    with target.client() as client:
        return str(client.post("/v1/fleet/pull-messages", content=b"").status_code)


@stranger("silent", f"{SILENT} connections of one address that say nothing")
def _silent(target: Target) -> str:
    host, _, port = target.address.rpartition(":")
    held: list[socket.socket] = []
    try:
        for _ in range(SILENT):
            held.append(socket.create_connection((host, int(port)), timeout=60.0))
            held[-1].setblocking(False)
        until = time.monotonic() + connections.TLS_S + 30.0
        while (open_still := sum(not _over(each) for each in held)) and time.monotonic() < until:
            time.sleep(0.5)
    finally:
        for each in held:
            each.close()
    return f"{open_still} still open" if open_still else CUT


def _over(held: socket.socket) -> bool:
    """Whether the other end has closed or reset it."""
    try:
        return not held.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextlib.contextmanager
def impostor(folder: Path) -> Iterator[str]:
    """A TLS server for 127.0.0.1 with a certificate of its own authority, which notes whether anybody talked to it."""
    now = signed_documents.now()
    authority_key, authority = certificates.make_authority("impostor", now)
    key, certificate = certificates.make_server(authority_key, authority, ("127.0.0.1",), now)
    (folder / "impostor.pem").write_text(certificates.to_pem(certificate))
    keys.write_private(folder / "impostor.key", key, pem=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "impostor.pem", folder / "impostor.key")
    port = processes.free_port()
    listener = socket.create_server(("127.0.0.1", port))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                plain, _ = listener.accept()
                with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as wire:
                    if wire.recv(1):
                        (folder / "talked-to").write_text("a site sent something")

    threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{port}"
    over.set()
    listener.close()


@stranger("wrong-authority", "an impostor's server with a certificate of another authority, to a site")
def _wrong(target: Target) -> str:
    with tempfile.TemporaryDirectory() as folder, impostor(Path(folder)) as address:
        node = fleet.Node(address, target.authority, keys.make())
        try:
            node.activate()
        except Exception as error:
            talked = (Path(folder) / "talked-to").exists()
            refused = "certificate" in str(error).lower() and not talked
            return "TLS: certificate refused" if refused else fleet.status_of(error)
    return "200"
