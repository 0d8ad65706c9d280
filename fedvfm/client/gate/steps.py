"""The steps of the gate, each small: what it checks, notes or makes of one message.

Their order is in :mod:`fedvfm.client.gate.gate`. A step is given the site's terms, which outlive the message, and the
exchange, which does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Message

from fedvfm import errors
from fedvfm.client.gate import enforcement, exchange, policy, privacy_charge, rollback_detection, split_pin
from fedvfm.protocol import codecs, envelope, protocol
from fedvfm.state import factors, groups, state
from fedvfm.storage import hash_chain, storage

LOG = logging.getLogger(__name__)

Hospital: TypeAlias = enforcement.HospitalTerms
Site: TypeAlias = enforcement.SiteTerms
Exchange: TypeAlias = exchange.Exchange


@contextlib.contextmanager
def noting(own: Any, of: Exchange) -> Iterator[None]:
    """A message that is refused before anything was computed for it is noted as refused."""
    try:
        yield
    except errors.PolicyRefused as refusal:
        of.accepted = False
        own.note_refused(of, refusal)
        raise


# -- judge -------------------------------------------------------------------------------------------------------------


def read(own: object, of: Exchange) -> None:
    """Read what is asked.

    Raises:
        ProtocolError: if it is no message of ours.
        AdapterMissing: if it is a difference to an adapter that is not held.
        ConfigError: if its recipe has faults.
    """
    if of.kind not in exchange.KINDS:
        raise errors.ProtocolError("a message of an unknown kind")
    of.task = of.envelope.task


def note_received(own: Hospital, of: Exchange) -> None:
    """Note what came, whatever becomes of it."""
    of.started, of.came = time.monotonic(), came(own, of)
    task = of.asked
    about = {**of.came, **({"split": task.split} if task.split in ("val", "test") else {})}
    if task.state is not None:
        about["fingerprint"] = task.state.fingerprint
    own.audit.record(
        "received", kind=protocol.WORDS[of.kind], recipe=task.recipe.hash, round=enforcement.number(task), **about
    )


def came(own: Hospital, of: Exchange) -> dict[str, Any]:
    """Of any message: size, sha256, its run, and the mark of the coordinator's log where it carries one."""
    about: dict[str, Any] = {"bytes": envelope.size(of.message), "peer": own.where.about.federation}
    about["run"] = str(of.message.metadata.run_id % 2**64)
    if of.message.has_content():
        about["digest"] = of.envelope.digest
    with contextlib.suppress(errors.ProtocolError):
        mark = protocol.find_mark(of.message)
        about |= {} if mark is None else {"peer_length": mark.length, "peer_head": mark.head}
    return about


def site_policy(own: Hospital, of: Exchange) -> None:
    """The policy as it is now: the whole message is judged by one."""
    of.rules = own.rules()


def backbone(own: Hospital, of: Exchange) -> None:
    """The policy names the backbone and the sha256 of its weights."""
    asked = of.recipe.backbone
    if (asked.sha256 or policy.SCRATCH) not in of.policy.backbones.get(asked.name, ()):
        raise errors.PolicyRefused("policy-backbone", f"backbone '{asked.name}' is not in the policy")


def recipe(own: Hospital, of: Exchange) -> None:
    """What the site itself makes of the recipe; one that is new here is kept for review."""
    own.where.remember(own.lock(of.recipe))


def approval_before_data(own: Hospital, of: Exchange) -> None:
    """A person here approved a recipe with a mechanism, before this site's data are listed for it."""
    if privacy_charge.private(of.recipe):
        own.where.approvals.require(of.recipe.hash)


def recipe_policy(own: Hospital, of: Exchange) -> None:
    """Every rule of the policy on a recipe."""
    policy.require(of.policy, policy.Facts.of(own.lock(of.recipe), own.units(of.recipe)))


def approval(own: Hospital, of: Exchange) -> None:
    """A person here approved the recipe."""
    own.where.approvals.require(of.recipe.hash)


def message_policy(own: Hospital, of: Exchange) -> None:
    """Rounds, hours and evaluations that the policy leaves; what was answered before is no new work."""
    # Nothing is computed, and the others wait: at any hour, and of a round that was done.
    if of.kind in (protocol.AGREE, protocol.UNMASK):
        return
    kept = kept_answer(of) is not None
    of.as_kept = kept and of.kind == protocol.TRAIN
    policy.check_task(of.policy, of.asked, of.kind, own.usage(of.recipe), kept=kept)


def lineage(own: Hospital, of: Exchange) -> None:
    """The adapter is the recipe's first, or near one that came before."""
    own.lineage(of.recipe, of.sent.adapters).require(of.kind, of.asked, of.policy.max_step)


