"""Key pairs of sites and of the server: elliptic curve P-384, made where they are used, never sent.

Private keys are stored as OpenSSH writes them, because that is what a SuperNode reads; the server's TLS key is PEM.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import stat
from pathlib import Path

from cryptography import exceptions
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedvfm import errors
from fedvfm.storage import storage

Private = ec.EllipticCurvePrivateKey
Public = ec.EllipticCurvePublicKey

GROUPS = 4
_ALGORITHM = ec.ECDSA(hashes.SHA384())


def make() -> Private:
    """A new private key on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def write_private(path: Path, key: Private, *, pem: bool = False) -> None:
    """Write a private key for its owner alone (0600): OpenSSH's form, or PEM for TLS."""
    form = serialization.PrivateFormat.PKCS8 if pem else serialization.PrivateFormat.OpenSSH
    storage.write_bytes(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def read_private(path: Path) -> Private:
    """A private key of either form.

    Raises:
        TrustError: if it is missing, of another kind, or open to others than its owner.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        raise errors.TrustError(f"private key {path}: cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise errors.TrustError(
            f"private key {path}: has permissions {mode:04o}; others can read it. Run: chmod 600 {path}, and think "
            "about who may have read it"
        )
    try:
        ssh = data.startswith(b"-----BEGIN OPENSSH")
        load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
        key = load(data, None)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm):
        raise errors.TrustError(f"private key {path}: is damaged. Restore it from a backup") from None
    if not isinstance(key, Private) or not isinstance(key.curve, ec.SECP384R1):
        raise errors.TrustError(f"private key {path}: is not an elliptic curve key on P-384")
    return key


def to_data(key: Private) -> bytes:
    """A private key as it lies inside a file that is secret as a whole."""
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.DER, form, serialization.NoEncryption())


def from_data(data: bytes) -> Private:
    """The inverse of :func:`to_data`.

    Raises:
        TrustError: if it is none.
    """
    try:
        key = serialization.load_der_private_key(data, None)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Private):
        raise errors.TrustError("private key: is damaged. Restore it from a backup")
    return key


def public_text(key: Private | Public) -> str:
    """The public key in OpenSSH's form, without a comment."""
    public = key.public_key() if isinstance(key, Private) else key
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def read_public(text: str) -> Public:
    """The inverse of :func:`public_text`; only its one way of writing a key is taken.

    Raises:
        TrustError: if it is no key on P-384 written so.
    """
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, exceptions.UnsupportedAlgorithm):
        raise errors.TrustError("public key: is not of the known form") from None
    if not isinstance(key, Public) or not isinstance(key.curve, ec.SECP384R1) or public_text(key) != text:
        raise errors.TrustError("public key: is not an elliptic curve key on P-384")
    return key


def fingerprint(text: str) -> str:
    """sha256 of a public key's text, in hexadecimal: how logs name a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def spoken(text: str) -> str:
    """``ABCD-EFGH-IJKL-MNOP``: 80 bits of the sha256 of a public key's text, to be compared by eye or by ear."""
    code = base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[: 4 * GROUPS]
    return "-".join(code[start : start + 4] for start in range(0, len(code), 4))


def is_spoken(text: str, told: str) -> bool:
    """Whether ``told`` is the whole of :func:`spoken`, in constant time; case, spaces and dashes are free."""
    plain = re.sub(r"[\s-]", "", told).upper().encode(errors="replace")
    return hmac.compare_digest(plain, spoken(text).replace("-", "").encode())


def sign(key: Private, message: bytes) -> str:
    """ECDSA with SHA-384, in base64."""
    return base64.b64encode(key.sign(message, _ALGORITHM)).decode()


def verified(key: Public, signature: str, message: bytes) -> bool:
    """Whether ``signature`` is this key's over ``message``."""
    try:
        key.verify(base64.b64decode(signature, validate=True), message, _ALGORITHM)
    except (exceptions.InvalidSignature, ValueError):  # of base64: it has letters that are none
        return False
    return True
