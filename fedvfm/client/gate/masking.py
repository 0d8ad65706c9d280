"""The sessions of one site on disk: keys that are good for one session, one masking in it, one opening in a round.

What leaves was written first, so that a site that is killed and asked again says the same. Three rules stand on these
files, and hold over crashes and whatever a coordinator asks:

- a key pair takes part in one session and no second one;
- a session masks one vector: a second one under the same masks would give away the difference of the two;
- in a round of a recipe this site signs or opens one sum: one session, one list of dealers, one list of survivors. The
  difference of two sums would be the update of whoever is in one of them alone. A mask key leaves only for a sum that
  enough survivors signed (:mod:`fedvfm.secure_aggregation.consistency`).

Where sites share noise, a fourth: the noise of a round is drawn once, before anything leaves, and is a function of its
seed and of the vector it goes on. Asked again, in this session or another one, a site sends the same noise on the same
update; and in a round it masks under one roster document alone, since the sites of one document open one sum of it.

    <recipe>.keys                      the key pairs of the next session
    <recipe>-<round>-<session>.session secrets, shares and what was sent of a session; the secrets go when its sum is
                                       opened, the file when the next one begins or the recipe ends
    <recipe>-<round>.agreed            the one sum that this site signed or opens, and its signature; kept
    <recipe>-<round>.noise             the seed of this site's part of a shared noise, and the roster document it was
                                       drawn under; the seed goes once the sum is opened
    <recipe>-<round>.opened            what left to open the sum of a round; kept, so that no other one ever does
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.protocol import secure_messages
from fedvfm.secure_aggregation import consistency, discrete_gaussian, masks, participant, round_keys, shared_noise
from fedvfm.secure_aggregation import session as sessions
from fedvfm.storage import storage
from fedvfm.trust import keys as signing

_Bytes = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=400)]
_Secret = Annotated[str, Field(pattern=r"^([A-Za-z0-9+/]+={0,2})?$", max_length=400)]
_Pieces = dict[Annotated[str, Field(max_length=200)], _Bytes]
Form = TypeVar("Form", bound=schema.Strict)
Noised = Callable[[masks.Numbers, bytes], masks.Numbers]
"""Whole numbers and the key of their noise -> the numbers with this site's part on them."""


class _Keys(schema.Strict):
    """Secrets of the next session, and the signature on their public halves."""

    channel: _Bytes
    mask: _Bytes
    signature: str


class _Kept(schema.Strict):
    """A session as it is kept. ``masked`` is the sha256 of the masked numbers that were sent, or empty.

    The secrets are empty once the sum was opened: what it takes to open it again lies in another file.
    ``signing`` is the site's key of that time: a sum is signed with the one its roster document names, though the site
    has taken another since. Empty in a session of before it was kept.
    """

    session: str
    channel: _Secret
    mask: _Secret
    seed: _Secret
    own_seed: _Secret
    own_mask: _Secret
    outbox: _Pieces
    commitment: str
    inbox: _Pieces = Field(default={})
    masked: str = ""
    signing: _Secret = ""


class _Seed(schema.Strict):
    """Of the noise of a round. The seed is empty once a later round began: that round is over here."""

    seed: _Secret
    roster: schema.Sha256


class _Agreed(schema.Strict):
    """The one sum of a round. ``signature`` is empty where nobody asked for it: nobody dropped out."""

    session: schema.Sha256
    dealers: list[str]
    survivors: list[str]
    signature: str = ""

    @property
    def sum(self) -> consistency.Sum:
        return consistency.of(self.session, self.dealers, self.survivors)


class _Opened(_Agreed):
    """What left to open it."""

    seeds: _Pieces
    masks: _Pieces