def hold_adapter(own: Hospital, of: Exchange) -> None:
    """Hold the adapter: the next one must be near it."""
    if of.asked.state is not None:
        of.sent.adapters.keep(of.recipe.hash, of.asked.state)


def memory(own: Hospital, of: Exchange) -> None:
    """What the coordinator noted of this site's audit log is in it: the state folder was not put back since.

    A mark is nearly always the line of the reply that carried it; where another process wrote between, any line counts.
    """
    noted = protocol.find_noted(of.message)
    if noted is None or own.history.sent(noted.head):
        return
    if not any(entry["hash"] == noted.head for entry in own.audit.scan()):
        raise errors.PolicyRefused(
            "went-back",
            f"the coordinator noted entry {noted.length} of this site's audit log in this recipe, and it is not there: "
            "the state folder was put back to an earlier day, or the log was rewritten. What was sent since is "
            "forgotten here, so no more of this recipe is answered",
        )


def freshness(own: Hospital, of: Exchange) -> None:
    """The coordinator did not go back, as far as this site can tell."""
    rollback_detection.require_onward(of.kind, of.asked, of.came, own.history.coordinators)


def split(own: Site, of: Exchange) -> None:
    """The data are split as when the recipe began here."""
    own.require_split(of.recipe)


def privacy_budget(own: Site, of: Exchange) -> None:
    """The site's budget counts as the recipe's mechanism does; the site is made ready."""
    privacy_charge.require(of.recipe, own.judged.privacy)
    own.prepared(of.recipe)


def personal_arrays(own: Site, of: Exchange) -> None:
    """What this site trained and keeps for itself lies here; a site without it would go on as another one, unseen.

    Raises:
        CheckpointError: if it is gone.
    """
    if of.recipe.personal.kind == groups.NONE or of.kind not in (protocol.TRAIN, protocol.EVALUATE):
        return
    until = of.asked.round + (of.kind == protocol.EVALUATE)
    trained = [number for number in own.history.taken(of.recipe.hash).bases.values() if number < until]
    last = of.sent.last_round(of.recipe.hash)  # kept beside the update, and let go no sooner
    gone = 0 < last < until and not of.sent.personal.has(of.recipe.hash, last)
    if gone or (trained and not of.sent.personal.has(of.recipe.hash)):
        raise errors.CheckpointError(
            f"{own.where.sent}: the personal arrays of recipe {of.recipe.hash[:12]} are gone, and this site trained in "
            f"round {last if gone else max(trained)}. Restore the folder from a backup; without them only a newly "
            "locked recipe goes on"
        )


def enough_patients(own: Site, of: Exchange) -> None:
    """No update is of a single patient, or of a single step."""
    if of.kind == protocol.TRAIN and not of.as_kept:
        images = own.prepared(of.recipe).split("train")
        patients = {sample.subject for sample in images}
        policy.require_enough(own.judged.policy, of.recipe, len(patients), len(images))


def correction(own: Site, of: Exchange) -> None:
    """What the coordinator adds to the steps of a round moves the adapter no farther than it may move itself.

    Raises:
        ProtocolError: if a correction came that the recipe does not ask for, or none that it does.
    """
    if of.kind == protocol.TRAIN:
        images = len(own.prepared(of.recipe).split("train"))
        own.lineage(of.recipe, of.sent.adapters).require_correction(of.asked, images, of.policy.max_step)
    elif of.asked.correction is not None:
        raise errors.ProtocolError("a correction of steps came with a message that trains nothing")


def privacy_statement(own: Site, of: Exchange) -> None:
    """What the mechanism comes to here, for this site's people; a greeting shows how long the ledger is."""
    budget = own.judged.privacy if privacy_charge.private(of.recipe) else None
    if budget is not None and of.kind != protocol.EVALUATE:
        own.state_privacy(of.recipe, budget)
    if budget is not None and of.kind == protocol.HANDSHAKE:
        of.ledger = privacy_charge.shown(budget, own.judged.name, own.history.ledger_marks())


def compute_time(own: Site, of: Exchange) -> None:
    """When the policy ends the work on this message."""
    own.prepared(of.recipe).ends = own.ends(of.recipe)


def note_accepted(own: Hospital, of: Exchange) -> None:
    """Note that it is accepted: time spent on it counts from here."""
    of.accepted = True
    about = {"recipe": of.recipe.hash, "round": of.asked.round}
    own.audit.record("decided", kind=protocol.WORDS[of.kind], verdict="accepted", **about)


# -- answer ------------------------------------------------------------------------------------------------------------


