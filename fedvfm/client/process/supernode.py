"""The SuperNode: Flower's own process that fetches messages over TLS and hands them to our executor on loopback.

It downloads the run's app bundle and never opens it but for its settings; nor do we.

``python -m fedvfm.client.process.supernode`` is that process; its arguments are those of ``flower-supernode``.
"""

from __future__ import annotations

import secrets
import signal
from dataclasses import dataclass
from pathlib import Path

from fedvfm.flower import runtime
from fedvfm.runtime import processes
from fedvfm.storage import storage

HOST = "127.0.0.1"


@dataclass(frozen=True)
class SuperNode:
    """One site's SuperNode.

    Attributes:
        name: of its pid file and log.
        folder: its secret lies here; private.
        server: ``host:port`` of the coordinator.
        authority: the only certificate authority it trusts.
        key: the site's private key.
        port: where its executor finds it, on loopback.
    """

    name: str
    folder: Path
    server: str
    authority: Path
    key: Path
    port: int

    @property
    def secret(self) -> Path:
        """Who holds it may take this node's tasks."""
        return self.folder / f"{self.name}.secret"

    @property
    def link(self) -> runtime.Link:
        """How the executor reaches it."""
        return runtime.Link(f"{HOST}:{self.port}", b"", self.secret.read_bytes())

    @property
    def program(self) -> processes.Program:
        """The process. Asked to end, it tells the coordinator, so that it may come back at once."""
        command = (
            *(*processes.module(__name__), "--superlink", self.server),
            *("--root-certificates", str(self.authority), "--auth-supernode-private-key", str(self.key)),
            *("--host", HOST, "--port", str(self.port), "--isolation", "process"),
            *("--superexec-auth-secret-file", str(self.secret)),
        )
        environment = {**runtime.CHILD_ENVIRONMENT, "FLWR_HOME": str(self.folder / "home")}
        return processes.Program(self.name, command, environment, last_signal=signal.SIGTERM)

    def prepare(self) -> None:
        """Make a new secret."""
        with storage.guard(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        storage.write_bytes(self.secret, secrets.token_hex(32).encode())


if __name__ == "__main__":
    from fedvfm.flower import node

    node.run_supernode()
