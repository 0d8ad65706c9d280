"""Keys and tokens: what is signed is verified, what was changed is not, and private halves are their owner's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedvfm import errors
from fedvfm.trust import keys, tokens


@pytest.mark.parametrize("pem", [False, True], ids=["openssh", "pem"])
def test_private_keys_come_back_and_are_0600_under_any_umask(tmp_path: Path, pem: bool) -> None:
    path, key = tmp_path / "site.key", keys.make()
    before = os.umask(0)
    try:
        keys.write_private(path, key, pem=pem)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.public_text(keys.read_private(path)) == keys.public_text(key)


def test_a_supernode_and_the_register_command_can_read_them(tmp_path: Path) -> None:
    """Both take OpenSSH's form of a NIST curve."""
    key = keys.make()
    keys.write_private(tmp_path / "site.key", key)
    found = serialization.load_ssh_private_key((tmp_path / "site.key").read_bytes(), None)
    assert isinstance(found, ec.EllipticCurvePrivateKey)
    public = serialization.load_ssh_public_key((keys.public_text(key) + "\n").encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.curve.name == "secp384r1"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    keys.write_private(tmp_path / "k", keys.make())
    (tmp_path / "k").chmod(mode)
    with pytest.raises(errors.TrustError, match=rf"permissions {mode:04o}; others can read it. Run: chmod 600"):
        keys.read_private(tmp_path / "k")


def test_private_keys_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "k"
    with pytest.raises(errors.TrustError, match="cannot be read: No such file"):
        keys.read_private(path)
    other = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for data, said in (
        (b"", "is damaged"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "is damaged"),
        (other.private_bytes(*form), "not an elliptic curve key on P-384"),
        (ed25519.Ed25519PrivateKey.generate().private_bytes(*form), "not an elliptic curve key on P-384"),
    ):
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(errors.TrustError, match=said):
            keys.read_private(path)


def test_public_keys_are_taken_in_one_form_only() -> None:
    text = keys.public_text(keys.make())
    assert keys.public_text(keys.read_public(text)) == text
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    other = small.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    for wrong in (
        text + " comment",
        text + "\n",
        " " + text,
        text[:-8],
        "",
        other,
        "ssh-rsa AAAA",
        text.replace("A", "é", 1),
    ):
        with pytest.raises(errors.TrustError, match="public key: is not"):
            keys.read_public(wrong)


def test_signatures() -> None:
    key, other = keys.make(), keys.make()
    signature = keys.sign(key, b"message")
    assert keys.verified(key.public_key(), signature, b"message")
    assert not keys.verified(key.public_key(), signature, b"messagE")
    assert not keys.verified(other.public_key(), signature, b"message")
    for wrong in ("", "not base64!", signature[:-4], "A" * 40):
        assert not keys.verified(key.public_key(), wrong, b"message")


def test_a_token_proves_for_its_own_site_and_federation_alone() -> None:
    token = tokens.make()
    kept = tokens.verifier(token, "trial", "north")
    assert token not in kept
    proof = tokens.prove(token, "trial", "north", b"message")
    assert tokens.proven(kept, proof, b"message")
    assert not tokens.proven(kept, proof, b"another")
    for federation, site in (("trial", "south"), ("other", "north")):
        assert not tokens.proven(kept, tokens.prove(token, federation, site, b"message"), b"message")
        assert not tokens.proven(tokens.verifier(token, federation, site), proof, b"message")
    assert not tokens.proven(kept, tokens.prove(tokens.make(), "trial", "north", b"message"), b"message")


def test_what_the_server_keeps_of_a_token_proves_nothing() -> None:
    """Whoever steals the verifier cannot use it in the token's place."""
    kept = tokens.verifier(tokens.make(), "trial", "north")
    assert not tokens.proven(kept, tokens.prove(kept, "trial", "north", b"message"), b"message")
    assert not tokens.proven("00" * 32, "A" * 88, b"message")
    assert not tokens.proven("zz", "", b"message")


def test_tokens_differ() -> None:
    assert len({tokens.make() for _ in range(100)}) == 100
    assert all(len(tokens.make()) == 43 for _ in range(10))
