"""The one-time token of an invite, bound to a federation and to a site's name.

A key pair is derived from the token. The server keeps the public half only: whoever reads its files learns neither the
token nor a way to prove that he holds it. The site signs with the private half, so the token itself goes no further
than the invite.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Annotated

from cryptography import exceptions
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.kdf import hkdf
from pydantic import Field

TOKEN_BYTES = 32

Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
Verifier = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def make() -> str:
    """A new token: 256 random bits."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def _key(token: str, federation: str, site: str) -> ed25519.Ed25519PrivateKey:
    """Another name or federation gives another key."""
    about = f"fedvfm token\x1f{federation}\x1f{site}".encode()
    seed = hkdf.HKDF(hashes.SHA256(), 32, salt=None, info=about).derive(token.encode())
    return ed25519.Ed25519PrivateKey.from_private_bytes(seed)


def verifier(token: str, federation: str, site: str) -> str:
    """What the server keeps, in hexadecimal."""
    return _key(token, federation, site).public_key().public_bytes_raw().hex()


def prove(token: str, federation: str, site: str, message: bytes) -> str:
    """A signature that only the token's holder can make, in base64."""
    return base64.b64encode(_key(token, federation, site).sign(message)).decode()


def proven(kept: str, proof: str, message: bytes) -> bool:
    """Whether ``proof`` over ``message`` was made with the token of this verifier."""
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(kept))
        key.verify(base64.b64decode(proof, validate=True), message)
    except (exceptions.InvalidSignature, binascii.Error, ValueError):
        return False
    return True
