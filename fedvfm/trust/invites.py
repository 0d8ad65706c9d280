"""Invites: the one small file a coordinator hands to a hospital.

The whole of it is signed with the key of the federation's authority, so the fingerprint that came by another channel
vouches for all: address, site name, token and recipe.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.trust import certificates, keys, locked_recipe, signed_documents, tokens
from fedvfm.trust import study as studies

VALID_DAYS = 30

FederationName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
Pem = Annotated[str, Field(max_length=8000)]


class Invite(signed_documents.Document):
    """What a hospital needs to join.

    Attributes:
        authority: the federation's certificate authority, PEM.
        token: good once, for this site's name, until ``expires``.
        lock: the recipe that runs first.
        study: what the coordinator says of it in its own words.
    """

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature",)

    format: Literal["fedvfm-invite-1"] = "fedvfm-invite-1"
    federation: FederationName
    address: certificates.Address
    site: schema.SiteName
    authority: Pem
    token: tokens.Token
    created: signed_documents.Time
    expires: signed_documents.Time
    lock: locked_recipe.LockedRecipe
    study: studies.Study | None = None
    signature: signed_documents.Signature

    @pydantic.model_serializer(mode="wrap")
    def _without_nothing(self, plain: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """An invite without a study does not mention it: those of before are signed so."""
        return {name: value for name, value in plain(self).items() if name != "study" or value is not None}


def make(
    authority_key: keys.Private,
    *,
    federation: str,
    address: str,
    site: str,
    authority: str,
    recipe: locked_recipe.LockedRecipe,
    now: datetime.datetime,
    days: int = VALID_DAYS,
    study: studies.Study | None = None,
) -> Invite:
    """A signed invite with a new token."""
    check_name(site)
    draft = Invite(
        federation=federation,
        address=address,
        site=site,
        authority=authority,
        token=tokens.make(),
        created=signed_documents.stamp(now),
        expires=signed_documents.stamp(now + datetime.timedelta(days=days)),
        lock=recipe,
        study=study,
        signature="A" * 40,
    )
    return draft.model_copy(update={"signature": keys.sign(authority_key, draft.signed_bytes())})


def check(invite: Invite, told: str, now: datetime.datetime) -> None:
    """Check an invite against the fingerprint that came by another channel.

    Raises:
        TrustError: if the authority is another, anything was changed, or the invite is too old.
    """
    authority = certificates.read_pem(invite.authority, "the invite's certificate")
    if not certificates.is_fingerprint(authority, told):
        raise errors.TrustError(
            "the invite's certificate does not have the fingerprint you were told. Do not join: ask the coordinator, "
            "by telephone, to read it again, and to send a new invite if it still differs"
        )
    key = certificates.authority_key(authority, "the invite's certificate")
    if not keys.verified(key, invite.signature, invite.signed_bytes()):
        raise errors.TrustError("the invite was changed after the coordinator signed it. Ask for it again")
    if now >= signed_documents.moment(invite.expires):
        raise errors.TrustError(
            f"the invite expired at {invite.expires}; it is {signed_documents.stamp(now)} here. "
            "Ask for a new one, or set "
            "this machine's clock"
        )
    certificates.split_address(invite.address)
    check_name(invite.site)


def check_name(site: str) -> None:
    """A site's name is a file's name too, on every system.

    Raises:
        TrustError: if it cannot be one.
    """
    if site.endswith((".", " ")):
        raise errors.TrustError(f"site name '{site}': must end in a letter, a digit, '-' or '_'")
