"""What a site answers under secure aggregation: to a session, when asked for its update, to a list of survivors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from flwr.app import RecordDict

from fedvfm import errors
from fedvfm.client.gate import masking
from fedvfm.config import privacy
from fedvfm.config import secure_aggregation as secure_config
from fedvfm.protocol import protocol, secure_messages, wire
from fedvfm.secure_aggregation import consistency, fixed_point, masks
from fedvfm.secure_aggregation import session as sessions
from fedvfm.state import state
from fedvfm.trust import roster_document


def share(own: masking.Sessions, task: protocol.Task, roster: roster_document.RosterDocument) -> RecordDict:
    """Shares for the other members of a session, if it is one that this site may take part in.

    Args:
        own: the site's sessions.
        task: what is asked.
        roster: the document that a person here approved beside the recipe.

    Raises:
        SecureAggregationError: if the session keeps not what recipe and roster document promise.
    """
    secure = secure_of(task)
    with _known_form("session"):
        session = secure_messages.read_session(task.secure, task.recipe.hash)
    if not own.lists(session):
        return protocol.encode_dealing(own.apart(task.recipe.hash))
    if session.roster != roster.hash or session.round != task.round or session.threshold < secure.threshold:
        raise errors.SecureAggregationError(
            "secure-session", "the session is of another roster document or round, or of a lower threshold"
        )
    shared = task.recipe.privacy.mechanism in privacy.SHARED
    sessions.require(session, task.recipe.min_sites, secure.colluders, list(roster.keys), single=shared)
    sessions.require_signed(session, roster.verified)
    return protocol.encode_dealing(own.deal(session))


def mask(
    own: masking.Sessions, site: str, task: protocol.Task, update: state.SiteUpdate, *, without_labels: bool = False
) -> RecordDict:
    """An update as it leaves: masked numbers, and no metric or count beside them.

    Args:
        own: the site's sessions.
        site: its name.
        task: what was asked.
        update: what was trained, after the policy held back what it does not let out.
        without_labels: whether it was trained so: it counts less then, and its loss is none that others could join.

    Raises:
        SecureAggregationError: if it cannot be masked; then nothing leaves.
    """
    if task.state is None:
        raise errors.ProtocolError("a train message without an adapter")
    with _known_form("shares for this site"):
        session, inbox = secure_messages.read_inbox(task.secure)
    recipe, names = task.recipe, sorted(update.state)
    weight = update.num_examples if recipe.aggregation.weighting == "examples" else 1
    if without_labels and recipe.unlabelled is not None and recipe.aggregation.weighting == "examples":
        weight = recipe.unlabelled.examples(weight)
    loss = None if without_labels else update.metrics.get("loss")
    point, start = fixed_point.of(recipe), task.state
    plain = point.encode(update.state, start, names, weight, loss)

    def noised(numbers: masks.Numbers, key: bytes) -> masks.Numbers:
        return point.noised(numbers, start, names, key)

    noise = None if point.noise is None else noised
    numbers = own.mask(recipe.hash, task.round, start.fingerprint, session, inbox, plain, recipe.min_sites, noise)
    return protocol.encode_masked(secure_messages.Masked(site, task.round, task.state.fingerprint, session, numbers))


def sum_of(task: protocol.Task) -> tuple[consistency.Sum, dict[str, str]]:
    """What is asked to be signed or opened, and the signatures that came with it.

    Raises:
        SecureAggregationError: if the recipe has no secure aggregation.
        ProtocolError: if it is not of the known form.
    """
    secure_of(task)
    with _known_form("sum"):
        return secure_messages.read_sum(task.secure)


def agree(own: masking.Sessions, task: protocol.Task) -> RecordDict:
    """A signature for the one sum of a round.

    Raises:
        SecureAggregationError: if it is not the one, or none that anything is opened for.
    """
    asked, _ = sum_of(task)
    return protocol.encode_agreement(own.agree(task.recipe.hash, task.round, asked, task.recipe.min_sites))


def unmask(
    own: masking.Sessions, task: protocol.Task, roster: Callable[[str], roster_document.RosterDocument]
) -> tuple[RecordDict, int]:
    """What opens a sum, and of how many sites it is.

    Args:
        own: the site's sessions.
        task: what is asked.
        roster: the roster document of a hash; the session's own tells whose signatures count.

    Raises:
        SecureAggregationError: if nothing is opened for this list.
    """
    asked, signatures = sum_of(task)

    def verified(session: sessions.Session) -> consistency.Verified:
        return roster(session.roster).verified

    opening = own.open(task.recipe.hash, task.round, asked, signatures, task.recipe.min_sites, verified)
    return protocol.encode_opening(opening), len(asked.survivors)


def secure_of(task: protocol.Task) -> secure_config.SecureAggregation:
    """The recipe's secure aggregation.

    Raises:
        SecureAggregationError: if it has none.
    """
    if task.recipe.secure_aggregation is None:
        raise errors.SecureAggregationError("secure-session", "the recipe has no secure aggregation")
    return task.recipe.secure_aggregation


@contextlib.contextmanager
def _known_form(what: str) -> Iterator[None]:
    try:
        yield
    except wire.FAULTS as error:
        raise errors.ProtocolError(f"{what}: not of the known form ({type(error).__name__})") from None
