"""Certificates: a real TLS handshake with strict checks, and the fingerprint people read to each other."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest

from fedvfm import errors
from fedvfm.trust import certificates, keys, signed_documents

NOW = signed_documents.now()


def handshake(folder: Path, trusted: str, host: str, names: tuple[str, ...], now: datetime.datetime = NOW) -> None:
    """A TLS handshake in memory: a server with a certificate for ``names``, a client that asks for ``host``."""
    authority_key, authority = certificates.make_authority("trial", now)
    key, certificate = certificates.make_server(authority_key, authority, names, now)
    keys.write_private(folder / "server.key", key, pem=True)
    (folder / "server.pem").write_text(certificates.to_pem(certificate))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cadata=trusted or certificates.to_pem(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname=host),
        server.wrap_bio(up, down, server_side=True),
    ]
    for turn in range(8):
        try:
            ends[turn % 2].do_handshake()
        except ssl.SSLWantReadError:
            continue


@pytest.mark.parametrize("host", ["server.example", "10.1.2.3", "::1", "localhost"])
def test_tls_with_strict_checks(tmp_path: Path, host: str) -> None:
    handshake(tmp_path, "", host, ("server.example", "10.1.2.3", "::1", "localhost"))


def test_tls_refuses_another_name_another_authority_and_an_expired_certificate(tmp_path: Path) -> None:
    names = ("server.example",)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, "", "other.example", names)
    _, foreign = certificates.make_authority("trial", NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(tmp_path, certificates.to_pem(foreign), "server.example", names)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path, "", "server.example", names, NOW - datetime.timedelta(days=900))


def test_expiry_is_sane_and_clocks_may_differ_by_an_hour() -> None:
    key, authority = certificates.make_authority("trial", NOW)
    _, server = certificates.make_server(key, authority, ["a"], NOW)
    late = NOW + datetime.timedelta(days=3600)
    _, last = certificates.make_server(key, authority, ["a"], late)
    assert authority.not_valid_before_utc == NOW - datetime.timedelta(hours=1)
    assert (authority.not_valid_after_utc - NOW).days == 3650
    assert (server.not_valid_after_utc - NOW).days == 825
    assert last.not_valid_after_utc <= authority.not_valid_after_utc, "no certificate outlives its authority"


def test_names_of_a_server_certificate() -> None:
    key, authority = certificates.make_authority("trial", NOW)
    _, made = certificates.make_server(key, authority, ["a.example", "10.0.0.1", "a.example"], NOW)
    assert certificates.names_of(made) == ["a.example", "10.0.0.1"]
    with pytest.raises(errors.TrustError, match="server: is not a certificate authority"):
        certificates.authority_key(made, "server")
    assert certificates.authority_key(authority, "authority") == key.public_key()


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_not_one_certificate(text: str) -> None:
    with pytest.raises(errors.TrustError, match="it: is not one certificate in PEM"):
        certificates.read_pem(text, "it")
    _, one = certificates.make_authority("trial", NOW)
    with pytest.raises(errors.TrustError, match="is not one certificate"):
        certificates.read_pem(2 * certificates.to_pem(one), "two")


def test_the_fingerprint_is_160_bits_that_a_person_can_read() -> None:
    _, one = certificates.make_authority("trial", NOW)
    _, other = certificates.make_authority("trial", NOW)
    told = certificates.fingerprint(one)
    groups = told.split("-")
    assert [len(group) for group in groups] == [4] * 8
    assert set("".join(groups)) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
    assert told != certificates.fingerprint(other)
    for way in (told, told.lower(), told.replace("-", ""), told.replace("-", " "), f"  {told}\n"):
        assert certificates.is_fingerprint(one, way)
        assert not certificates.is_fingerprint(other, way)


@pytest.mark.parametrize("wrong", ["", "-", "ABCD", "é" * 32, "\udc80"])
def test_part_of_a_fingerprint_is_none(wrong: str) -> None:
    _, one = certificates.make_authority("trial", NOW)
    told = certificates.fingerprint(one)
    for text in (wrong, told[:-1], told[:-5], told + "A", told[:4] + told):
        assert not certificates.is_fingerprint(one, text)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("server.example:8443", "server.example", 8443), ("10.0.0.1:1", "10.0.0.1", 1), ("[::1]:65535", "::1", 65535)],
)
def test_addresses(address: str, host: str, port: int) -> None:
    assert certificates.split_address(address) == (host, port)


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "host:8443/x", "http://h:1", "a b:1", "ho\nst:1",
     "-a:1", "a..b:1", "host:\u0661", "ü.example:1", "a_b:1", "*.example:1", "h:1\n"],
)  # fmt: skip
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(errors.ConfigError, match="write it as host:port") as caught:
        certificates.split_address(address)
    assert "\n" not in str(caught.value).replace("\n  - ", ""), "a line break in a name must not make a line"
