"""The sessions of one site on disk: keys that are good for one session, one masking in it, one opening in a round.

What leaves was written first, so that a site that is killed and asked again says the same. Three rules stand on these
files, and hold over crashes and whatever a coordinator asks:

- a key pair takes part in one session and no second one;
- a session masks one vector: a second one under the same masks would give away the difference of the two;
- in a round of a recipe shares leave for one session and one list of survivors. The difference of two sums would be
  the update of whoever is in one of them alone.

    <recipe>.keys                      the key pairs of the next session
    <recipe>-<round>-<session>.session secrets, shares and what was sent of a session; gone when the next one begins
    <recipe>-<round>.opened            what left to open the sum of a round; kept, so that no other one ever does
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.protocol import secure_messages
from fedvfm.secure_aggregation import masks, participant, round_keys
from fedvfm.secure_aggregation import session as sessions
from fedvfm.storage import storage

_Bytes = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=400)]
_Pieces = dict[Annotated[str, Field(max_length=200)], _Bytes]
Form = TypeVar("Form", bound=schema.Strict)


class _Keys(schema.Strict):
    """Secrets of the next session, and the signature on their public halves."""

    channel: _Bytes
    mask: _Bytes
    signature: str


class _Kept(schema.Strict):
    """A session as it is kept. ``masked`` is the sha256 of the masked numbers that were sent, or empty."""

    session: str
    channel: _Bytes
    mask: _Bytes
    seed: _Bytes
    own_seed: _Bytes
    own_mask: _Bytes
    outbox: _Pieces
    commitment: str
    inbox: _Pieces = Field(default={})
    masked: str = ""


class _Opened(schema.Strict):
    """What left to open a sum."""

    session: schema.Sha256
    survivors: list[str]
    seeds: _Pieces
    masks: _Pieces


class Sessions:
    """What a site does in the sessions of its recipes.

    Args:
        folder: private; made when needed.
        site: the site's name.
        sign: signs with the site's own key, which the roster document names.
    """

    def __init__(self, folder: Path, site: str, sign: Callable[[bytes], str]) -> None:
        self._folder, self._site, self._sign = folder, site, sign

    def advertised(self, recipe: str) -> round_keys.Advertised:
        """The public keys of the next session; made now if there are none that are unspent."""
        return self._public(self._next(recipe))

    def lists(self, session: sessions.Session) -> bool:
        """Whether a session lists the next keys of this site, or is one that it takes part in already."""
        if self._find(session.recipe, session.round, session.id) is not None:
            return True
        return self._site in session.points and session.of(self._site) == self.advertised(session.recipe)

    def apart(self, recipe: str) -> secure_messages.Dealing:
        """The answer to a session that lists other keys of this site: its next ones, and no shares."""
        return secure_messages.Dealing(self._site, "", {}, "", self.advertised(recipe))

    def deal(self, session: sessions.Session) -> secure_messages.Dealing:
        """Take part in a session and share its secrets; asked again for the same one, the same.

        Raises:
            SecureAggregationError: ``secure-opened`` if the sum of this round was opened before, ``secure-session`` if
                the session lists other keys.
        """
        kept = self._find(session.recipe, session.round, session.id)
        if kept is None:
            self._require_closed(session.recipe, session.round)
            if not self.lists(session):
                raise errors.SecureAggregationError("secure-session", "the session lists other keys of this site")
            kept = self._begin(session, self._next(session.recipe))
        outbox = {peer: _data(text) for peer, text in kept.outbox.items()}
        return secure_messages.Dealing(self._site, session.id, outbox, kept.commitment, self.advertised(session.recipe))

    def mask(
        self,
        recipe: str,
        number: int,
        base: str,
        session_id: str,
        inbox: Mapping[str, bytes],
        plain: masks.Numbers,
        least_sites: int,
    ) -> masks.Numbers:
        """The numbers of an update under the masks of a session.

        Args:
            recipe: its hash.
            number: of the round.
            base: fingerprint of the adapter that training started from.
            session_id: which session.
            inbox: what the other members dealt.
            plain: of :meth:`fedvfm.secure_aggregation.fixed_point.FixedPoint.encode`.
            least_sites: fewest sites that a sum is opened of.

        Raises:
            SecureAggregationError: if the session is not one that this site takes part in, or masked other numbers.
        """
        kept = self._require(recipe, number, session_id)
        session, secrets, dealt = self._parts(recipe, kept)
        if session.base != base:
            raise errors.SecureAggregationError("secure-session", "the session was agreed for another adapter")
        held = participant.received(session, self._site, secrets, dealt, inbox)
        after = participant.masked(session, self._site, secrets, dealt, held, plain, least_sites)
        digest = hashlib.sha256(after.tobytes()).hexdigest()
        if kept.masked not in ("", digest):
            raise errors.SecureAggregationError(
                "secure-session", "other numbers were masked in this session before; two would give their difference"
            )
        if not kept.masked:
            letters = {peer: _text(data) for peer, data in inbox.items()}
            self._write(session, kept.model_copy(update={"inbox": letters, "masked": digest}))
            storage.fault_point("secure-masked-on-disk")
        return after

    def open(
        self, recipe: str, number: int, session_id: str, survivors: Collection[str], least_sites: int
    ) -> secure_messages.Opening:
        """The shares that open the sum of these survivors; asked again for the same ones, the same.

        Raises:
            SecureAggregationError: if another sum of this round was opened, this site sent nothing in the session, or
                the list is none that anything is opened for.
        """
        path, asked = self._opened_path(recipe, number), sorted(survivors)
        before = _read(path, _Opened)
        if path.exists():
            if before is None or (before.session, list(before.survivors)) != (session_id, asked):
                raise _opened(number)
            shares = ({peer: _data(text) for peer, text in part.items()} for part in (before.seeds, before.masks))
            return secure_messages.Opening(self._site, session_id, participant.Revealed(*shares))
        kept = self._require(recipe, number, session_id)
        if not kept.masked:
            raise errors.SecureAggregationError("secure-survivors", "this site sent no masked update in the session")
        session, secrets, dealt = self._parts(recipe, kept)
        inbox = {peer: _data(text) for peer, text in kept.inbox.items()}
        held = participant.received(session, self._site, secrets, dealt, inbox)
        shares_out = participant.revealed(session, self._site, held, asked, least_sites)
        seeds, keys = ({peer: _text(data) for peer, data in part.items()} for part in _both(shares_out))
        written = _Opened(session=session_id, survivors=asked, seeds=seeds, masks=keys)
        storage.write_text(path, written.model_dump_json())
        storage.fault_point("secure-opening-on-disk")
        return secure_messages.Opening(self._site, session_id, shares_out)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _next(self, recipe: str) -> _Keys:
        """The unspent keys, made anew where those that lie here took part in a session."""
        path = self._folder / f"{recipe}.keys"
        kept, spent = _read(path, _Keys), {each.channel for each in self._sessions(recipe)}
        if kept is not None and kept.channel not in spent:
            return kept
        fresh = round_keys.fresh()
        signature = round_keys.advertise(fresh, self._site, recipe, self._sign).signature
        pair = _Keys(channel=_text(fresh.channel), mask=_text(fresh.mask), signature=signature)
        storage.make_private(self._folder)
        storage.write_text(path, pair.model_dump_json())
        return pair

    def _public(self, keys: _Keys) -> round_keys.Advertised:
        channel, mask = (round_keys.public(_data(half)) for half in (keys.channel, keys.mask))
        return round_keys.Advertised(self._site, channel, mask, keys.signature)

    def _begin(self, session: sessions.Session, keys: _Keys) -> _Kept:
        secrets = round_keys.Secrets(_data(keys.channel), _data(keys.mask))
        dealt = participant.deal(session, self._site, secrets)
        kept = _Kept(
            session=secure_messages.session_text(session),
            channel=keys.channel,
            mask=keys.mask,
            seed=_text(dealt.seed),
            own_seed=_text(dealt.own.seed),
            own_mask=_text(dealt.own.mask),
            outbox={peer: _text(data) for peer, data in dealt.outbox.items()},
            commitment=dealt.commitment,
        )
        path = self._write(session, kept)
        storage.fault_point("secure-session-on-disk")
        self._next(session.recipe)  # the spent ones are overwritten before any session is let go
        for old in self._folder.glob(f"{session.recipe}-*.session"):
            if old != path:
                old.unlink(missing_ok=True)
        return kept

    def _parts(self, recipe: str, kept: _Kept) -> tuple[sessions.Session, round_keys.Secrets, participant.Dealt]:
        session = secure_messages.read_session(kept.session, recipe)
        own = participant.Shares(_data(kept.own_seed), _data(kept.own_mask))
        outbox = {peer: _data(text) for peer, text in kept.outbox.items()}
        dealt = participant.Dealt(_data(kept.seed), own, outbox, kept.commitment)
        return session, round_keys.Secrets(_data(kept.channel), _data(kept.mask)), dealt

    def _require(self, recipe: str, number: int, session_id: str) -> _Kept:
        self._require_open(recipe, number, session_id)
        kept = self._find(recipe, number, session_id)
        if kept is None:
            raise errors.SecureAggregationError("secure-session", "this site takes part in no such session")
        return kept

    def _require_open(self, recipe: str, number: int, session_id: str) -> None:
        path = self._opened_path(recipe, number)
        before = _read(path, _Opened)
        if path.exists() and (before is None or before.session != session_id):
            raise _opened(number)

    def _require_closed(self, recipe: str, number: int) -> None:
        if self._opened_path(recipe, number).exists():
            raise _opened(number)

    def _find(self, recipe: str, number: int, session_id: str) -> _Kept | None:
        return _read(self._path(recipe, number, session_id), _Kept)

    def _sessions(self, recipe: str) -> list[_Kept]:
        sessions_kept = (_read(path, _Kept) for path in sorted(self._folder.glob(f"{recipe}-*.session")))
        return [kept for kept in sessions_kept if kept is not None]

    def _write(self, session: sessions.Session, kept: _Kept) -> Path:
        path = self._path(session.recipe, session.round, session.id)
        storage.make_private(self._folder)
        storage.write_text(path, kept.model_dump_json())
        return path

    def _path(self, recipe: str, number: int, session_id: str) -> Path:
        return self._folder / f"{recipe}-{number:06d}-{session_id[:32]}.session"

    def _opened_path(self, recipe: str, number: int) -> Path:
        return self._folder / f"{recipe}-{number:06d}.opened"


def _opened(number: int) -> errors.SecureAggregationError:
    return errors.SecureAggregationError(
        "secure-opened", f"round {number}: a sum was opened before, of another session or of other survivors"
    )


def _both(revealed: participant.Revealed) -> tuple[Mapping[str, bytes], Mapping[str, bytes]]:
    return revealed.seeds, revealed.masks


def _read(path: Path, form: type[Form]) -> Form | None:
    """What a file holds; None where there is none, or it is damaged."""
    try:
        return form.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError):
        return None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(text: str) -> bytes:
    return base64.b64decode(text)
