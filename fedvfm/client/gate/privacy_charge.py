"""What a recipe spends of this site's privacy: reserved before a round is trained, charged before its update leaves.

The ledger itself is in :mod:`fedvfm.ledger.ledger`; here is what of a message, the site's data and its file goes into
it. A ledger that does not hold what this site's own audit log noted of it was cut or restored: nothing is charged then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.config import privacy, schema
from fedvfm.ledger import entries as lines
from fedvfm.ledger import ledger, receipts
from fedvfm.privacy import base, events, records
from fedvfm.storage import hash_chain

if TYPE_CHECKING:
    from fedvfm.protocol import protocol


def private(recipe: schema.Recipe) -> bool:
    """Whether the recipe has a mechanism."""
    return recipe.privacy.mechanism != privacy.NO_MECHANISM


def names(recipe: schema.Recipe, hospital: Any) -> list[str]:
    """The units of this site that a mechanism protects: records, patients, or the site itself."""
    unit = privacy.UNITS[recipe.privacy.mechanism]
    return records.ids(unit, hospital.train, getattr(hospital, "source", None))


def charged(recipe: schema.Recipe, hospital: Any) -> list[str]:
    """All names that a round at this site is charged to; see :func:`fedvfm.privacy.records.charged`."""
    unit = privacy.UNITS[recipe.privacy.mechanism]
    return records.charged(unit, hospital.train, getattr(hospital, "source", None))


def counted(recipe: schema.Recipe, hospital: Any, budget: privacy.Budget | None) -> int:
    """How many units rate, steps and noise are made from here; 0 where there is nothing to train on."""
    return events.counted(len(names(recipe, hospital)), privacy.UNITS[recipe.privacy.mechanism], budget)


def require(recipe: schema.Recipe, budget: privacy.Budget | None) -> privacy.Budget | None:
    """The budget that a recipe's rounds are charged to; None where there is neither a mechanism nor a budget.

    Raises:
        PolicyRefused: if the site has none, or it counts otherwise than the recipe: "privacy-budget". So too where the
            site has one and the recipe no mechanism: after a plain update no epsilon of these images is true.
    """
    if not private(recipe):
        if budget is not None:
            raise _refused(
                f"the recipe has no privacy mechanism, and [privacy] of this site gives data set '{budget.data_set}' a "
                "budget: a plain update is more than any. Ask for a mechanism, or take [privacy] out and count nothing"
            )
        return None
    mechanism, delta = recipe.privacy.mechanism, recipe.privacy.delta or 0.0
    unit = privacy.UNITS[mechanism]
    if budget is None:
        raise _refused(
            f"recipe.privacy.mechanism = '{mechanism}', and this site's file has no [privacy]. Write data_set, "
            f'epsilon, delta and unit = "{unit}" there: what its data may spend over all runs'
        )
    if budget.unit != unit:
        raise _refused(
            f"recipe.privacy.mechanism = '{mechanism}' counts by {unit}, [privacy] of this site by {budget.unit}. "
            "Epsilons of different units do not add up: ask for a recipe that counts as this site does"
        )
    if delta > budget.delta:
        raise _refused(
            f"recipe.privacy.delta = {delta:g} is above {budget.delta:g}, the delta of this site's [privacy]. Ask for "
            "a recipe with a smaller one"
        )
    return budget


def _refused(detail: str) -> errors.PolicyRefused:
    return errors.PolicyRefused("privacy-budget", detail)


class Reserved(Protocol):
    """A round that is reserved while it trains."""

    @property
    def token(self) -> str:
        """Names the reservation."""
        ...

    def charge(self, update: str) -> Any:
        """Charge it, by the sha256 of the bytes that leave."""
        ...


@dataclass(frozen=True)
class Account:
    """One round of a recipe, and the ledger it is charged to."""

    book: ledger.Ledger
    claim: ledger.Claim
    budget: privacy.Budget

    @property
    def mark(self) -> hash_chain.Mark:
        """Length and head of the ledger as it is now."""
        return self.book.mark

    def hold(self) -> contextlib.AbstractContextManager[Reserved]:
        """Reserve the round while it trains; see :meth:`fedvfm.ledger.ledger.Ledger.hold`."""
        return self.book.hold(self.claim, self.budget)

    def again(self, update: str, token: str) -> bool:
        """Charge an update that was kept; what was charged is not charged twice. Whether it may leave.

        Args:
            update: sha256 of the bytes that leave.
            token: of the reservation that it was trained under.

        Raises:
            BudgetExceeded, LedgerError: then it must not.
        """
        if not self.book.known(self.claim, self.budget, update, token):
            return False
        self.book.charge(self.claim, self.budget, update, token=token)
        return True


def account(
    recipe: schema.Recipe,
    number: int,
    start: str,
    hospital: Any,
    budget: privacy.Budget,
    noted: Sequence[audit.Noted],
) -> Account:
    """The account of one round.

    Args:
        recipe: which.
        number: of the round.
        start: fingerprint of the adapter it starts from.
        hospital: the site's samples.
        budget: as :func:`require` gave it.
        noted: marks of the ledger in the site's own audit log.

    Raises:
        LedgerError: if the ledger is not what it was, or there is nothing to draw from.
    """
    units = counted(recipe, hospital, budget)
    event = events.event_of(recipe, units) if units else None
    if event is None:
        raise errors.LedgerError(f"site '{hospital.name}' has no {budget.unit} to train on; nothing can be charged")
    with _told():
        book = ledger.Ledger(Path(budget.ledger), hospital.name, budget.unit)
        _require_whole(book, noted)
    left = max(1, recipe.rounds - number + 1)
    claim = ledger.Claim(recipe.hash, number, start, event, charged(recipe, hospital), left)
    return Account(book, claim, budget)


def of_scores(
    task: protocol.Task,
    spent: base.PrivacyEvent,
    hospital: Any,
    budget: privacy.Budget,
    noted: Sequence[audit.Noted],
) -> Account:
    """The account of the scores of one adapter on one split.

    Args:
        task: what is scored.
        spent: what the scores spend.
        hospital: the site's samples.
        budget: what they are charged to.
        noted: as of :func:`account`.

    Raises:
        LedgerError: if the ledger is not what it was.
    """
    own = records.charged(budget.unit, hospital.splits[task.split], getattr(hospital, "source", None))
    with _told():
        book = ledger.Ledger(Path(budget.ledger), hospital.name, budget.unit)
        _require_whole(book, noted)
    scored = "" if task.state is None else task.state.fingerprint
    return Account(book, ledger.Claim(task.recipe.hash, task.round, scored, spent, own), budget)


def of_survey(
    survey: str,
    spent: base.PrivacyEvent,
    patients: Sequence[str],
    site: str,
    budget: privacy.Budget,
    noted: Sequence[audit.Noted],
) -> Account:
    """The account of the answer to a survey.

    Args:
        survey: its hash.
        spent: what the answer spends.
        patients: by the names that the ledger knows them by.
        site: the site's name.
        budget: what it is charged to.
        noted: as of :func:`account`.

    Raises:
        LedgerError: if the ledger is not what it was.
    """
    with _told():
        book = ledger.Ledger(Path(budget.ledger), site, budget.unit)
        _require_whole(book, noted)
    return Account(book, ledger.Claim(survey, 0, survey, spent, patients), budget)


def shown(budget: privacy.Budget, site: str, noted: Sequence[audit.Noted]) -> hash_chain.Mark | None:
    """The ledger's mark as it is now, for the coordinator to see before it asks for an update.

    Args:
        budget: the site's.
        site: its name.
        noted: marks of the ledger in the site's own audit log.

    Returns: None where there is no ledger yet, or none that can be charged: reconciled, it may be as long as it was.
    """
    folder = Path(budget.ledger)
    if not (folder / lines.FILE).is_file():
        return None
    with contextlib.suppress(errors.LedgerError, errors.AuditError):
        book = ledger.Ledger(folder, site, budget.unit)
        entries, now = book.entries, book.mark
        ledger.require_sound(book.path, entries, book.records.key_id())
        if not receipts.misfits(entries, noted):
            return now
    return None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """An edited ledger is a refusal of the site too."""
    try:
        yield
    except errors.AuditError as error:
        raise errors.LedgerError(str(error)) from None


def _require_whole(book: ledger.Ledger, noted: Sequence[audit.Noted]) -> None:
    """Check the ledger against what this site's audit log noted of it with every update.

    Raises:
        LedgerError: if it does not hold all of it; written down, so that only reconciling helps.
    """
    wrong = receipts.misfits(book.entries, noted)
    if wrong:
        book.suspend(max(wrong, key=lambda one: one.length))
    ledger.require_sound(book.path, book.entries, book.records.key_id())
