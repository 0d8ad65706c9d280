"""The gate of a site: every message passes it on the way in, and every reply on the way out.

Nothing is computed for a message that the gate refuses. What leaves is on disk first, and what it spends of the site's
privacy is in the ledger before it leaves. An exception becomes a typed refusal here, so that no text of it travels.

The order below never under-counts: judge, reserve, train, keep the update, charge it, settle what coding it lost, note
that it leaves, send. Killed at any line, the site has sent nothing that was not charged; asked again, it sends what it
kept and charges it once, and what coding lost counts once, and only if the update may leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message

from fedvfm import errors
from fedvfm.client.gate import enforcement, reply_cache, secure_steps, steps, survey_steps
from fedvfm.client.gate import exchange as exchanges
from fedvfm.protocol import envelope, protocol

Report = Callable[[str, Exception], None]
Step = Callable[[Any, exchanges.Exchange], bool | None]
"""One step: given the site's terms and the exchange. True ends the answering: the reply is there."""


class NoTerms:
    """A virtual hospital has none: no policy, no approvals, no log, no ledger."""

    def note_refused(self, of: exchanges.Exchange, refusal: errors.PolicyRefused) -> None:
        """Nothing is noted."""


Terms = enforcement.HospitalTerms | NoTerms


@dataclass(frozen=True)
class Order:
    """The steps of a gate, in the order they are taken.

    Attributes:
        judge: of a message that could be read; a refusal here is noted, and nothing is computed.
        answer: until one says that the reply is there.
        leave: last, of every reply, a refusal too. Where one fails, a refusal leaves in place of the reply.
    """

    judge: tuple[Step, ...]
    answer: tuple[Step, ...]
    leave: tuple[Step, ...]


RECIPE: tuple[Step, ...] = (
    steps.read,
    steps.note_received,
    steps.site_policy,
    steps.backbone,  # before anything is built: a stranger's name fetches nothing
    steps.recipe,
    steps.approval_before_data,  # what a mechanism comes to depends on the data, not listed for a stranger
    steps.recipe_policy,
    steps.approval,
    steps.memory,  # of this site: before anything is answered that may have been answered before
    secure_steps.roster,
    steps.message_policy,  # rounds, hours, evaluations that are left
    steps.lineage,
    steps.hold_adapter,
    steps.freshness,  # a coordinator that went back
)
"""What a message asks for, held against policy, approvals and audit log."""

DATA: tuple[Step, ...] = (
    steps.split,  # before the budget: where [privacy] came or went, this says more
    steps.privacy_budget,
    steps.personal_arrays,
    steps.enough_patients,
    steps.correction,
    steps.privacy_statement,
    steps.compute_time,
)
"""... and against what data, file and ledger of this site are now."""

SITE = Order(
    judge=(*RECIPE, *DATA, steps.note_accepted),
    answer=(
        secure_steps.deal,
        secure_steps.agree,
        secure_steps.open_sum,
        steps.hold_coded_adapter,
        steps.scores_given_before,
        steps.update_kept_before,
        steps.work_after_all,
        steps.reserve,
        steps.drop_kept,
        steps.compute,
        steps.pin_split,
        steps.release,
        secure_steps.advertise,
        steps.keep_update,
        steps.charge,
        steps.settle_residual,
    ),
    leave=(
        secure_steps.mask,
        steps.note_unreadable,
        steps.keep_scores,
        steps.note_sent,
        steps.end_of_recipe,
        secure_steps.end_of_recipe,
    ),
)
"""A hospital."""

SURVEY = Order(
    judge=(
        survey_steps.read,
        survey_steps.note_received,
        steps.site_policy,
        survey_steps.remember,
        survey_steps.statistics_policy,
        survey_steps.approval,
        steps.memory,
        survey_steps.privacy_budget,
        survey_steps.number_policy,
        survey_steps.note_accepted,
    ),
    answer=(survey_steps.answered_before, survey_steps.collect),
    leave=(survey_steps.note_unreadable, survey_steps.note_sent),
)
"""A hospital that is asked for statistics; nothing of it reaches the app."""

HOSPITAL = Order(
    judge=(*RECIPE, steps.note_accepted),
    answer=tuple(step for step in SITE.answer if step is not steps.pin_split),
    leave=(secure_steps.mask, steps.note_unreadable, steps.keep_scores, steps.note_sent, secure_steps.end_of_recipe),
)
"""A hospital whose data nobody looks at: recipes without a mechanism, answered by something else than our ClientApp."""

VIRTUAL = Order(
    judge=(steps.read,),
    answer=(
        steps.hold_coded_adapter,
        steps.update_sent_before,
        steps.compute,
        steps.leave_all,
        steps.keep_update,
        steps.charge,  # nothing, as no ledger is kept of images that nobody is behind
        steps.settle_residual,
    ),
    leave=(),
)
"""A virtual hospital: what it sent it sends again."""


def order_of(terms: Terms) -> Order:
    """The steps for a site with these terms."""
    if isinstance(terms, NoTerms):
        return VIRTUAL
    return SITE if isinstance(terms, enforcement.SiteTerms) else HOSPITAL


class Gate:
    """A ClientApp behind the site's terms.

    Args:
        app: the installed ClientApp.
        kept: the updates and scores that were sent.
        terms: the site's.
        report: told of an exception; its text never travels.
        order: of the steps; default follows from the terms.
    """

    def __init__(
        self, app: exchanges.App, kept: reply_cache.Sent, terms: Terms, report: Report, order: Order | None = None
    ) -> None:
        self._app, self._kept, self._terms, self._report = app, kept, terms, report
        self.order = order or order_of(terms)

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply to one message; never an exception's text."""
        passing = self.open(message, context)
        try:
            self.judge(passing)
            self.answer(passing)
        except errors.Interrupted:
            raise
        except Exception as error:
            self._report("message", error)
            passing.refuse(error)
        try:
            self.leave(passing)
        except errors.Interrupted:
            raise
        except Exception as error:  # what cannot be recorded must not leave
            self._report("audit log", error)
            passing.refuse(error)
        return passing.answer

    def _order(self, passing: exchanges.Exchange) -> Order:
        """The steps for a message: one that asks for statistics takes its own at a site that has data and terms."""
        asked = passing.kind == protocol.SURVEY and isinstance(self._terms, enforcement.SiteTerms)
        return SURVEY if asked else self.order

    def open(self, message: Message, context: Context) -> exchanges.Exchange:
        """A message that came, before anything of it is read."""
        opened = envelope.of(message, self._kept.adapters.find)
        return exchanges.Exchange(message, context, self._app, self._kept, opened)

    def judge(self, passing: exchanges.Exchange) -> None:
        """Before anything is computed.

        Raises:
            PolicyRefused: if the message must not be answered; that is noted.
        """
        with steps.noting(self._terms, passing):
            for step in self._order(passing).judge:
                step(self._terms, passing)

    def answer(self, passing: exchanges.Exchange) -> None:
        """Make the reply.

        Raises:
            FedvfmError: whatever broke; nothing of it may leave.
        """
        with passing.held:
            for step in self._order(passing).answer:
                if step(self._terms, passing):
                    return

    def leave(self, passing: exchanges.Exchange) -> None:
        """Note that the reply leaves, a refusal too.

        Raises:
            FedvfmError: if it must not.
        """
        for step in self._order(passing).leave:
            step(self._terms, passing)
