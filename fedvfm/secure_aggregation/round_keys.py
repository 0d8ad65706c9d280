"""The two X25519 key pairs of a site, made for one session and no other.

``channel`` encrypts the shares that sites send each other through the coordinator; its secret never leaves. ``mask``
makes the masks of pairs; its secret is shared, and opened where the site drops out after the masks were agreed.
A signature of the site's own key, which the roster names, vouches for both public keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.ciphers import aead
from cryptography.hazmat.primitives.kdf import hkdf

from fedvfm.storage import hash_chain

SIZE = 32
NONCE_SIZE = 12
TAG_SIZE = 16


@dataclass(frozen=True, slots=True)
class Secrets:
    """The secret halves. Each is 32 bytes."""

    channel: bytes = field(repr=False)
    mask: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Advertised:
    """The public halves, as every other site sees them.

    Attributes:
        site: whose they are.
        channel: 32 bytes.
        mask: 32 bytes.
        signature: of the site's own key over :func:`signed_bytes`.
    """

    site: str
    channel: bytes
    mask: bytes
    signature: str = ""


def fresh() -> Secrets:
    """New key pairs."""
    return Secrets(*(x25519.X25519PrivateKey.generate().private_bytes_raw() for _ in range(2)))


def public(secret: bytes) -> bytes:
    """The public half of a secret one."""
    key = x25519.X25519PrivateKey.from_private_bytes(secret).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def advertise(secrets: Secrets, site: str, recipe: str, sign: Callable[[bytes], str]) -> Advertised:
    """The public halves with the site's signature.

    Args:
        secrets: of :func:`fresh`.
        site: the site's name.
        recipe: hash of the recipe that they are for.
        sign: signs with the site's own key.
    """
    bare = Advertised(site, public(secrets.channel), public(secrets.mask))
    return Advertised(site, bare.channel, bare.mask, sign(signed_bytes(bare, recipe)))


def signed_bytes(keys: Advertised, recipe: str) -> bytes:
    """What the signature is made over."""
    body = {"site": keys.site, "recipe": recipe, "channel": keys.channel.hex(), "mask": keys.mask.hex()}
    return f"fedvfm secure aggregation keys\n{hash_chain.canonical(body)}".encode()


def agreed(secret: bytes, peer: bytes, words: bytes) -> bytes:
    """32 bytes that two sites know and nobody else: X25519, then HKDF with SHA-256.

    Args:
        secret: the own half.
        peer: the other's public half.
        words: the same at both ends; for each purpose others.

    Raises:
        ValueError: if the other's key is one that gives the same secret with any.
    """
    shared = x25519.X25519PrivateKey.from_private_bytes(secret).exchange(x25519.X25519PublicKey.from_public_bytes(peer))
    return hkdf.HKDF(algorithm=hashes.SHA256(), length=SIZE, salt=None, info=words).derive(shared)


def usable(peer: bytes) -> bool:
    """Whether a public half agrees on a secret: those of low order give the same one with any."""
    try:
        agreed(bytes([1] * SIZE), peer, b"")
    except ValueError:
        return False
    return True


def sealed(key: bytes, nonce: bytes, text: bytes, words: bytes) -> bytes:
    """ChaCha20-Poly1305: nonce and ciphertext, bound to ``words``."""
    return nonce + aead.ChaCha20Poly1305(key).encrypt(nonce, text, words)


def unsealed(key: bytes, data: bytes, words: bytes) -> bytes:
    """The inverse of :func:`sealed`.

    Raises:
        ValueError: if it was changed, or is of another key or for other words.
    """
    try:
        return aead.ChaCha20Poly1305(key).decrypt(data[:NONCE_SIZE], data[NONCE_SIZE:], words)
    except InvalidTag:
        raise ValueError("the ciphertext was changed, or is of another session") from None
