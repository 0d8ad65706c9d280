"""The ledger of a site: what its records have spent, on disk before an update leaves, and refused beyond the budget.

    FOLDER/ledger.jsonl  hash-chained lines: what was reserved, charged, lost and found again
    FOLDER/ledger.key    see :mod:`fedvfm.privacy.records`
    FOLDER/sets/         the records of each release, as hashes
    FOLDER/holding/      one locked file for each round that is being trained

The order that never under-counts: :meth:`Ledger.hold` before training, the update on disk, :meth:`Hold.charge`, then
send. Every later sending of that update calls :meth:`Ledger.charge` again, which charges the same bytes once. What is
reserved counts while its process lives. No decision asks the clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.config import privacy
from fedvfm.ledger import entries as lines
from fedvfm.ledger import spending
from fedvfm.privacy import accountant, records
from fedvfm.privacy import base as mechanisms
from fedvfm.storage import hash_chain, storage


@dataclass(frozen=True)
class Claim:
    """One release that a site wants to make.

    Attributes:
        recipe: hash of the recipe.
        round: its round.
        base: fingerprint of the adapter it starts from.
        event: what it spends.
        names: of all units that could be drawn, and what else it is charged to; see
            :func:`fedvfm.privacy.records.charged`.
        rounds: that the recipe still wants, this one included; for the remedy alone.
    """

    recipe: str
    round: int
    base: str
    event: mechanisms.PrivacyEvent
    names: Collection[str]
    rounds: int = 1


@dataclass(frozen=True)
class Hold:
    """A round that is reserved while it trains."""

    ledger: Ledger
    claim: Claim
    budget: privacy.Budget
    token: str

    def charge(self, update: str) -> dict[str, Any]:
        """:meth:`Ledger.charge` in place of the reservation."""
        return self.ledger.charge(self.claim, self.budget, update, token=self.token)


class Ledger(audit.Audit):
    """The ledger in a folder, made if there is none.

    Args:
        folder: private.
        owner: the site's name; one that was opened under another name stays under that.
        unit: whose presence it counts. A ledger keeps its unit.

    Raises:
        LedgerError: if it lost its file or key, or counts another unit.
        AuditError: if it was edited.
    """

    events = lines.EVENTS
    most = 0
    forms: ClassVar[Mapping[str, Callable[[Any], bool]]] = lines.FORMS

    def __init__(self, folder: Path, owner: str, unit: str) -> None:
        self.folder, self.records = folder, records.Records(folder)
        path = folder / lines.FILE
        with storage.guard(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with storage.exclusive(path):
            before = _first(path)
            if before is None:
                self._begin(path)
        key = self.records.key_id()
        super().__init__(path, (before or {}).get("owner", owner), lines.END, unit=unit, key=key)
        first = self.entries[0]
        if first["unit"] != unit:
            raise errors.LedgerError(
                f"{path}: counts by {first['unit']}, asked was {unit}. A ledger keeps its unit: write unit = "
                f'"{first["unit"]}" into [privacy]'
            )

    def _begin(self, path: Path) -> None:
        sets = self.folder / "sets"
        if sets.is_dir() and any(sets.iterdir()):
            raise errors.LedgerError(
                f"{path}: is gone, but records of earlier releases are here. Restore it from a backup, or run "
                "'fedvfm ledger reconcile'"
            )
        if not self.records.key_path.exists():
            self.records.make_key()
        storage.fault_point("ledger-key-made")

    def check(self, claim: Claim, budget: privacy.Budget) -> accountant.Epsilon:
        """What the data set would have spent with this release: call it before training.

        Raises:
            BudgetExceeded: if that is more than the budget.
            LedgerError: if the ledger waits to be reconciled, or counts otherwise.
        """
        with storage.exclusive(self.path):
            return self._require(self._open().entries, claim, budget)

    @contextlib.contextmanager
    def hold(self, claim: Claim, budget: privacy.Budget) -> Iterator[Hold]:
        """:meth:`check`, and nobody else can spend the same while the block runs.

        Leaving it without :meth:`Hold.charge` gives the reservation back, and so does the end of the process.
        """
        token = secrets.token_hex(16)
        place = self.folder / "holding" / token
        with storage.guard(place):
            place.parent.mkdir(mode=0o700, exist_ok=True)
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            storage.fault_point("ledger-held")
            self._reserve(claim, budget, token)
            yield Hold(self, claim, budget, token)
        finally:
            self._let_go(token)
            place.unlink(missing_ok=True)
            os.close(handle)

    def _reserve(self, claim: Claim, budget: privacy.Budget, token: str) -> None:
        with storage.exclusive(self.path):
            written = self._open()
            self._require(written.entries, claim, budget)
            fields = self._fields(claim, budget)
            storage.fault_point("ledger-set-kept")
            self._append(written, "reserved", {"token": token, **fields})
        storage.fault_point("ledger-reserved")

    def _let_go(self, token: str) -> None:
        """A reservation that cannot be given back is given back by the end of its lock."""
        with contextlib.suppress(errors.FedvfmError), storage.exclusive(self.path):
            written = self._open()
            mine = [one["event"] for one in written.entries if one.get("token") == token]
            if mine == ["reserved"]:
                self._append(written, "released", {"token": token})

    def charge(self, claim: Claim, budget: privacy.Budget, update: str, *, token: str = "") -> dict[str, Any]:
        """Charge a release and wait until it is on disk: call it before every sending of the update.

        The same update of the same recipe, round and base is charged once. Another one is another release, because its
        noise was drawn anew; and so are the same bytes of another reservation, which two federations have where noise
        is added at their coordinators.

        Args:
            claim: what is released.
            budget: the site's, as it is now.
            update: sha256 of the bytes that leave.
            token: of the reservation that this takes the place of.

        Raises:
            BudgetExceeded, LedgerError: then the update must not leave.
            StorageError: if the disk refuses; then neither.
        """
        with storage.exclusive(self.path):
            written = self._open()
            done = _charged(written.entries, claim, update, token)
            if done is not None:
                return done
            self._require(written.entries, claim, budget, token)
            fields = self._fields(claim, budget)
            storage.fault_point("ledger-checked")
            extra = {"token": token} if token else {}
            line = self._append(written, "charged", {"update": update, **fields, **extra})
        storage.fault_point("ledger-charged")
        return line

    def known(self, claim: Claim, budget: privacy.Budget, update: str, token: str) -> bool:
        """Whether an update that was kept may be charged by this claim.

        It may if it was charged before, or if its own reservation was of the same records, noise and steps: a site that
        was killed in between may come back with other files, and then the claim is not what was released. Other
        reservations of the same round, of another federation or before it, say nothing of it.

        Args:
            claim: as the data are now.
            budget: the site's, as it is now.
            update: sha256 of the bytes that would leave.
            token: of the reservation that it was trained under; "" where that is not known any more, and then it may
                only if it was charged before.
        """
        with storage.exclusive(self.path):
            entries = self._open().entries
            if _charged(entries, claim, update, token) is not None:
                return True
            fields = self._fields(claim, budget)
        same = (*lines.RELEASE, *({"honest"} & set(fields)))
        wanted = {"event": "reserved", "token": token, **{name: fields[name] for name in same}}
        return any(wanted.items() <= one.items() for one in entries)

    def _fields(self, claim: Claim, budget: privacy.Budget) -> dict[str, Any]:
        """A line of this release; its set of records is on disk before the line is."""
        event = claim.event
        return {
            "recipe": claim.recipe,
            "round": claim.round,
            "base": claim.base,
            "mechanism": event.mechanism,
            "noise_multiplier": event.noise_multiplier,
            "sample_rate": event.sample_rate,
            "steps": event.steps,
            "clip": event.clip,
            **({"honest": event.honest} if event.shared else {}),
            "data_set": budget.data_set,
            "records": self.records.keep(self.records.hashes(claim.names)),
            "key": self.records.key_id(),
            "budget_epsilon": budget.epsilon,
            "budget_delta": budget.delta,
        }

    def _require(
        self, entries: list[dict[str, Any]], claim: Claim, budget: privacy.Budget, token: str = ""
    ) -> accountant.Epsilon:
        if claim.event.unit != entries[0]["unit"] or not claim.names:
            raise errors.LedgerError(
                f"{self.path}: counts by {entries[0]['unit']}, the recipe's mechanism '{claim.event.mechanism}' by "
                f"{claim.event.unit}, {len(claim.names)} of them; epsilons of different units do not add up"
            )
        require_sound(self.path, entries, self.records.key_id())
        now = self.spending([one for one in entries if (one["event"], one.get("token")) != ("reserved", token)])
        before = now.worst(self.records.find, self.records.hashes(claim.names))
        new = accountant.curve([claim.event])
        curves = [accountant.joined([one, new]) for one in before]
        after = spending.epsilon(now, curves, budget.delta, budget.accountant)
        if after.value > budget.epsilon:
            raise errors.BudgetExceeded(_refusal(self.owner, claim, budget, after, (now, before)))
        return after

    def spending(self, entries: Iterable[spending.Entry]) -> spending.Spending:
        """What these lines come to now."""
        return spending.read(entries, self._alive, self.records.key_id())

    def _alive(self, token: str) -> bool:
        """Whether the process that reserved still holds its file; a file that is gone is held by nobody."""
        try:
            handle = os.open(self.folder / "holding" / token, os.O_WRONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False

    def suspend(self, note: audit.Noted) -> None:
        """Write down that another end noted what this ledger does not hold; nothing is charged until reconciled."""
        with storage.exclusive(self.path):
            written = self._open()
            if (note.length, note.head) not in [(one.length, one.head) for one in lines.waiting(written.entries)]:
                self._append(written, "suspended", {"length": note.length, "head": note.head})


def reopen(folder: Path) -> Ledger:
    """The ledger that is in a folder.

    Raises:
        AuditError: if there is none, or it was edited.
        LedgerError: if its key is lost.
    """
    path = folder / lines.FILE
    if not path.is_file():
        raise errors.AuditError(f"{path}: there is no ledger")
    first = audit.read(path)[0]
    return Ledger(folder, str(first.get("owner")), str(first.get("unit")))


def require_sound(path: Path, entries: list[dict[str, Any]], key: str) -> None:
    """Check that nothing waits to be reconciled and the key is the ledger's.

    Raises:
        LedgerError: if not.
    """
    open_notes = lines.waiting(entries)
    if open_notes:
        raise errors.LedgerError(
            f"{path}: had {open_notes[-1].length} entries by a receipt, and does not hold them any more; it has "
            f"{len(entries)}. Nothing is charged until 'fedvfm ledger reconcile --against RECEIPT' says what was spent"
        )
    if lines.current_key(entries) != key:
        raise errors.LedgerError(
            f"{path}: the key beside it is another one than it was opened with, so its records cannot be told apart. "
            "Restore ledger.key, or run 'fedvfm ledger reconcile': then all that was spent counts for all records"
        )


def _first(path: Path) -> dict[str, Any] | None:
    """The first line; None where there is none."""
    try:
        return next(iter(hash_chain.read(path)), None)
    except errors.CheckpointError:
        return {}  # opening it says what is wrong


def _charged(entries: Iterable[dict[str, Any]], claim: Claim, update: str, token: str) -> dict[str, Any] | None:
    """The line that an update was charged by, in place of its own reservation.

    Of one that an earlier release kept the reservation is not known: bytes with noise in them are nobody else's.
    """
    wanted = {"event": "charged", "recipe": claim.recipe, "round": claim.round, "base": claim.base, "update": update}
    unique = not token and claim.event.mechanism not in (privacy.SITE_LEVEL, *privacy.SHARED)
    fits = (one for one in entries if wanted.items() <= one.items() and (unique or one.get("token", "") == token))
    return next(fits, None)


def shown(value: float) -> str:
    """Epsilon rounded up to hundredths, so that what is over a budget looks so."""
    return f"{math.ceil(value * 100 - 1e-9) / 100:.2f}" if math.isfinite(value) else "infinity"


def _refusal(
    owner: str,
    claim: Claim,
    budget: privacy.Budget,
    after: accountant.Epsilon,
    spent: tuple[spending.Spending, list[accountant.Curve]],
) -> str:
    text = (
        f"round {claim.round} would bring site '{owner}' to epsilon {shown(after.value)} ({claim.event.unit} level, "
        f"delta {budget.delta:g}); its ledger allows {budget.epsilon:.2f}. "
    )
    now, curves = spent
    epsilon, delta = budget.epsilon - now.floor[0], budget.delta - now.floor[1]
    steps, found = claim.event.steps * claim.rounds, None
    if epsilon > 0 and delta > 0:
        rate, shared = claim.event.sample_rate, claim.event.shared
        each = [accountant.noise(epsilon, delta, rate, steps, before=curve, shared=shared) for curve in curves]
        found = None if None in each else max((one for one in each if one is not None), default=None)
    stop = f"stop at round {claim.round - 1}" if claim.round > 1 else "do not begin"
    return text + (
        f"Raise noise-multiplier to {found:g} or {stop}." if found else f"No noise fits what is left: {stop}."
    )
