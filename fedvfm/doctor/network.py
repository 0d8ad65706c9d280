"""The way to a coordinator as a SuperNode goes it: past a proxy, through TLS, to ``GET /health`` and its clock."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import math
import os
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedvfm.report import finding
from fedvfm.trust import certificates, signed_documents

PATIENCE_S = 15.0
AHEAD_S, BEHIND_S = 5.0, 305.0
"""How far a SuperNode's clock may be from the coordinator's before Flower refuses its signature."""
NOTABLE_S = 30.0
ENDS_SOON_DAYS = 60
EXPIRED, NOT_YET = 10, 9
NAMES = (62, 64)
"""What OpenSSL calls a certificate for another host name, or another address."""
MAX_HEAD = 65536
_AGAIN = "it is asked again by itself"


@dataclass(frozen=True)
class Route:
    """How an address is reached.

    Attributes:
        host, port: of the coordinator.
        proxy: the hospital's, as its environment names it; empty for none.
        name: what the certificate must be for; empty for ``host``.
    """

    host: str
    port: int
    proxy: str = ""
    name: str = ""

    @property
    def certified(self) -> str:
        """What the certificate must be for."""
        return self.name or self.host

    @property
    def shown(self) -> str:
        """For a person; the proxy's password is left out."""
        found = urllib.parse.urlsplit(self.proxy)
        via = f" through the proxy {found.hostname}:{found.port or 80}" if self.proxy else ""
        return f"{self.host}:{self.port}{via}"


def route(address: str) -> Route:
    """The route that programs take which heed HTTPS_PROXY and NO_PROXY."""
    host, port = certificates.split_address(address)
    found = urllib.request.getproxies_environment()
    proxy = found.get("https") or found.get("all") or ""
    if proxy and urllib.request.proxy_bypass(f"{host}:{port}"):
        proxy = ""
    return Route(host, port, proxy if "://" in proxy or not proxy else f"http://{proxy}")


def examine(way: Route, authority: Path) -> list[finding.Row]:
    """Connect, verify, ask for the health and compare clocks.

    Args:
        way: to the coordinator.
        authority: the only certificate authority that is trusted.
    """
    context = ssl.create_default_context(cafile=authority)
    try:
        with _connected(way) as plain, context.wrap_socket(plain, server_hostname=way.certified) as secure:
            version, shown = secure.version(), secure.getpeercert() or {}
            asked = time.time()
            status, date, load = _health(secure, way)
            between = (asked + time.time()) / 2
    except ssl.SSLCertVerificationError as error:
        return [finding.ok("reach", way.shown), _unverified(way, authority, error)]
    except ssl.SSLEOFError as error:
        return [_unreached(way, error)]
    except ssl.SSLError as error:
        remedy = "ask what listens there; the coordinator speaks TLS 1.2 or 1.3"
        return [finding.blocker("reach", f"{way.shown}: no TLS is spoken there ({error.reason or 'ended'})", remedy)]
    except (OSError, http.client.HTTPException) as error:
        return [_unreached(way, error)]
    reached = finding.ok("reach", f"{way.shown}, {version}")
    ends = ssl.cert_time_to_seconds(str(shown["notAfter"])) if "notAfter" in shown else math.inf
    return [reached, _certified(ends), _answered(way, status, load), _clock(date, between)]


def _certified(ends: float) -> finding.Row:
    """The coordinator's certificate, by the time it ends (seconds since 1970)."""
    days = (ends - time.time()) / 86400
    if days < ENDS_SOON_DAYS:
        words = f"the coordinator's, signed by the federation's authority; it expires in {days:.0f} days"
        return finding.warning("certificate", words, "the coordinator starts its server anew, which renews it")
    return finding.ok("certificate", "the coordinator's, signed by the federation's authority")


@contextlib.contextmanager
def _connected(way: Route) -> Iterator[socket.socket]:
    if not way.proxy:
        with socket.create_connection((way.host, way.port), timeout=PATIENCE_S) as plain:
            yield plain
        return
    found = urllib.parse.urlsplit(way.proxy)
    with socket.create_connection((found.hostname or "", found.port or 80), timeout=PATIENCE_S) as plain:
        _tunnel(plain, way, found)
        yield plain


def _tunnel(plain: socket.socket, way: Route, found: urllib.parse.SplitResult) -> None:
    target = f"[{way.host}]:{way.port}" if ":" in way.host else f"{way.host}:{way.port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if found.username:
        pair = f"{urllib.parse.unquote(found.username)}:{urllib.parse.unquote(found.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
    plain.sendall("\r\n".join([*lines, "", ""]).encode())
    head = b""
    while b"\r\n\r\n" not in head and len(head) < MAX_HEAD:
        piece = plain.recv(1)  # not one byte of what follows belongs to the head
        if not piece:
            break
        head += piece
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    if len(words) < 2 or words[1] != "200":
        raise ProxyRefused(words[1] if len(words) > 1 else "nothing")


class ProxyRefused(OSError):
    """A proxy did not open the tunnel; its argument is the status it gave."""


def _health(secure: ssl.SSLSocket, way: Route) -> tuple[int, str, bool]:
    """Status and date, and whether it asked its sites to wait lately."""
    secure.sendall(f"GET /health HTTP/1.1\r\nHost: {way.host}\r\nConnection: close\r\n\r\n".encode())
    answer = http.client.HTTPResponse(secure)
    answer.begin()
    return answer.status, answer.headers.get("Date", ""), "Retry-After" in answer.headers