def hold_coded_adapter(own: object, of: Exchange) -> None:
    """The next message may hold a difference to the adapter of this one."""
    if of.asked.state is not None and of.recipe.codec != codecs.PLAIN:
        of.sent.adapters.keep(of.recipe.hash, of.asked.state)


def kept_answer(of: Exchange) -> envelope.Envelope | None:
    """The answer that was made for this before, if it lies here."""
    task = of.asked
    asked = of.kind == protocol.TRAIN or (of.kind == protocol.EVALUATE and task.split in ("val", "test"))
    content = of.sent.find(task, of.kind) if asked and task.state is not None else None
    return None if content is None else envelope.Envelope(content, base=task.state)


def scores_given_before(own: Hospital, of: Exchange) -> bool:
    """Scores are given once, and the same numbers again; the final adapter is judged anew.

    A person or a policy may say otherwise of it by now.
    """
    before = _given(own, of) if of.kind == protocol.EVALUATE and not of.asked.final else None
    if before is not None:
        of.leave(envelope.Envelope.of_evaluation(before))
    return before is not None


def _given(own: Hospital, of: Exchange) -> protocol.Evaluation | None:
    """The scores that were given for this before, but for what a policy that was tightened since holds back."""
    kept = kept_answer(of)
    if kept is None:
        return None
    scores = kept.evaluation
    free, _ = policy.release(own.rules(), scores.metrics, own.patients(of.asked.split, scores.num_examples))
    return dataclasses.replace(scores, metrics=free)


def update_sent_before(own: object, of: Exchange) -> bool:
    """Asked again for the same, a virtual hospital sends the same."""
    known = kept_answer(of) if of.kind == protocol.TRAIN else None
    if known is not None:
        _settle(of)
        of.leave(known)
    return known is not None


def update_kept_before(own: Hospital, of: Exchange) -> bool:
    """Asked again for the same, a site sends the same; charged if it was not.

    Metrics that a policy that was tightened since does not let out are held back. Where the site was killed before it
    charged the update, and its data is another since, the update may not leave and is computed anew.

    Raises:
        PolicyRefused: if what it spends cannot be charged.
    """
    known = kept_answer(of) if of.kind == protocol.TRAIN else None
    if known is None:
        return False
    released = _released(own, known)
    if privacy_charge.private(of.recipe) and not _charged_again(own, of, released):
        of.known = known
        return False
    _settle(of)
    of.leave(released)
    return True


def _released(own: Hospital, known: envelope.Envelope) -> envelope.Envelope:
    update = known.update
    free, held = policy.release(own.rules(), update.metrics, own.patients("train", update.num_examples))
    if not held:
        return known
    fewer = dataclasses.replace(update, metrics=free)
    return envelope.Envelope.of_update(protocol.with_metrics(known.content, fewer), fewer)


def _charged_again(own: Hospital, of: Exchange, released: envelope.Envelope) -> bool:
    with noting(own, of):
        account = own.account(of.asked)
        charged = account.again(released.digest, of.sent.token(of.asked))
    of.ledger = account.mark if charged else None
    return charged


def work_after_all(own: Hospital, of: Exchange) -> None:
    """Judge a message again that was accepted for its kept update, where that may not leave.

    Raises:
        PolicyRefused: if the policy's rounds are used up, or the site does not compute at this time of the week.
    """
    with noting(own, of):
        if of.as_kept:
            policy.check_task(own.rules(), of.asked, of.kind, own.usage(of.recipe))
            of.as_kept = False


def reserve(own: Hospital, of: Exchange) -> None:
    """Reserve what a round under a mechanism spends while it trains.

    Raises:
        PolicyRefused: if it would spend more than there is; then nothing is computed.
    """
    if of.kind != protocol.TRAIN or not privacy_charge.private(of.recipe):
        return
    with noting(own, of):
        account = own.account(of.asked)
        hold = of.held.enter_context(account.hold())

    def charge(digest: str) -> None:
        hold.charge(digest)
        of.ledger = account.mark

    of.charge, of.token = charge, hold.token


def drop_kept(own: object, of: Exchange) -> None:
    """Let go of an update that may not leave. Refused, it stays: the data may come back as they were."""
    if of.known is not None:
        of.sent.drop(of.asked)


def compute(own: object, of: Exchange) -> bool:
    """Let the app train or evaluate."""
    reply = of.app(of.message, of.context)
    if reply.has_error():
        of.reply = reply
        return True
    storage.fault_point("trained")
    of.computed = envelope.Envelope(reply.content, base=of.asked.state)
    return False


