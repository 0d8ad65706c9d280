"""Requests: the one small file a hospital sends back. It holds a public key and two proofs, and no secret."""

from __future__ import annotations

import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedvfm.config import schema
from fedvfm.trust import invites, keys, locked_recipe, signed_documents, tokens

_BLANK = "A" * 40

TokenProof = Annotated[str, Field(pattern=r"^([A-Za-z0-9+/]{86}==|A{40})$")]


class Request(signed_documents.Document):
    """A site's wish to join.

    Attributes:
        public_key: the site's, made there.
        recipe: hash of the recipe that the site approved.
        version: of the fedvfm at the site.
        token_proof: made with the invite's token over all fields but the two proofs.
        signature: made with the private half of ``public_key`` over the same: the sender holds it.
    """

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature", "token_proof")

    format: Literal["fedvfm-request-1"] = "fedvfm-request-1"
    federation: invites.FederationName
    site: schema.SiteName
    public_key: signed_documents.PublicKey
    recipe: schema.Sha256
    version: locked_recipe.Version
    created: signed_documents.Time
    token_proof: TokenProof
    signature: signed_documents.Signature


def make(invite: invites.Invite, key: keys.Private, now: datetime.datetime) -> Request:
    """The request that answers ``invite``."""
    draft = Request(
        federation=invite.federation,
        site=invite.site,
        public_key=keys.public_text(key),
        recipe=invite.lock.hash,
        version=locked_recipe.version(),
        created=signed_documents.stamp(now),
        token_proof=_BLANK,
        signature=_BLANK,
    )
    message = draft.signed_bytes()
    proof = tokens.prove(invite.token, invite.federation, invite.site, message)
    return draft.model_copy(update={"token_proof": proof, "signature": keys.sign(key, message)})


def signed_by_its_key(request: Request) -> bool:
    """Whether the sender holds the private half of the public key.

    Raises:
        TrustError: if the public key is none on P-384.
    """
    return keys.verified(keys.read_public(request.public_key), request.signature, request.signed_bytes())


def has_token(request: Request, verifier: str) -> bool:
    """Whether the sender held the token of this verifier."""
    return tokens.proven(verifier, request.token_proof, request.signed_bytes())
