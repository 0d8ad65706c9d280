"""The roster document of secure aggregation: which sites, by their keys, may be in a sum. Signed, and approved by hash.

A coordinator that could name the members of a sum as it likes would put one hospital among invented ones and take their
updates off again. So a person at each site approves who the others are, beside the recipe; a site more, or one with a
new key, means another document, another hash and another approval everywhere.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import secure_aggregation as secure_config
from fedvfm.trust import invites, keys, signed_documents

MOST_SITES = 1000


class Listed(schema.Strict):
    """One site of the document."""

    site: schema.SiteName
    public_key: signed_documents.PublicKey

    @property
    def spoken_key(self) -> str:
        """The key's fingerprint as people compare it, with the person at that hospital."""
        return keys.spoken(self.public_key)


class RosterDocument(signed_documents.Document):
    """Sites and their keys, sorted by name."""

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature",)

    format: Literal["fedvfm-roster-1"] = "fedvfm-roster-1"
    federation: invites.FederationName
    created: signed_documents.Time
    sites: Annotated[
        tuple[Listed, ...], Field(strict=False, min_length=secure_config.LEAST_SITES, max_length=MOST_SITES)
    ]
    signature: signed_documents.Signature

    @pydantic.model_validator(mode="after")
    def _sorted(self) -> RosterDocument:
        names, known = [row.site for row in self.sites], [row.public_key for row in self.sites]
        if names != sorted(set(names)) or len(set(known)) < len(known):
            raise ValueError("sites are sorted by name, and no name or key stands twice")
        return self

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of what is signed: what people approve."""
        return hashlib.sha256(self.signed_bytes()).hexdigest()

    @functools.cached_property
    def keys(self) -> Mapping[str, str]:
        """Site -> public key."""
        return {row.site: row.public_key for row in self.sites}

    def verified(self, site: str, signature: str, message: bytes) -> bool:
        """Whether a site of the document signed this."""
        text = self.keys.get(site)
        return text is not None and keys.verified(keys.read_public(text), signature, message)


def make(authority_key: keys.Private, federation: str, sites: Mapping[str, str]) -> RosterDocument:
    """A signed document.

    Args:
        authority_key: of the federation's authority, which signed the invites too.
        federation: its name.
        sites: site -> public key.

    Raises:
        TrustError: if there are too few.
    """
    if len(sites) < secure_config.LEAST_SITES:
        raise errors.TrustError(
            f"a roster document of {len(sites)} sites: {secure_config.LEAST_SITES} or more are needed, or a sum would "
            "tell one site the update of the other. Approve more sites: fedvfm server approve"
        )
    rows = tuple(Listed(site=name, public_key=key) for name, key in sorted(sites.items()))
    created = signed_documents.stamp(signed_documents.now())
    draft = RosterDocument(federation=federation, created=created, sites=rows, signature="A" * 40)
    return draft.model_copy(update={"signature": keys.sign(authority_key, draft.signed_bytes())})


def check(document: RosterDocument, authority: keys.Public, federation: str, site: str, public_key: str) -> None:
    """Check a document that came to a site.

    Args:
        document: as it came.
        authority: the key of the authority that this site trusts.
        federation: the one this site joined.
        site: this one.
        public_key: its own.

    Raises:
        TrustError: if it is another federation's, was changed, or does not list this site with its key.
    """
    if document.federation != federation or not keys.verified(authority, document.signature, document.signed_bytes()):
        raise errors.TrustError("the roster document is not signed by this federation's authority, or was changed")
    if document.keys.get(site) != public_key:
        raise errors.TrustError(f"the roster document does not list site '{site}' with its key")
    for row in document.sites:
        keys.read_public(row.public_key)