def _unreached(way: Route, error: Exception) -> finding.Row:
    if isinstance(error, ProxyRefused):
        status = str(error)
        remedy = (
            "put user and password into HTTPS_PROXY: http://USER:PASSWORD@PROXY:PORT"
            if status == "407"
            else f"ask those who run the proxy to allow CONNECT to {way.host}:{way.port}"
        )
        return finding.blocker("reach", f"{way.shown}: the proxy answered {status} to CONNECT", remedy)
    if isinstance(error, socket.gaierror):
        name = (urllib.parse.urlsplit(way.proxy).hostname if way.proxy else way.host) or ""
        return finding.blocker(
            "reach", f"the name {name} cannot be resolved", "ask for its DNS entry, or set HTTPS_PROXY"
        )
    if isinstance(error, ConnectionResetError | ssl.SSLEOFError | http.client.RemoteDisconnected):
        words = f"{way.shown}: somebody listens there and closed the connection ({type(error).__name__})"
        remedy = f"too much may come there ('fedvfm server status' shows it), or a firewall cuts it; {_AGAIN}"
        return finding.blocker("reach", words, remedy)
    what = "nobody listens there" if isinstance(error, ConnectionRefusedError) else "no answer"
    if isinstance(error, http.client.HTTPException):
        what = "the answer is no HTTP"
    words = f"{way.shown}: {what} ({type(error).__name__})"
    remedy = "ask the coordinator whether the server runs, and your firewall for outgoing TCP to that address and port"
    return finding.blocker("reach", words, remedy)


def _unverified(way: Route, authority: Path, error: ssl.SSLCertVerificationError) -> finding.Row:
    """Why a certificate was not accepted, from what was shown there instead."""
    shown = _shown(way)
    if error.verify_code in (EXPIRED, NOT_YET) and shown is not None:
        return _dated(shown, error.verify_code)
    if error.verify_code in NAMES and shown is not None:
        names = ", ".join(certificates.names_of(shown))
        remedy = f"the coordinator runs: fedvfm server certify --san {way.certified}, and restarts"
        return finding.blocker("certificate", f"it is for {names}, not for {way.certified}", remedy)
    ours = certificates.read_pem(authority.read_text(), str(authority))
    if shown is not None and shown.issuer == ours.subject:
        words = "it is from another authority of the same name: the coordinator made a new one since this site joined"
        return finding.blocker("certificate", words, "ask for a new invite, and join into a new --state folder")
    who = signed_documents.shown(_common_name(shown.issuer)) if shown is not None else "unknown"
    words = (
        f"what answers at {way.shown} shows a certificate from '{who}', not from the federation's authority: a proxy "
        "that opens TLS stands between, or another server"
    )
    remedy = f"ask those who run it to let {way.host}:{way.port} pass unopened. Never trust '{who}' for the federation"
    return finding.blocker("intercepted", words, remedy)


def _dated(shown: x509.Certificate, code: int) -> finding.Row:
    here = signed_documents.stamp(signed_documents.now())
    if code == NOT_YET:
        told = f"it is good from {signed_documents.stamp(shown.not_valid_before_utc)}; it is {here} here"
        return finding.blocker("certificate", told, "set this machine's clock")
    told = f"it expired at {signed_documents.stamp(shown.not_valid_after_utc)}; it is {here} here"
    remedy = "if your clock is right, the coordinator runs: fedvfm server certify, and restarts"
    return finding.blocker("certificate", told, remedy)


def _shown(way: Route) -> x509.Certificate | None:
    """The certificate that is shown, trusted or not; nothing is sent to who shows it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connected(way) as plain, context.wrap_socket(plain, server_hostname=way.certified) as secure:
            der = secure.getpeercert(binary_form=True)
            return None if der is None else x509.load_der_x509_certificate(der)
    except (OSError, ValueError):
        return None


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME) or name.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(found[0].value)[:80] if found else "nobody named"


def _answered(way: Route, status: int, load: bool) -> finding.Row:
    if load or status == 503:
        words = f"{way.host}:{way.port} is up and has too much to do: it told its sites to wait (503)"
        return finding.blocker("load", words, f"{_AGAIN}; there 'fedvfm server status' shows what comes")
    if status == 200:
        return finding.ok("health", f"{way.host}:{way.port} is well")
    remedy = "the coordinator's proxy runs and its SuperLink does not: wait, then ask the coordinator"
    return finding.blocker("health", f"{way.host}:{way.port} answers {status} to GET /health", remedy)


def _clock(date: str, now: float) -> finding.Row:
    """This machine's clock against the Date the coordinator gave, which is in whole seconds."""
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return finding.warning("clock", "the coordinator told no date", "compare both clocks by hand")
    ahead = now - theirs - 0.5
    words = f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    remedy = "let both machines take their time from NTP (timedatectl set-ntp true)"
    if ahead > AHEAD_S or -ahead > BEHIND_S:
        return finding.blocker("clock", words, remedy)
    if abs(ahead) > NOTABLE_S:
        return finding.warning("clock", words, remedy)
    return finding.ok("clock", words)


def settings() -> finding.Row:
    """Whether the environment sends this machine's own addresses through a proxy."""
    from fedvfm.flower import runtime  # it loads Flower

    found = urllib.request.getproxies_environment()
    named = sorted(name for name in ("http", "https", "all") if found.get(name))
    if not named:
        return finding.ok("proxy-settings", "no proxy is set")
    listed = {part.strip() for part in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")}
    missing = [] if "*" in listed else [one for one in runtime.LOOPBACK if one not in listed]
    words = ", ".join(f"{name.upper()}_PROXY" for name in named)
    if not missing:
        return finding.ok("proxy-settings", f"{words} set; loopback goes past it")
    remedy = f"set NO_PROXY={','.join(runtime.LOOPBACK)} too (fedvfm does so for its own processes)"
    return finding.warning("proxy-settings", f"{words} set, but NO_PROXY does not name {', '.join(missing)}", remedy)
