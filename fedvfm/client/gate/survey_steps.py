"""The steps of the gate for a message that asks for statistics; their order is in :mod:`fedvfm.client.gate.gate`.

What leaves is on disk and charged first, as an update is. A survey is answered once: asked again, the same bytes leave,
whatever the data are by then. Two answers to two surveys tell of the patients that came or went in between, so another
survey without noise is refused where these are few.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from fedvfm import errors
from fedvfm.client import site_file
from fedvfm.client.gate import enforcement, exchange, policy, privacy_charge, steps
from fedvfm.config import privacy, schema
from fedvfm.config import survey as surveys
from fedvfm.data import sample as samples
from fedvfm.privacy import records
from fedvfm.protocol import envelope, protocol
from fedvfm.storage import storage
from fedvfm.survey import answer, collection, layout, noise, statistics
from fedvfm.trust import signed_documents

Site: TypeAlias = enforcement.SiteTerms
Exchange: TypeAlias = exchange.Exchange
Grouped: TypeAlias = Mapping[str, Sequence[samples.Sample]]
"""Samples by patient."""


class Kept(schema.Strict):
    """An answer as it lies here.

    Attributes:
        survey: hash of the survey.
        answer: as it leaves.
        records: name of the set of patients it was made from; see :class:`fedvfm.privacy.records.Records`.
        token: of the reservation in the ledger; "" without noise.
    """

    format: Literal["fedvfm-kept-answer-1"] = "fedvfm-kept-answer-1"
    survey: schema.Sha256
    answer: str
    records: schema.Sha256
    token: str = ""


def kept_path(own: Site, survey: str) -> Path:
    """Where the answer to a survey lies."""
    return own.where.surveys / f"{survey}.answer"


def kept(own: Site, survey: str) -> Kept | None:
    """The answer that was made before; None where there is none.

    Raises:
        TrustError: if the file was changed.
    """
    path = kept_path(own, survey)
    return signed_documents.read(path, Kept, "kept answer") if path.exists() else None


def asked(of: Exchange) -> surveys.Survey:
    """What the message asks.

    Raises:
        ProtocolError: if it was not read.
    """
    if of.survey is None:
        raise errors.ProtocolError("a message that cannot be read")
    return of.survey


# -- judge -------------------------------------------------------------------------------------------------------------


def read(own: Site, of: Exchange) -> None:
    """Read what is asked.

    Raises:
        ProtocolError: if it is no survey.
    """
    text = protocol.decode_survey(of.envelope.content)
    try:
        of.survey = signed_documents.parse(text.encode(), surveys.Survey, "survey")
    except errors.TrustError as error:
        raise errors.ProtocolError(str(error)) from None


def note_received(own: Site, of: Exchange) -> None:
    """Note what came, whatever becomes of it."""
    of.started, of.came = time.monotonic(), steps.came(own, of)
    own.audit.record("received", kind=protocol.WORDS[of.kind], **of.about, **of.came)


def remember(own: Site, of: Exchange) -> None:
    """One that is new here is kept for review."""
    own.where.remember_survey(asked(of))


def statistics_policy(own: Site, of: Exchange) -> None:
    """The policy names every statistic that is asked for."""
    policy.require_survey(of.policy, asked(of))


def approval(own: Site, of: Exchange) -> None:
    """A person here approved the survey."""
    own.where.survey_approvals.require(asked(of).hash)


def privacy_budget(own: Site, of: Exchange) -> None:
    """Noise, and the site's budget, go together, and count patients."""
    require_budget(asked(of), own.judged.privacy)


def require_budget(survey: surveys.Survey, budget: privacy.Budget | None) -> None:
    """Check that what an answer spends can be charged here.

    Raises:
        PolicyRefused: "privacy-budget" if not; so too where the site has a budget and the survey no noise.
    """
    wanted = survey.privacy
    if wanted is None and budget is None:
        return
    if wanted is None or budget is None:
        detail = (
            "the survey has no noise, and [privacy] of this site gives its data a budget: exact numbers are more than "
            "any. Ask for a survey with [privacy]"
            if wanted is None
            else "the survey has noise, and this site's file has no [privacy] that it is charged to. Write one"
        )
        raise errors.PolicyRefused("privacy-budget", detail)
    if budget.unit != noise.UNIT:
        raise errors.PolicyRefused(
            "privacy-budget",
            f"the noise of a survey is for whole patients, and [privacy] of this site counts by {budget.unit}; "
            "epsilons of different units do not add up",
        )
    if wanted.delta > budget.delta:
        raise errors.PolicyRefused(
            "privacy-budget",
            f"privacy.delta = {wanted.delta:g} of the survey is above {budget.delta:g}, the delta of this site",
        )


