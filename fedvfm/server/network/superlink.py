"""The SuperLink: bound to loopback, with TLS, node keys and a secret for who may take its tasks; state in a database.

Flower's Control API asks nobody who they are. It listens on loopback alone, sites come through the proxy, and our
SuperLink's process asks every caller of it for a token made from the secret in this folder: other users of the machine
reach the port and get 401.

``python -m fedvfm.server.network.superlink`` is that process; its arguments are those of ``flower-superlink``.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fedvfm import errors
from fedvfm.flower import runtime
from fedvfm.runtime import processes
from fedvfm.storage import storage
from fedvfm.trust import certificates, keys, signed_documents

HOST = "127.0.0.1"
READY_S = 120.0


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink's folder and port.

    Attributes:
        folder: certificate, secret and database lie here; private.
        port: on the loopback.
    """

    folder: Path
    port: int

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"{HOST}:{self.port}"

    @property
    def authority(self) -> Path:
        """The certificate of the authority that signed its certificate; made for this SuperLink alone."""
        return self.folder / "loopback.pem"

    @property
    def certificate(self) -> Path:
        """What it shows."""
        return self.folder / "superlink.pem"

    @property
    def key(self) -> Path:
        """The key of its certificate."""
        return self.folder / "superlink.key"

    @property
    def secret(self) -> Path:
        """Who holds it may take the ServerApp's tasks and use the Control API."""
        return self.folder / "executor.secret"

    @property
    def link(self) -> runtime.Link:
        """How to reach it."""
        return runtime.Link(self.address, self.authority.read_bytes(), self.secret.read_bytes())

    @property
    def program(self) -> processes.Program:
        """The process."""
        command = (
            *processes.module(__name__),
            *("--host", HOST, "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.authority)),
            *("--ssl-certfile", str(self.certificate)),
            *("--ssl-keyfile", str(self.key)),
            *("--database", str(self.folder / "state.db")),
            *("--superexec-auth-secret-file", str(self.secret)),
            *("--isolation", "process", "--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        )
        environment = {**runtime.CHILD_ENVIRONMENT, "FLWR_HOME": str(self.folder / "home")}
        return processes.Program("superlink", command, environment)


def prepare(folder: Path, port: int = 0) -> SuperLink:
    """Make what a SuperLink needs in ``folder``: a new certificate and secret; an old database is kept.

    The authority's key is not kept: nothing else is ever signed by it.
    """
    with storage.guard(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    now = signed_documents.now()
    authority_key, authority = certificates.make_authority("loopback", now)
    key, certificate = certificates.make_server(authority_key, authority, (HOST, "localhost"), now)
    made = SuperLink(folder, port or processes.free_port())
    storage.write_text(made.authority, certificates.to_pem(authority))
    storage.write_text(made.certificate, certificates.to_pem(certificate))
    keys.write_private(made.key, key, pem=True)
    storage.write_bytes(made.secret, secrets.token_hex(32).encode())
    return made


def largest_reply(parameters: int) -> int:
    """Bytes of the largest reply that a site may send: its adapter, at a rank of its own, twice over, and words."""
    return 8 * 4 * parameters + 1024 * 1024


def wait_ready(
    link: SuperLink, child: processes.Child, seconds: float = READY_S, over: threading.Event | None = None
) -> None:
    """Until the SuperLink answers, or this process is told to end.

    Raises:
        EngineError: with its last words, if it does not.
    """
    deadline = time.monotonic() + seconds
    control = runtime.Control(link.link, patience_s=0.0)
    over = over or threading.Event()
    while not over.is_set():
        try:
            control.nodes()
            break
        except errors.EngineError as error:
            if time.monotonic() > deadline:
                raise errors.EngineError(
                    f"the SuperLink does not answer after {seconds:g} s ({error}). Its log "
                    f"{processes.log_path(child.folder, child.program.name)} ends: {child.last_words()}"
                ) from None
            over.wait(0.2)
    control.close()


if __name__ == "__main__":
    from fedvfm.flower import superlink

    superlink.run_superlink(Path(sys.argv[sys.argv.index("--superexec-auth-secret-file") + 1]))
