"""The federation's own certificate authority, the server's certificate, and the short fingerprint told by telephone."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated

from cryptography import exceptions, x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import Field

from fedvfm import errors
from fedvfm.trust import keys, signed_documents

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
BACKDATED = datetime.timedelta(hours=1)
"""Certificates are good from an hour before they were made: clocks differ."""
GROUPS = 8
"""Groups of four letters of five bits: 160 bits of the sha256."""

Address = Annotated[str, Field(min_length=3, max_length=300)]
_HOST = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)

Certificate = x509.Certificate


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[IPv6]:port`` -> host without brackets, and port.

    Raises:
        ConfigError: if it is neither.
    """
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535 or not _is_name(host):
        raise errors.ConfigError("--address", [f"'{signed_documents.shown(address)}': write it as host:port"])
    return host, int(port)


def _is_name(name: str) -> bool:
    return _HOST.fullmatch(name) is not None or _as_ip(name) is not None


def _as_ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def names_faults(names: Sequence[str]) -> list[str]:
    """Names that no certificate can carry, one sentence a fault."""
    return [
        f"'{signed_documents.shown(name)}': is neither a host name nor an address"
        for name in names
        if not _is_name(name)
    ]


def _subject(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _usage(**given: bool) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: given.get(name, False) for name in every.split()})


def _builder(
    subject: x509.Name, issuer: x509.Name, public: keys.Public, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def make_authority(federation: str, now: datetime.datetime) -> tuple[keys.Private, Certificate]:
    """A new authority, good for ten years, that signs server certificates and invites and nothing below them."""
    key = keys.make()
    subject = _subject(f"{federation} authority")
    made = (
        _builder(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(digital_signature=True, key_cert_sign=True, crl_sign=True), critical=True)
    )
    return key, made.sign(key, hashes.SHA384())


def make_server(
    authority_key: keys.Private, authority: Certificate, names: Sequence[str], now: datetime.datetime
) -> tuple[keys.Private, Certificate]:
    """A new server key, and its certificate for these host names and addresses; it never outlives the authority."""
    key = keys.make()
    days = min(SERVER_DAYS, (authority.not_valid_after_utc - now).days)
    found: list[x509.GeneralName] = [
        x509.DNSName(name) if (ip := _as_ip(name)) is None else x509.IPAddress(ip) for name in dict.fromkeys(names)
    ]
    made = (
        _builder(_subject(names[0]), authority.subject, key.public_key(), now, days)
        .add_extension(x509.SubjectAlternativeName(found), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    return key, made.sign(authority_key, hashes.SHA384())


def to_pem(certificate: Certificate) -> str:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def read_pem(text: str, what: str) -> Certificate:
    """The one certificate of a PEM text.

    Raises:
        TrustError: if there is not exactly one.
    """
    try:
        (found,) = x509.load_pem_x509_certificates(text.encode())
        return found
    except ValueError:
        raise errors.TrustError(f"{what}: is not one certificate in PEM") from None


def authority_key(certificate: Certificate, what: str) -> keys.Public:
    """The public key of an authority made by :func:`make_authority`.

    Raises:
        TrustError: if the certificate is of another kind.
    """
    try:
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        key = certificate.public_key()
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension):
        authority, key = False, None
    if not authority or not isinstance(key, keys.Public) or not isinstance(key.curve, ec.SECP384R1):
        raise errors.TrustError(f"{what}: is not a certificate authority on P-384")
    return key


def issued_key(certificate: Certificate, authority: Certificate, what: str) -> keys.Public:
    """The public key of a certificate that an authority signed, whether or not it has ended since.

    Raises:
        TrustError: if the authority did not sign it, or its key is of another kind.
    """
    try:
        certificate.verify_directly_issued_by(authority)
        key = certificate.public_key()
    except (ValueError, TypeError, exceptions.InvalidSignature):
        key = None
    if not isinstance(key, keys.Public) or not isinstance(key.curve, ec.SECP384R1):
        raise errors.TrustError(f"{what}: is not a certificate that this federation's authority signed")
    return key


def names_of(certificate: Certificate) -> list[str]:
    """Host names and addresses of a server certificate."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(one.value) for one in found]


def fingerprint(certificate: Certificate) -> str:
    """``ABCD-EFGH-...``: 160 bits of the sha256 of the certificate, to be compared by eye or by ear."""
    digest = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()
    text = base64.b32encode(digest).decode()[: 4 * GROUPS]
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def is_fingerprint(certificate: Certificate, told: str) -> bool:
    """Whether ``told`` is the certificate's whole fingerprint, in constant time; case, spaces and dashes are free."""
    plain = re.sub(r"[\s-]", "", told).upper().encode(errors="replace")
    return hmac.compare_digest(plain, fingerprint(certificate).replace("-", "").encode())