class Sessions:
    """What a site does in the sessions of its recipes.

    Args:
        folder: private; made when needed.
        site: the site's name.
        key: reads the site's own key, which the roster document names: a site may take another one.
    """

    def __init__(self, folder: Path, site: str, key: Callable[[], signing.Private]) -> None:
        self._folder, self._site, self._key = folder, site, key

    def _sign(self, message: bytes) -> str:
        return signing.sign(self._key(), message)

    def advertised(self, recipe: str) -> round_keys.Advertised:
        """The public keys of the next session; made now if there are none that are unspent."""
        with self._alone():
            return self._advertised(recipe)

    def lists(self, session: sessions.Session) -> bool:
        """Whether a session lists the next keys of this site, or is one that it takes part in already."""
        if self._find(session.recipe, session.round, session.id) is not None:
            return True
        with self._alone():
            return self._lists(session)

    def apart(self, recipe: str) -> secure_messages.Dealing:
        """The answer to a session that lists other keys of this site: its next ones, and no shares."""
        return secure_messages.Dealing(self._site, "", {}, "", self.advertised(recipe))

    def deal(self, session: sessions.Session) -> secure_messages.Dealing:
        """Take part in a session and share its secrets; asked again for the same one, the same.

        Raises:
            SecureAggregationError: ``secure-opened`` if a sum of this round was signed or opened before,
                ``secure-session`` if the session lists other keys.
        """
        with self._alone():
            kept = self._find(session.recipe, session.round, session.id)
            if kept is None:
                if self._settled(session.recipe, session.round) is not None:
                    raise _opened(session.round)
                if not self._lists(session):
                    raise errors.SecureAggregationError("secure-session", "the session lists other keys of this site")
                kept = self._begin(session, self._next(session.recipe))
            outbox = {peer: _data(text) for peer, text in kept.outbox.items()}
            keys = self._advertised(session.recipe)
        return secure_messages.Dealing(self._site, session.id, outbox, kept.commitment, keys)

    def mask(
        self,
        recipe: str,
        number: int,
        base: str,
        session_id: str,
        inbox: Mapping[str, bytes],
        plain: masks.Numbers,
        least_sites: int,
        noised: Noised | None = None,
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
            noised: puts this site's part of a shared noise on the numbers; None where nothing is shared.

        Raises:
            SecureAggregationError: if the session is not one that this site takes part in, masked other numbers, or is
                of another roster document than this round's noise.
        """
        with self._alone():
            kept = self._require(recipe, number, session_id)
            session, secrets, dealt = self._parts(recipe, kept)
            if session.base != base:
                raise errors.SecureAggregationError("secure-session", "the session was agreed for another adapter")
            held = participant.received(session, self._site, secrets, dealt, inbox)
            if noised is not None:
                plain = noised(plain, self._noise_key(session, plain))
            after = participant.masked(session, self._site, secrets, dealt, held, plain, least_sites)
            digest = hashlib.sha256(after.tobytes()).hexdigest()
            if kept.masked not in ("", digest):
                raise errors.SecureAggregationError(
                    "secure-session",
                    "other numbers were masked in this session before; two would give their difference",
                )
            if not kept.masked:
                letters = {peer: _text(data) for peer, data in inbox.items()}
                self._write(session, kept.model_copy(update={"inbox": letters, "masked": digest}))
                storage.fault_point("secure-masked-on-disk")
            return after

    def agree(self, recipe: str, number: int, asked: consistency.Sum, least_sites: int) -> secure_messages.Agreement:
        """A signature for the one sum of this round; asked again for the same one, the same.

        Args:
            recipe: its hash.
            number: of the round.
            asked: the sum.
            least_sites: fewest sites that a sum is opened of.

        Raises:
            SecureAggregationError: if this site signed or opened another one, masked for other dealers, or the list is
                none that anything is opened for.
        """
        with self._alone():
            if self._settled(recipe, number) != asked:
                self._held(recipe, number, asked, least_sites)
            path = self._agreed_path(recipe, number)
            before = _read(path, _Agreed)
            if before is None or not before.signature:
                before = self._settle(path, asked, self._signature(recipe, number, asked))
        storage.fault_point("secure-agreement-on-disk")
        return secure_messages.Agreement(self._site, asked.session, before.signature)

    def open(
        self,
        recipe: str,
        number: int,
        asked: consistency.Sum,
        signatures: Mapping[str, str],
        least_sites: int,
        verified: Callable[[sessions.Session], consistency.Verified],
    ) -> secure_messages.Opening:
        """The shares that open this sum; asked again for the same one, the same.

        Args:
            recipe: its hash.
            number: of the round.
            asked: the sum.
            signatures: of the survivors for it; none are needed where nobody dropped out, since no mask key leaves.
            least_sites: fewest sites that a sum is opened of.
            verified: whose signatures count in a session.

        Raises:
            SecureAggregationError: if this site signed or opened another sum of this round, sent nothing in the
                session, or the sum is none that anything is opened for; ``secure-agreement`` if too few signed for it.
        """
        with self._alone():
            path = self._opened_path(recipe, number)
            before = _read(path, _Opened)
            if path.exists():
                if before is None or before.sum != asked:
                    raise _opened(number)
                self._wipe(recipe, number, asked.session)
                shares = ({peer: _data(text) for peer, text in part.items()} for part in (before.seeds, before.masks))
                return secure_messages.Opening(self._site, asked.session, participant.Revealed(*shares))
            session, held = self._held(recipe, number, asked, least_sites)
            if not asked.whole:
                consistency.require(session, asked, signatures, verified(session))
            if not self._agreed_path(recipe, number).exists():
                self._settle(self._agreed_path(recipe, number), asked)
            shares_out = participant.revealed(session, self._site, held, asked.survivors, least_sites)
            seeds, keys = ({peer: _text(data) for peer, data in part.items()} for part in _both(shares_out))
            written = _Opened(**_lists(asked), seeds=seeds, masks=keys)
            storage.write_text(path, written.model_dump_json())
            storage.fault_point("secure-opening-on-disk")
            self._wipe(recipe, number, asked.session)
            return secure_messages.Opening(self._site, asked.session, shares_out)

    def _held(
        self, recipe: str, number: int, asked: consistency.Sum, least_sites: int
    ) -> tuple[sessions.Session, dict[str, participant.Shares]]:
        """The session of a sum and the shares that this site holds in it, if it may sign and open for the sum.

        Raises:
            SecureAggregationError: if not.
        """
        kept = self._require(recipe, number, asked.session)
        if not kept.masked:
            raise errors.SecureAggregationError("secure-survivors", "this site sent no masked update in the session")
        if self._settled(recipe, number) not in (None, asked):
            raise _opened(number)
        session, secrets, dealt = self._parts(recipe, kept)
        inbox = {peer: _data(text) for peer, text in kept.inbox.items()}
        held = participant.received(session, self._site, secrets, dealt, inbox)
        if asked.dealers != tuple(sorted(held)):
            raise errors.SecureAggregationError(
                "secure-survivors", f"this site masked for {len(held)} dealers, and the sum is of others"
            )
        participant.require_list(session, self._site, held, asked.survivors, least_sites)
        return session, held

    def _signature(self, recipe: str, number: int, asked: consistency.Sum) -> str:
        """For a sum of a session, with the key that the session's roster document names."""
        kept = self._find(recipe, number, asked.session)
        text = "" if kept is None else kept.signing
        return signing.sign(signing.from_data(_data(text)) if text else self._key(), asked.signed_bytes())

    def _noise_key(self, session: sessions.Session, plain: masks.Numbers) -> bytes:
        return shared_noise.key(self._seed(session), plain.tobytes())

    def _seed(self, session: sessions.Session) -> bytes:
        """The seed of this round's noise: drawn now, and on disk, if it was not before.

        Raises:
            SecureAggregationError: ``secure-session`` if it was drawn under another roster document, or is gone.
        """
        path = self._noise_path(session.recipe, session.round)
        kept = _read(path, _Seed)
        if kept is None and not path.exists():
            kept = _Seed(seed=_text(os.urandom(discrete_gaussian.KEY_SIZE)), roster=session.roster)
            storage.write_text(path, kept.model_dump_json())
            storage.fault_point("secure-noise-on-disk")
        if kept is None or kept.roster != session.roster or not kept.seed:
            raise errors.SecureAggregationError(
                "secure-session",
                f"round {session.round}: noise was drawn for it under another roster document, or a later round began "
                "here since; a second noise of one round would let the two be averaged",
            )
        return _data(kept.seed)

    def _end_noise(self, recipe: str, before: int | None = None) -> None:
        """Forget the seeds of earlier rounds, or of all of them, though not that there were some."""
        first = None if before is None else self._noise_path(recipe, before).stem
        for path in noise_seeds(self._folder, recipe):
            if first is None or path.stem < first:
                end_noise(path)

    def _wipe(self, recipe: str, number: int, session_id: str) -> None:
        """Let go of the secrets of a session whose sum was opened: the state folder opens nothing of it later.

        The seed of its noise goes with them: who has it and the sum could take this site's part out.
        """
        self._end_noise(recipe, number + 1)
        kept = self._find(recipe, number, session_id)
        if kept is not None and kept.seed:
            self._next(recipe)  # while the session still names its keys as spent
            secrets = dict.fromkeys(("channel", "mask", "seed", "own_seed", "own_mask", "signing"), "")
            path = self._path(recipe, number, session_id)
            storage.write_text(path, kept.model_copy(update={**secrets, "inbox": {}}).model_dump_json())

    def forget(self, recipe: str) -> None:
        """The recipe has ended: its keys, its last session and the seeds of its noise go.

        What was signed or opened stays noted for good, and so does under which roster document noise was drawn: that it
        has ended is the coordinator's word.
        """
        with self._alone():
            for path in (*self._folder.glob(f"{recipe}-*.session"), self._folder / f"{recipe}.keys"):
                path.unlink(missing_ok=True)
            self._end_noise(recipe)

    def _settle(self, path: Path, asked: consistency.Sum, signature: str = "") -> _Agreed:
        """Let this be the one sum of the round, on disk."""
        agreed = _Agreed(**_lists(asked), signature=signature)
        storage.write_text(path, agreed.model_dump_json())
        return agreed

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two messages at a time could each find no sum signed yet, and sign one each."""
        storage.make_private(self._folder)
        with storage.exclusive(self._folder / "sessions"):
            yield

    # -- files ---------------------------------------------------------------------------------------------------------

    def _advertised(self, recipe: str) -> round_keys.Advertised:
        return self._public(self._next(recipe))

    def _lists(self, session: sessions.Session) -> bool:
        return self._site in session.points and session.of(self._site) == self._advertised(session.recipe)

    def _next(self, recipe: str) -> _Keys:
        """The unspent keys, made anew where those that lie here took part in a session, or an old key signed them."""
        path = self._folder / f"{recipe}.keys"
        kept, spent = _read(path, _Keys), {each.channel for each in self._sessions(recipe)}
        if kept is not None and kept.channel not in spent and self._vouched(kept, recipe):
            return kept
        fresh = round_keys.fresh()
        signature = round_keys.advertise(fresh, self._site, recipe, self._sign).signature
        pair = _Keys(channel=_text(fresh.channel), mask=_text(fresh.mask), signature=signature)
        storage.make_private(self._folder)
        storage.write_text(path, pair.model_dump_json())
        return pair

    def _vouched(self, keys: _Keys, recipe: str) -> bool:
        message = round_keys.signed_bytes(self._public(keys), recipe)
        return signing.verified(self._key().public_key(), keys.signature, message)

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
            signing=_text(signing.to_data(self._key())),
        )
        path = self._write(session, kept)
        storage.fault_point("secure-session-on-disk")
        self._next(session.recipe)  # the spent ones are overwritten before any session is let go
        for old in self._folder.glob(f"{session.recipe}-*.session"):
            if old != path:
                old.unlink(missing_ok=True)
        self._end_noise(session.recipe, session.round)
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
        if not kept.seed:
            raise _opened(number)
        return kept

    def _require_open(self, recipe: str, number: int, session_id: str) -> None:
        settled = self._settled(recipe, number)
        if settled is not None and settled.session != session_id:
            raise _opened(number)

    def _settled(self, recipe: str, number: int) -> consistency.Sum | None:
        """The one sum of a round; None while this site neither signed nor opened any.

        Raises:
            SecureAggregationError: ``secure-opened`` if there is one, and its file is damaged.
        """
        forms: tuple[tuple[Path, type[_Agreed]], ...] = (
            (self._agreed_path(recipe, number), _Agreed),
            (self._opened_path(recipe, number), _Opened),
        )
        for path, form in forms:
            if path.exists():
                before = _read(path, form)
                if before is None:
                    raise _opened(number)
                return before.sum
        return None

    def _find(self, recipe: str, number: int, session_id: str) -> _Kept | None:
        """By its whole id: the file's name has half of it."""
        kept = _read(self._path(recipe, number, session_id), _Kept)
        same = kept is not None and secure_messages.read_session(kept.session, recipe).id == session_id
        return kept if same else None

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

    def _agreed_path(self, recipe: str, number: int) -> Path:
        return self._folder / f"{recipe}-{number:06d}.agreed"

    def _noise_path(self, recipe: str, number: int) -> Path:
        return self._folder / f"{recipe}-{number:06d}.noise"

    def _opened_path(self, recipe: str, number: int) -> Path:
        return self._folder / f"{recipe}-{number:06d}.opened"


def noise_seeds(folder: Path, recipe: str = "*") -> list[Path]:
    """The files that hold the seed of a noise."""
    paths = sorted(folder.glob(f"{recipe}-*.noise"))
    return [path for path in paths if (kept := _read(path, _Seed)) is not None and kept.seed]


def end_noise(path: Path) -> None:
    """Forget a seed, though not that there was one: no second noise is drawn for its round."""
    kept = _read(path, _Seed)
    if kept is not None:
        storage.write_text(path, kept.model_copy(update={"seed": ""}).model_dump_json())


def _opened(number: int) -> errors.SecureAggregationError:
    return errors.SecureAggregationError(
        "secure-opened", f"round {number}: a sum was signed for or opened before, of another session or of other sites"
    )


def _lists(asked: consistency.Sum) -> dict[str, Any]:
    return {"session": asked.session, "dealers": list(asked.dealers), "survivors": list(asked.survivors)}


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
