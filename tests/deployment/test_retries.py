"""Which errors end the asking of another process, told by OpenSSL's reason and not by words."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import httpx
import pytest

from fedvfm.flower import runtime
from fedvfm.runtime import processes
from fedvfm.trust import certificates, keys, signed_documents


def test_an_untrusted_certificate_is_final_and_an_absent_server_is_not(tmp_path: Path) -> None:
    now, port = signed_documents.now(), processes.free_port()
    authority_key, authority = certificates.make_authority("trial", now)
    key, certificate = certificates.make_server(authority_key, authority, ("127.0.0.1",), now)
    keys.write_private(tmp_path / "server.key", key, pem=True)
    (tmp_path / "server.pem").write_text(certificates.to_pem(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    asked = []
    _, foreign = certificates.make_authority("another", now)
    trusts = ssl.create_default_context(cadata=certificates.to_pem(foreign))
    invoker = runtime.patient(threading.Event(), 2.0)

    def ask() -> None:
        asked.append(port)
        httpx.get(f"https://127.0.0.1:{port}/", verify=trusts, trust_env=False, timeout=60.0)

    with pytest.raises(httpx.ConnectError):
        invoker.invoke(ask)
    assert len(asked) > 1, "nobody listened: it was asked again"
    asked.clear()
    with socket.create_server(("127.0.0.1", port)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                pass

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(httpx.ConnectError):
            runtime.patient(threading.Event(), 600.0).invoke(ask)
        server.join(60.0)
    assert len(asked) == 1, "with all patience it is asked once"
