"""The steps of the gate that secure aggregation adds; their order is in :mod:`fedvfm.client.gate.gate`.

Without ``[secure_aggregation]`` in the recipe each of them does nothing. With it no plain update passes :func:`mask`.
"""

from __future__ import annotations

import dataclasses
import functools

from fedvfm import errors
from fedvfm.client.gate import enforcement, exchange, secure_answers
from fedvfm.protocol import envelope, protocol
from fedvfm.storage import storage
from fedvfm.trust import roster_document, signed_documents


def _hidden(own: enforcement.HospitalTerms, of: exchange.Exchange) -> bool:
    return of.task is not None and of.recipe.secure_aggregation is not None and own.masks


def roster(own: enforcement.HospitalTerms, of: exchange.Exchange) -> None:
    """A person here approved the roster document: with whom this site's update may be summed.

    A greeting brings it. It is kept for review; one that another authority signed, or that does not list this site with
    its key, is refused.

    Raises:
        PolicyRefused: "roster-pending" if it waits for a person, "secure-session" if it is none for this site.
    """
    if of.kind in (protocol.SHARE, protocol.AGREE, protocol.UNMASK) and of.recipe.secure_aggregation is None:
        raise errors.PolicyRefused("secure-session", "the recipe has no secure aggregation, and a session is asked for")
    if not _hidden(own, of):
        return
    approved = own.where.approvals.roster_of(of.recipe.hash)
    if of.kind != protocol.HANDSHAKE:
        own.where.approvals.require_roster(of.recipe.hash, approved)
        return
    if not of.asked.roster:
        own.where.approvals.require_roster(of.recipe.hash, "")
    try:
        document = signed_documents.parse(
            of.asked.roster.encode(), roster_document.RosterDocument, "the roster document"
        )
        own.where.remember_roster(document)
    except errors.TrustError as error:
        raise errors.PolicyRefused("secure-session", str(error)) from None
    own.where.approvals.require_roster(of.recipe.hash, document.hash)


def deal(own: enforcement.HospitalTerms, of: exchange.Exchange) -> bool:
    """Answer a session that is proposed with shares for its other members."""
    if of.kind != protocol.SHARE:
        return False
    document = own.where.roster(own.where.approvals.roster_of(of.recipe.hash))
    of.leave(envelope.Envelope(secure_answers.share(own.sessions, of.asked, document)))
    return True


def agree(own: enforcement.HospitalTerms, of: exchange.Exchange) -> bool:
    """Sign for the one sum of a round that this site helps to open."""
    if of.kind != protocol.AGREE:
        return False
    noted = _noted(own, of)
    content = secure_answers.agree(own.sessions, of.asked)
    _note(own, of, noted)
    of.leave(envelope.Envelope(content))
    return True


def _noted(own: enforcement.HospitalTerms, of: exchange.Exchange) -> bool:
    """Whether the audit log names this sum as the one of its round: it holds where files of sessions were put back.

    Raises:
        SecureAggregationError: ``secure-opened`` if it names another one.
    """
    before = own.history.sum_of(of.recipe.hash, of.asked.round)
    if before not in ("", secure_answers.sum_of(of.asked)[0].digest):
        raise errors.SecureAggregationError("secure-opened", "the audit log names another sum of this round")
    return before != ""


def _note(own: enforcement.HospitalTerms, of: exchange.Exchange, noted: bool) -> None:
    if not noted:
        asked, _ = secure_answers.sum_of(of.asked)
        about = {"recipe": of.recipe.hash, "round": of.asked.round, "digest": asked.digest}
        own.audit.record("agreed", numbers=len(asked.survivors), **about)


def open_sum(own: enforcement.HospitalTerms, of: exchange.Exchange) -> bool:
    """Answer a list of survivors with the shares that open their sum; noted in the audit log before they leave."""
    if of.kind != protocol.UNMASK:
        return False
    noted = _noted(own, of)
    roster_of = functools.partial(own.where.roster, former=True)
    content, sites = secure_answers.unmask(own.sessions, of.asked, roster_of)
    _note(own, of, noted)
    about = {"recipe": of.recipe.hash, "round": of.asked.round, "digest": protocol.digest(content)}
    own.audit.record("unmasked", numbers=sites, **about)
    storage.fault_point("secure-opening-noted")
    of.leave(envelope.Envelope(content))
    return True


def advertise(own: enforcement.HospitalTerms, of: exchange.Exchange) -> None:
    """A greeting carries the keys of this site's next session."""
    if _hidden(own, of) and of.kind == protocol.HANDSHAKE:
        hello = protocol.decode_hello(of.leaving.content)
        keys = own.sessions.advertised(of.recipe.hash)
        of.leave(envelope.Envelope(protocol.encode_hello(dataclasses.replace(hello, keys=keys))))


def mask(own: enforcement.HospitalTerms, of: exchange.Exchange) -> None:
    """An update leaves masked, or a word leaves in its place; the plain one stays where it was kept."""
    if not _hidden(own, of) or of.kind != protocol.TRAIN or of.answer.has_error():
        return
    try:
        site = own.where.about.site
        without, update = own.without_labels(of.recipe), of.leaving.update
        of.leave(envelope.Envelope(secure_answers.mask(own.sessions, site, of.asked, update, without_labels=without)))
    except errors.FedvfmError as error:
        of.refuse(error)


def end_of_recipe(own: enforcement.HospitalTerms, of: exchange.Exchange) -> None:
    """With the final adapter the secrets of the recipe's last session go."""
    if of.task is not None and of.task.final and _hidden(own, of) and not of.answer.has_error():
        own.sessions.forget(of.recipe.hash)