def number_policy(own: Site, of: Exchange) -> None:
    """The site computes now, and answers so many surveys; one that was answered leaves again as it was.

    Raises:
        PolicyRefused: "policy-survey" too where the log says that it was answered, and the answer is gone.
    """
    survey = asked(of)
    done = {*own.history.surveyed, *(path.stem for path in own.where.surveys.glob("*.answer"))}
    if kept(own, survey.hash) is not None:
        return
    policy.require_open(of.policy)
    if of.policy.max_hours <= 0:
        raise errors.PolicyRefused("policy-hours", "policy.max_hours = 0")
    if survey.hash in done:
        raise errors.PolicyRefused(
            "policy-survey", f"survey {survey.hash[:12]} was answered, and the answer is no longer here: no second one"
        )
    if len(done) >= of.policy.max_surveys:
        detail = f"{len(done)} surveys are answered; policy.max_surveys = {of.policy.max_surveys}"
        raise errors.PolicyRefused("policy-survey", detail)


def note_accepted(own: Site, of: Exchange) -> None:
    """Note that it is accepted."""
    of.accepted = True
    own.audit.record("decided", kind=protocol.WORDS[of.kind], verdict="accepted", **of.about)


# -- answer ------------------------------------------------------------------------------------------------------------


def answered_before(own: Site, of: Exchange) -> bool:
    """Asked again, the site sends the same; charged if it was not.

    Where the site was killed before it charged the answer, and its data are others since, the answer never left, and
    is made anew.
    """
    survey = asked(of)
    before = kept(own, survey.hash)
    if before is None:
        return False
    content = protocol.encode_answer(own.judged.name, before.answer)
    if survey.privacy is None:
        _require_still_enough(own, of, survey, before)
    else:
        with steps.noting(own, of):
            account = _account(own, survey, *site_file.surveyed(own.judged, survey))
            if not account.again(protocol.digest(content), before.token):
                kept_path(own, survey.hash).unlink()
                number_policy(own, of)
                return False
            of.ledger = account.mark
    _leave(own, of, envelope.Envelope(content), 0.0)
    return True


def _require_still_enough(own: Site, of: Exchange, survey: surveys.Survey, before: Kept) -> None:
    """Check that a policy that was tightened since lets the kept answer out.

    Raises:
        PolicyRefused: "policy-survey".
    """
    least = answer.parse(before.answer, survey, own.judged.name).least
    with steps.noting(own, of):
        if least < of.policy.min_units:
            detail = f"the kept answer counts from {least} patients on; policy.min_units = {of.policy.min_units}"
            raise errors.PolicyRefused("policy-survey", detail)


def collect(own: Site, of: Exchange) -> None:
    """Look at the patients, keep the answer, charge it, and let it leave.

    Raises:
        PolicyRefused: if there are too few patients, they differ by few from those of an earlier answer, or what it
            spends is more than there is.
    """
    survey, config = asked(of), own.judged
    source, own_samples = site_file.surveyed(config, survey)
    grouped = collection.patients(own_samples, source)
    least = max(survey.least_patients, of.policy.min_units)
    with steps.noting(own, of):
        answer.require_enough(len(grouped), least)
        members = _set(own)
        name = members.keep(members.hashes(_names(grouped)))
        if survey.privacy is None:
            _require_unlike(own, survey, name, least)
    with contextlib.ExitStack() as held:
        account = hold = None
        if survey.privacy is not None:
            with steps.noting(own, of):
                account = _account(own, survey, source, own_samples)
                hold = held.enter_context(account.hold())
        totals = _totals(of, survey, grouped, source.read)
        storage.fault_point("surveyed")
        text = answer.text(_answer(survey, config.name, totals, least))
        content = protocol.encode_answer(config.name, text)
        token = "" if hold is None else hold.token
        entry = Kept(survey=survey.hash, answer=text, records=name, token=token)
        storage.write_text(kept_path(own, survey.hash), signed_documents.to_text(entry))
        storage.fault_point("survey-on-disk")
        if hold is not None and account is not None:
            hold.charge(protocol.digest(content))
            of.ledger = account.mark
            storage.fault_point("survey-charged")
    _leave(own, of, envelope.Envelope(content), steps.seconds_of(of))


