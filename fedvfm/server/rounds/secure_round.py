"""One round under secure aggregation at the coordinator: two or three messages more than a plain one, no plain update.

    share    a session is proposed with the keys that every site advertised; each answers with sealed shares for the
             others, and with its keys for the next session
    train    each is handed the shares that are for it; it answers with its masked update
    agree    only where a site dealt shares and sent nothing: whoever sent is told who sent, and signs for that list
    unmask   whoever sent is told who sent, and who signed for it; each answers with the shares that open their sum and
             nothing else

What was agreed, what came and who counts as a survivor are on disk before the next step, so that a coordinator that was
killed goes on in the same session and asks for the opening of the same sum. A session that too few are left of is given
up with nothing opened; the round is then asked for in another one, with other keys.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from fedvfm import errors
from fedvfm.protocol import protocol, secure_messages
from fedvfm.secure_aggregation import consistency, fixed_point, masks, opening, participant, round_keys
from fedvfm.secure_aggregation import session as sessions
from fedvfm.server.rounds import cohort, handshake
from fedvfm.state import groups, state
from fedvfm.storage import storage
from fedvfm.trust import locked_recipe, roster_document

PROPOSALS = 3
"""How often a session is proposed in a round where sites answer with other keys than they were listed with."""
_SUFFIX = ".masked"
_SESSION = "session.json"

Ask = Callable[[Sequence[handshake.Member], str, Callable[[str], protocol.Task]], Iterator[tuple[str, Message]]]
"""Asks these sites for something; gives name and reply as they come."""
Tell = Callable[[str, str], None]
"""Told of a site and the reason of its refusal."""


@dataclass
class Agreed:
    """A session that sites dealt shares in.

    Attributes:
        session: what was agreed.
        outboxes: dealer -> peer -> sealed shares.
        commitments: dealer -> what it said of its seed.
        survivors: whose numbers are in the sum; empty until that is settled.
    """

    session: sessions.Session
    outboxes: dict[str, dict[str, bytes]]
    commitments: dict[str, str]
    survivors: list[str] = field(default_factory=list)

    @property
    def dealers(self) -> list[str]:
        """Sites that dealt shares, sorted."""
        return sorted(self.outboxes)

    @property
    def sum(self) -> consistency.Sum:
        """What the sites sign for and open."""
        return consistency.of(self.session.id, self.dealers, self.survivors)

    def inbox(self, site: str) -> dict[str, bytes]:
        """What the others dealt to a site."""
        return {peer: box[site] for peer, box in sorted(self.outboxes.items()) if peer != site and site in box}


class SecureRounds:
    """The rounds of one federation.

    Args:
        locked: recipe, with secure aggregation, and manifest.
        roster: who may be in a sum; signed, and approved at every site.
        folder: of the federation.
    """

    def __init__(
        self, locked: locked_recipe.LockedRecipe, roster: roster_document.RosterDocument, folder: Path
    ) -> None:
        secure = locked.recipe.secure_aggregation
        if secure is None:
            raise errors.ConfigError("recipe", ["recipe.secure_aggregation: there is none"])
        self._locked, self._recipe, self._secure, self.roster = locked, locked.recipe, secure, roster
        self._point: fixed_point.FixedPoint = fixed_point.of(locked.recipe)
        self._folder = folder / "secure"
        self._received = folder / "received"
        self._keys: dict[str, round_keys.Advertised] = {}

    def learn(self, members: Mapping[str, handshake.Member]) -> None:
        """Take the keys that sites greeted with, where none came since."""
        for name, member in members.items():
            if member.keys is not None:
                self._keys.setdefault(name, member.keys)

    def clear(self) -> None:
        """The round is in the journal: nothing of its session is needed any more."""
        for path in (self._path, *self._received.glob(f"*{_SUFFIX}")):
            path.unlink(missing_ok=True)

    def run(
        self,
        number: int,
        start: state.AdapterState,
        members: Sequence[handshake.Member],
        least: int,
        ask: Ask,
        tell: Tell,
    ) -> tuple[fixed_point.Mean, list[str], dict[str, dict[str, str]]]:
        """The mean of a round, the sites that it is of, and the sites that were refused.

        Args:
            number: of the round.
            start: the global adapter that it begins with.
            members: the sites that are asked.
            least: the quorum.
            ask: asks sites.
            tell: is given refusals.

        Raises:
            QuorumMissed: if too few sites are left; nothing was opened then, or the same sum is asked for again.
            SecureAggregationError: if what was opened is no sum of such sites.
        """
        by_name = {member.name: member for member in members}
        refused: dict[str, dict[str, str]] = {}

        def refuse(site: str, reason: str, detail: str) -> None:
            refused[site] = {"reason": reason, "detail": detail}
            tell(site, reason)

        agreed = self._restore(number, start)
        if agreed is None:
            agreed = self._agree(number, start, by_name, least, ask, refuse)
        if not agreed.survivors:
            self._collect(number, start, agreed, by_name, ask, refuse)
            self._settle(number, agreed, least, by_name)
        total = self._open(number, agreed, by_name, ask, refuse)
        names = groups.leaving(self._locked.manifest, self._recipe, number)
        mean = self._point.decode(total, start, names, len(agreed.survivors))
        left = {name: why for name, why in sorted(refused.items()) if name not in agreed.survivors}
        return mean, agreed.survivors, left

    # -- share -----------------------------------------------------------------------------------------------------

    def _agree(
        self,
        number: int,
        start: state.AdapterState,
        members: Mapping[str, handshake.Member],
        least: int,
        ask: Ask,
        refuse: Callable[[str, str, str], None],
    ) -> Agreed:
        """A session that enough sites dealt shares in; on disk."""
        self.clear()
        self.learn(members)
        for proposal in range(PROPOSALS):
            session = self._proposed(number, start, members)
            agreed, stale = self._dealt(session, members, ask, refuse if proposal == PROPOSALS - 1 else _quiet)
            enough = session is not None and len(agreed.dealers) >= self._least(session, least)
            if enough and not stale:
                break
        if not enough or session is None:
            raise errors.QuorumMissed(
                f"round {number}: {len(agreed.dealers)} of {len(members)} sites dealt shares for secure aggregation, "
                f"{self._least(session, least)} are needed. Mend the sites; the round is asked for again"
            )
        for name in sorted(set(members) - set(agreed.dealers)):
            refuse(name, "no-shares", "dealt no shares for this round's session")
        self._keep(agreed)
        storage.fault_point("secure-session-kept")
        return agreed

    def _proposed(
        self, number: int, start: state.AdapterState, members: Mapping[str, handshake.Member]
    ) -> sessions.Session:
        known = [self._keys[name] for name in sorted(members) if self._sound(name)]
        # Where noise is shared, one sum of a round may be opened among all sites of the roster document.
        sites = len(known) if self._point.noise is None else len(self.roster.keys)
        threshold = max(self._secure.threshold, sessions.least_threshold(sites, self._secure.colluders))
        return sessions.Session(self._recipe.hash, number, start.fingerprint, self.roster.hash, threshold, tuple(known))

    def _sound(self, name: str) -> bool:
        """Whether a site has keys that the others take: with others in it each of them would refuse the session."""
        own = self._keys.get(name)
        if own is None or own.site != name or not all(round_keys.usable(half) for half in (own.channel, own.mask)):
            return False
        return self.roster.verified(name, own.signature, round_keys.signed_bytes(own, self._recipe.hash))

    def _dealt(
        self,
        session: sessions.Session,
        members: Mapping[str, handshake.Member],
        ask: Ask,
        refuse: Callable[[str, str, str], None],
    ) -> tuple[Agreed, bool]:
        """Who dealt shares in a session, and whether somebody has other keys than it lists."""
        agreed, stale = Agreed(session, {}, {}), False
        text = secure_messages.session_text(session)

        for name, message in ask(list(members.values()), protocol.SHARE, self._task(session.round, text)):
            with _refused(name, refuse):
                dealing = _content(message, protocol.decode_dealing)
                if dealing.site != name or dealing.keys.site != name:
                    raise errors.Refused("site-name", f"the node of site '{name}' answered under another name")
                self._keys[name] = dealing.keys
                if dealing.session == session.id and set(dealing.outbox) == set(session.points) - {name}:
                    agreed.outboxes[name] = dict(dealing.outbox)
                    agreed.commitments[name] = dealing.commitment
                else:
                    stale = stale or self._sound(name)
        return agreed, stale

    def _least(self, session: sessions.Session | None, quorum: int) -> int:
        threshold = 0 if session is None else session.threshold
        return max(threshold, self._recipe.min_sites, quorum)

    # -- train -----------------------------------------------------------------------------------------------------

    def _collect(
        self,
        number: int,
        start: state.AdapterState,
        agreed: Agreed,
        members: Mapping[str, handshake.Member],
        ask: Ask,
        refuse: Callable[[str, str, str], None],
    ) -> None:
        """Let every masked update be on disk."""
        missing = [name for name in agreed.dealers if name in members and self._read(agreed, name, number) is None]
        texts = {name: secure_messages.inbox_text(agreed.session.id, agreed.inbox(name)) for name in missing}

        def task(name: str) -> protocol.Task:
            return protocol.Task(self._recipe, number, start, secure=texts[name])

        silent = set(missing)
        for name, message in ask([members[name] for name in missing], protocol.TRAIN, task):
            silent.discard(name)
            with _refused(name, refuse):
                masked = _content(message, protocol.decode_masked)
                self._require_own(masked, name, agreed, number, start)
                self._write(agreed, name, number, masked.numbers)
                storage.fault_point("update-kept")
        for name in sorted(silent):
            refuse(name, "no-answer", "no reply before the round's time was over")

    def _require_own(
        self, masked: secure_messages.Masked, name: str, agreed: Agreed, number: int, start: state.AdapterState
    ) -> None:
        size = self._size(number)
        if masked.site != name:
            raise errors.Refused("site-name", f"the node of site '{name}' answered under another name")
        if (masked.round, masked.base, masked.session) != (number, start.fingerprint, agreed.session.id):
            raise errors.Refused("stale", "answers another round, adapter or session")
        if len(masked.numbers) != size:
            raise errors.Refused("manifest", f"{len(masked.numbers)} masked numbers, {size} are needed")

    def _size(self, number: int) -> int:
        return groups.leaving_numbers(self._locked.manifest, self._recipe, number) + fixed_point.TAIL

    def _settle(self, number: int, agreed: Agreed, least: int, members: Mapping[str, handshake.Member]) -> None:
        """Who is in the sum, once and for good: no other list of this session is ever opened.

        Raises:
            QuorumMissed: if these are too few, or all without labels; the session is given up.
        """
        survivors = [name for name in agreed.dealers if self._read(agreed, name, number) is not None]
        needed = self._least(agreed.session, least)
        if len(survivors) < needed:
            self.clear()
            raise errors.QuorumMissed(
                f"round {number}: {len(survivors)} masked updates came and {needed} are needed; nothing is opened. "
                "Mend the sites; the round is asked for again with other keys"
            )
        try:  # before a site signs or opens: of the round it would do so for no other sum
            cohort.require_labels(survivors, [name for name in members if members[name].without_labels], number)
        except errors.QuorumMissed:
            self.clear()
            raise
        agreed.survivors = survivors
        self._keep(agreed)
        storage.fault_point("secure-survivors-kept")

    # -- unmask ----------------------------------------------------------------------------------------------------

    def _open(
        self,
        number: int,
        agreed: Agreed,
        members: Mapping[str, handshake.Member],
        ask: Ask,
        refuse: Callable[[str, str, str], None],
    ) -> masks.Numbers:
        """The sum of the survivors' numbers.

        Raises:
            QuorumMissed: if too few answered; the same list is asked for again.
        """
        asked = [members[name] for name in agreed.survivors if name in members]
        signatures = {} if agreed.sum.whole else self._signatures(number, agreed, asked, ask, refuse)
        task = self._task(number, secure_messages.sum_text(agreed.sum, signatures))
        answers: dict[str, participant.Revealed] = {}
        for name, message in ask(asked, protocol.UNMASK, task):
            with _refused(name, refuse):
                answer = _content(message, protocol.decode_opening)
                self._require_shares(answer, name, agreed)
                answers[name] = answer.revealed
        if len(answers) < agreed.session.threshold:
            raise errors.QuorumMissed(
                f"round {number}: {len(answers)} sites helped to open the sum and {agreed.session.threshold} are "
                "needed. Mend the sites; the same sum is asked for again, and no other one can be"
            )
        storage.fault_point("secure-shares-came")
        total = np.zeros(self._size(number), dtype=np.uint64)
        for name in agreed.survivors:
            numbers = self._read(agreed, name, number)
            if numbers is None:
                raise errors.CheckpointError(
                    f"{self._received}: the masked update of site '{name}' is damaged, and its sum was settled. "
                    "Restore the folder from a backup"
                )
            total += numbers
        return opening.opened(agreed.session, agreed.dealers, agreed.survivors, total, answers, agreed.commitments)

    def _signatures(
        self,
        number: int,
        agreed: Agreed,
        asked: Sequence[handshake.Member],
        ask: Ask,
        refuse: Callable[[str, str, str], None],
    ) -> dict[str, str]:
        """Survivor -> its signature for the sum. Nothing is kept: asked again, a site gives the same one.

        Raises:
            QuorumMissed: if too few signed; they are asked again for the same sum.
        """
        signatures: dict[str, str] = {}
        for name, message in ask(asked, protocol.AGREE, self._task(number, secure_messages.sum_text(agreed.sum))):
            with _refused(name, refuse):
                agreement = _content(message, protocol.decode_agreement)
                self._require_signed(agreement, name, agreed)
                signatures[name] = agreement.signature
        if len(signatures) < agreed.session.threshold:
            raise errors.QuorumMissed(
                f"round {number}: {len(signatures)} sites signed for the sum and {agreed.session.threshold} are "
                "needed. Mend the sites; the same sum is asked for again, and no other one can be"
            )
        storage.fault_point("secure-signatures-came")
        return signatures

    def _task(self, number: int, text: str) -> Callable[[str], protocol.Task]:
        """The same question for every site."""
        return lambda name: protocol.Task(self._recipe, number, secure=text)

    def _require_signed(self, agreement: secure_messages.Agreement, name: str, agreed: Agreed) -> None:
        if agreement.site != name or agreement.session != agreed.session.id:
            raise errors.Refused("stale", "answers for another site or session")
        same = self.roster.hash == agreed.session.roster  # else the sites, who hold that document, check alone
        if same and not self.roster.verified(name, agreement.signature, agreed.sum.signed_bytes()):
            raise errors.Refused("signature", "is not made with the key of the site on the roster")

    @staticmethod
    def _require_shares(answer: secure_messages.Opening, name: str, agreed: Agreed) -> None:
        if answer.site != name or answer.session != agreed.session.id:
            raise errors.Refused("stale", "answers for another site or session")
        gone = set(agreed.dealers) - set(agreed.survivors)
        if set(answer.revealed.seeds) != set(agreed.survivors) or set(answer.revealed.masks) != gone:
            raise errors.Refused("shares", "not one share of every site that dealt")

    # -- files -----------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self._folder / _SESSION

    def _keep(self, agreed: Agreed) -> None:
        storage.make_private(self._folder)
        body = {
            "session": secure_messages.session_text(agreed.session),
            "outboxes": {name: {to: _text(data) for to, data in box.items()} for name, box in agreed.outboxes.items()},
            "commitments": agreed.commitments,
            "survivors": agreed.survivors,
        }
        storage.write_text(self._path, json.dumps(body))

    def _restore(self, number: int, start: state.AdapterState) -> Agreed | None:
        """The session of this round that was agreed before the process ended; None where there is none."""
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
            session = secure_messages.read_session(body["session"], self._recipe.hash)
            boxes = body["outboxes"].items()
            outboxes = {name: {to: base64.b64decode(data) for to, data in box.items()} for name, box in boxes}
            agreed = Agreed(session, outboxes, dict(body["commitments"]), list(body["survivors"]))
        except (OSError, KeyError, ValueError, TypeError, AttributeError):
            return None
        # Whose sum is settled is opened under no other document: who revealed shares of it reveals none of another one.
        same = bool(agreed.survivors) or session.roster == self.roster.hash
        return agreed if same and (session.round, session.base) == (number, start.fingerprint) else None

    def _file(self, agreed: Agreed, name: str, number: int) -> Path:
        return self._received / f"{number:05d}-{agreed.session.id[:16]}-{_ending(name)}"

    def _write(self, agreed: Agreed, name: str, number: int, numbers: masks.Numbers) -> None:
        data = np.ascontiguousarray(numbers, dtype="<u8").tobytes()
        storage.make_private(self._received)
        storage.write_bytes(self._file(agreed, name, number), _sum(data) + data)

    def _read(self, agreed: Agreed, name: str, number: int) -> masks.Numbers | None:
        """What a site sent in this session; None where nothing did, or it is damaged."""
        with contextlib.suppress(OSError):
            data = self._file(agreed, name, number).read_bytes()
            if data[:32] == _sum(data[32:]) and len(data) == 32 + 8 * self._size(number):
                return np.frombuffer(data, dtype="<u8", offset=32)
        return None


def settled_with(folder: Path, site: str) -> int:
    """The round whose sum is settled with a site, in a federation's folder; 0 where none is.

    Such a sum is opened with all of its sites or not at all.
    """
    with contextlib.suppress(OSError, KeyError, ValueError, TypeError):
        body = json.loads((folder / "secure" / _SESSION).read_text(encoding="utf-8"))
        if site in body["survivors"]:
            return secure_messages.read_session(body["session"], "").round
    return 0


def remove(folder: Path, site: str) -> None:
    """Remove what a site sent in the round in hand, while no process runs the federation; it is as if it had not.

    What it sent for a sum that is settled with it stays.
    """
    if not settled_with(folder, site):
        for path in (folder / "received").glob(f"*-{_ending(site)}"):
            path.unlink(missing_ok=True)


def _ending(site: str) -> str:
    """How the name of the file ends that holds what a site sent, whatever stands in its own name."""
    return site.encode().hex()[:180] + _SUFFIX


def _quiet(site: str, reason: str, detail: str) -> None:
    """A site whose answer will be asked for once more."""


@contextlib.contextmanager
def _refused(name: str, refuse: Callable[[str, str, str], None]) -> Iterator[None]:
    """What is wrong with the answer of a site is told of it, and the others go on."""
    try:
        yield
    except errors.Refused as refusal:
        refuse(name, refusal.reason, refusal.detail)


def _content(message: Message, decode: Callable[[Any], Any]) -> Any:
    """What a reply says.

    Raises:
        Refused: if the site refused, or it cannot be understood.
    """
    if message.has_error():
        raise errors.Refused("site-" + protocol.error_word(message), "the site answered with an error")
    try:
        return decode(message.content)
    except errors.ProtocolError as error:
        raise errors.Refused("protocol", str(error)) from None


def _sum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