def pin_split(own: Site, of: Exchange) -> None:
    """Before the first answer of a recipe leaves, what its split follows from is kept."""
    if of.kind != protocol.HANDSHAKE and own.basis is not None:
        split_pin.keep(own.where, own.basis)
    if of.kind == protocol.TRAIN:
        counts = own.features_counted()
        if counts is not None:  # for the people here; it never leaves
            LOG.info(f"round {of.asked.round}: features of the frozen blocks: {counts}")


def leave_all(own: object, of: Exchange) -> None:
    """All that was computed may leave."""
    of.leave(of.made)


def release(own: Hospital, of: Exchange) -> None:
    """Hold back every metric that the policy does not let out, and note what was computed."""
    if of.asked.state is None or of.kind not in (protocol.TRAIN, protocol.EVALUATE):
        of.leave(of.made)
        return
    of.leave((_trained if of.kind == protocol.TRAIN else _evaluated)(own, of))


def _trained(own: Hospital, of: Exchange) -> envelope.Envelope:
    seconds, allowed, base = seconds_of(of), own.rules(), of.base
    update = of.made.update
    if privacy_charge.private(of.recipe):  # whatever computed it: nothing but the adapter is covered
        update = dataclasses.replace(update, metrics={}, num_examples=1)
    free, _ = policy.release(allowed, update.metrics, own.patients("train", update.num_examples))
    if groups.personal(own.lock(of.recipe).manifest, of.recipe.personal.kind) & set(update.state):
        raise errors.TrainingError("an update holds personal arrays, which never leave a site; nothing was sent")
    if _is_personal(own, of, update.state):
        raise errors.TrainingError("an update is this site's personal adapter, which never leaves; nothing was sent")
    whole = factors.completed(update.state, base)
    own.audit.record(
        "trained",
        recipe=of.recipe.hash,
        round=of.asked.round,
        base=base.fingerprint,
        fingerprint=update.state.fingerprint,
        numbers=update.state.parameters,
        examples=update.num_examples,
        seconds=seconds,
        norm=own.lineage(of.recipe, of.sent.adapters).moved(base, whole),
    )
    of.started = time.monotonic()  # what is noted counts once, also where it is refused after all
    leaving = dataclasses.replace(update, metrics=free)
    return envelope.Envelope.of_update(protocol.with_metrics(of.made.content, leaving), leaving)


def _is_personal(own: Hospital, of: Exchange, leaving: state.AdapterState) -> bool:
    """Whether what would leave is what this site trained for itself, where that has the same names (``ditto``).

    Where both begin as the same adapter they may be equal when trained: then it tells no more. So it is in a site's
    first round, and where the global adapter is the update that this site alone sent.
    """
    if of.recipe.personal.kind != groups.DITTO:
        return False
    about = (of.recipe.hash, own.where.about.site, of.asked.round)
    trained, began = of.sent.personal.proposed(*about, of.base.fingerprint), of.sent.personal.before(*about)
    if not (leaving.keys() <= trained.keys()) or all(_equal(began.get(name), of.base[name]) for name in trained):
        return False
    could: Mapping[str, state.Array] = {name: trained[name] for name in leaving}
    if of.recipe.codec != codecs.PLAIN:
        could = codecs.encode(of.recipe.codec, could, of.base, of.sent.residuals.before(*about)).after
    return all(_equal(could[name], array) for name, array in leaving.items())


def _equal(kept: state.Array | None, other: state.Array) -> bool:
    return kept is None or np.array_equal(kept, other)


def _evaluated(own: Hospital, of: Exchange) -> envelope.Envelope:
    seconds, allowed, task = seconds_of(of), own.rules(), of.asked
    scores = protocol.decode_evaluation(of.made.content, inside=True)
    free = policy.release_scores(allowed, scores.metrics, own.patients(task.split, scores.num_examples), scores.classes)
    own.audit.record(
        "evaluated",
        recipe=of.recipe.hash,
        round=task.round,
        fingerprint=of.base.fingerprint,
        split=task.split,
        examples=scores.num_examples,
        seconds=seconds,
    )
    of.started = time.monotonic()  # what is noted counts once, also where it is refused after all
    before = _given(own, of)
    if before is not None:  # the same numbers as before, whatever was computed now
        leaving = dataclasses.replace(before, acceptance=scores.acceptance)
    else:
        if allowed.metrics_epsilon is not None:
            free, of.ledger = own.noised(task, scores, free)
        leaving = dataclasses.replace(scores, metrics=free, samples={}, ids=(), classes={}, patients={})
    return envelope.Envelope.of_evaluation(leaving)


def seconds_of(of: Exchange) -> float:
    """How long was worked on it that no entry counts yet."""
    return round(time.monotonic() - of.started, 3)