def _answer(survey: surveys.Survey, site: str, totals: statistics.Totals, least: int) -> answer.Answer:
    """The answer, with noise from the operating system's entropy where the survey has noise."""
    event = noise.event(survey)
    if event is None:
        return answer.of_totals(survey, site, totals, least)
    sizes = noise.sigmas(layout.groups(survey), event.noise_multiplier)
    values = noise.added(totals.sums(), sizes)
    return answer.Answer(survey=survey.hash, site=site, least=least, values=values, sigmas=sizes)


def _totals(of: Exchange, survey: surveys.Survey, grouped: Grouped, read: collection.Read) -> statistics.Totals:
    """The pass over the patients, until the message or the policy ends it.

    Raises:
        PolicyRefused: if the policy's hours are over, or its time of the week is.
        DeadlinePassed: if the message's life is.
    """
    left, ttl = policy.remaining(of.policy, policy.UNUSED), of.message.metadata.ttl
    try:
        return collection.totals(survey, grouped, read, time.monotonic() + min(ttl, left.seconds))
    except errors.DeadlinePassed as late:
        if ttl <= left.seconds:
            raise
        raise errors.PolicyRefused(left.reason, str(late)) from late


def _leave(own: Site, of: Exchange, leaving: envelope.Envelope, seconds: float) -> None:
    """Note that a survey is answered, once, and let the answer be the reply."""
    survey = asked(of)
    if survey.hash not in own.history.surveyed:
        about = {"digest": leaving.digest, "seconds": seconds, "metrics": list(survey.statistics)}
        own.audit.record("surveyed", **of.about, **about)
    of.leave(leaving)


def _set(own: Site) -> records.Records:
    """Sets of patients, hashed with a key that stays in this folder."""
    members = records.Records(own.where.surveys)
    if not members.key_path.exists():
        members.make_key()
    return members


def _names(grouped: Grouped) -> list[str]:
    """Each patient with the number of its images: with one more it is another one."""
    return [f"{patient} {len(images)}" for patient, images in grouped.items()]


def _require_unlike(own: Site, survey: surveys.Survey, name: str, least: int) -> None:
    """Check that the patients are those of each earlier answer, or that many came or went since.

    Raises:
        PolicyRefused: "survey-difference".
    """
    members, now = _set(own), _set(own).find(name) or frozenset()
    for other in own.where.surveys_seen():
        before = kept(own, other)
        if before is None or before.token or other == survey.hash:  # noise on one of two hides the difference
            continue
        then = members.find(before.records)
        changed = least if then is None else len(now ^ then)
        if 0 < changed < 2 * least:  # a patient with one image more is one that went and one that came
            raise errors.PolicyRefused(
                "survey-difference",
                f"the patients differ by few from those that survey {other[:12]} was answered of; the difference of "
                f"the two answers would tell of them. Wait until {2 * least} or more came or went, or ask for a "
                "survey with noise",
            )


def _account(
    own: Site, survey: surveys.Survey, source: samples.Source, own_samples: Sequence[samples.Sample]
) -> privacy_charge.Account:
    """Where an answer is charged: to every patient it is made from, of the listing that it is made from."""
    budget, event = own.judged.privacy, noise.event(survey)
    if budget is None or event is None:
        raise errors.ProtocolError("a survey without noise, or a site without a budget, is charged to nobody")
    names = records.charged(noise.UNIT, own_samples, source)
    return privacy_charge.of_survey(survey.hash, event, names, own.judged.name, budget, own.history.ledger_marks())


# -- leave -------------------------------------------------------------------------------------------------------------


def note_unreadable(own: Site, of: Exchange) -> None:
    """Note that something came which is no survey."""
    if of.survey is None:
        own.audit.record("received", kind="unknown", **steps.came(own, of))
        own.audit.record("decided", kind="unknown", verdict="refused", reason="unreadable")


def note_sent(own: Site, of: Exchange) -> None:
    """Note what leaves: its size, its sha256 and the names of the statistics in it; then mark it.

    Raises:
        LedgerError: if an answer with noise would leave uncharged.
    """
    reply = of.answer
    about = steps.refusal(of, reply) if reply.has_error() else {"kind": protocol.WORDS[of.kind]}
    if not reply.has_error():
        survey = asked(of)
        about |= {"digest": of.leaving.digest, "metrics": list(survey.statistics)}
        if survey.privacy is not None:
            if of.ledger is None:
                raise errors.LedgerError("the answer to a survey was not charged, so it does not leave")
            about["ledger"] = str(of.ledger)
    about |= {} if of.survey is None else of.about
    steps.leave_marked(own, of, about)