def keep_update(own: object, of: Exchange) -> None:
    """An update is on disk before it is charged."""
    if of.kind == protocol.TRAIN:
        of.sent.keep(of.asked, of.answer, of.token)
        storage.fault_point("update-on-disk")


def charge(own: object, of: Exchange) -> None:
    """Charge what the update spends, by the sha256 of what leaves."""
    if of.kind == protocol.TRAIN:
        of.charge(of.leaving.digest)
        storage.fault_point("update-charged")


def settle_residual(own: object, of: Exchange) -> None:
    """What coding the update lost, and the personal arrays beside it, count from now on: the update may leave."""
    if of.kind == protocol.TRAIN:
        _settle(of)
        storage.fault_point("residual-settled")


def _settle(of: Exchange) -> None:
    if of.asked.state is not None:
        for kept in (of.sent.residuals, of.sent.personal):
            kept.settle(of.recipe.hash, of.asked.round, of.asked.state.fingerprint)


# -- leave -------------------------------------------------------------------------------------------------------------


def note_unreadable(own: Hospital, of: Exchange) -> None:
    """Note that something came which is no message of ours, or of no known form."""
    if of.task is None:
        own.audit.record("received", kind="unknown", **came(own, of))
        own.audit.record("decided", kind="unknown", verdict="refused", reason="unreadable")


def keep_scores(own: object, of: Exchange) -> None:
    """Scores are on disk before they leave."""
    if of.kind == protocol.EVALUATE and of.task is not None and not of.answer.has_error():
        of.sent.keep_scores(of.task, of.answer)


def note_sent(own: Hospital, of: Exchange) -> None:
    """Note what leaves (its size, its sha256, the names of the metrics in it), then mark it.

    The mark covers the line of the reply itself: whoever holds the reply can show that this site said so. An update
    that was charged carries the mark of the ledger too, so that a ledger that is cut later shows at both ends; so does
    a greeting under a mechanism, so that it shows before anything more is charged.

    Raises:
        LedgerError: if an update under a mechanism would leave uncharged.
    """
    reply = of.answer
    about = refusal(of, reply) if reply.has_error() else _said(of)
    ledger = None if reply.has_error() else of.ledger
    if of.kind == protocol.EVALUATE:  # noted here alone: a coordinator counts the ledger of updates
        about |= {} if ledger is None else {"ledger": str(ledger)}
        ledger = None
    if of.kind == protocol.TRAIN and not reply.has_error() and privacy_charge.private(of.recipe):
        if ledger is None:
            raise errors.LedgerError(f"round {of.asked.round}: the update was not charged, so it does not leave")
        about["ledger"] = str(ledger)
    if of.task is not None:
        about |= {"recipe": of.task.recipe.hash, "round": enforcement.number(of.task)}
    leave_marked(own, of, about, ledger)


def leave_marked(own: Hospital, of: Exchange, about: dict[str, Any], ledger: hash_chain.Mark | None = None) -> None:
    """Note that the reply leaves, then put the mark of the log that says so upon it."""
    reply = of.answer
    protocol.put_mark(reply, hash_chain.NOWHERE, ledger)  # as long as the one it will carry
    own.audit.record("sent", bytes=envelope.size(reply), peer=own.where.about.federation, **about)
    protocol.put_mark(reply, own.audit.mark, ledger)


def refusal(of: Exchange, reply: Message) -> dict[str, Any]:
    """What the log says of a word that leaves."""
    about: dict[str, Any] = {"kind": "refusal", "reason": protocol.error_word(reply)}
    if of.accepted:  # what broke off was computed too, and counts
        about["seconds"] = seconds_of(of)
    return about


def _said(of: Exchange) -> dict[str, Any]:
    leaving = of.leaving
    about: dict[str, Any] = {"kind": protocol.WORDS[of.kind], "digest": leaving.digest}
    if of.kind == protocol.TRAIN and protocol.is_masked(leaving.content):
        about["numbers"] = len(protocol.decode_masked(leaving.content).numbers)
    elif of.kind == protocol.TRAIN:
        update = leaving.update
        about |= {"fingerprint": update.state.fingerprint, "numbers": update.state.parameters}
        about["metrics"] = sorted(update.metrics)
    elif of.kind == protocol.EVALUATE:
        about |= {"metrics": sorted(leaving.evaluation.metrics), "split": of.asked.split}
    return about


def end_of_recipe(own: Site, of: Exchange) -> None:
    """With the final adapter the recipe ends, and what was kept of the images' features goes."""
    if of.task is not None and of.task.final and not of.answer.has_error():
        storage.remove_folder(own.where.features)
