"""What was decided of the final adapters that came to a site: rules, files and a person's word. Loads nothing heavy.

    adapters/<recipe>-<fingerprint>/   verdict.json, and unless it was declined the adapter in the usual layout;
                                       with a recipe's personal arrays that of this site, and global.safetensors

What is declined is not kept: an adapter that nobody wants should not lie where somebody may load it.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fedvfm import errors
from fedvfm.client import state_folder
from fedvfm.config import policy, schema
from fedvfm.model import adapter_folder
from fedvfm.storage import storage
from fedvfm.trust import signed_documents

FOLDER = "adapters"
VERDICT = "verdict.json"
GLOBAL = adapter_folder.AS_IT_CAME
"""The final adapter as it came, where the one beside it holds the site's own arrays (``recipe.personal``)."""
BESIDE = "beside.safetensors"
"""The same with what the site trained beside it; the one of the folder is as it came then."""
MAX_KEPT = 20
"""Adapters that are kept, and as many verdicts on declined ones; a coordinator that sends more fills no disk."""
Word = Literal["accepted", "declined", "pending"]
"""One of ``protocol.ACCEPTANCE``."""
ACCEPTED: Word = "accepted"
DECLINED: Word = "declined"
PENDING: Word = "pending"


class Verdict(schema.Strict):
    """What was decided of one final adapter, and why; stays at the site.

    Attributes:
        reason: "policy", "min-score", "max-drop", "no-own-update", "no-test-samples", "too-many" or "person".
        metric: the primary metric of the task; ``score`` is the adapter's, ``own`` that of the update this site sent
            last, where the policy compares them. Both are of the site's own test split.
    """

    format: Literal["fedvfm-verdict-1"] = "fedvfm-verdict-1"
    recipe: schema.Sha256
    fingerprint: schema.Sha256
    round: int
    verdict: Word
    reason: str
    metric: str
    score: float | None
    own: float | None
    examples: int
    time: signed_documents.Time

    @property
    def name(self) -> str:
        """Of its folder; whole hashes, so that no adapter takes another's place."""
        return f"{self.recipe}-{self.fingerprint}"

    @property
    def words(self) -> str:
        """One sentence for a person."""
        score = "not scored" if self.score is None else f"{self.metric} {self.score:.4f}"
        own = "" if self.own is None else f", the update of this site {self.own:.4f}"
        return f"{self.verdict} ({self.reason}): {score} on {self.examples} own test samples{own}"


def judge(
    rules: policy.FinalPolicy, score: float | None, own: Callable[[], float | None]
) -> tuple[Word, str, float | None]:
    """Verdict, reason, and the own score where it was asked for.

    Args:
        rules: the site's.
        score: of the final adapter; None where there was nothing to score it on.
        own: scores the update that this site sent last; None where it sent none.
    """
    if rules.accept != "score":
        plain: dict[str, Word] = {"never": DECLINED, "always": ACCEPTED, "ask": PENDING}
        return plain[rules.accept], "policy", None
    if score is None:
        return DECLINED, "no-test-samples", None
    # Asked for what must hold, not for what must not: a score that is no number passes neither way.
    if rules.min_score is not None and not score >= rules.min_score:
        return DECLINED, "min-score", None
    if rules.max_drop is None:
        return ACCEPTED, "min-score", None
    before = own()
    if before is None:
        return DECLINED, "no-own-update", None
    return (ACCEPTED if score >= before - rules.max_drop else DECLINED), "max-drop", before


def empty(folder: Path) -> None:
    """The folder, private and without what an earlier verdict left."""
    with storage.guard(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700)


def record(where: state_folder.State, found: Verdict) -> None:
    """Note a verdict in the audit log; a score is a number and names nobody."""
    about: dict[str, Any] = {"fingerprint": found.fingerprint, "examples": found.examples, "reason": found.reason}
    if found.score is not None and math.isfinite(found.score):
        about["score"] = round(found.score, 6)
    where.audit.record("decided", kind="final", verdict=found.verdict, recipe=found.recipe, round=found.round, **about)


def kept(where: state_folder.State) -> list[tuple[Verdict, Path]]:
    """Every verdict that can be read and the folder of its adapter, the newest last."""
    found = []
    for path in _paths(where):
        with contextlib.suppress(errors.FedvfmError):
            found.append((signed_documents.read(path, Verdict, "verdict"), path.parent))
    return sorted(found, key=lambda one: one[0].time)


def _paths(where: state_folder.State) -> list[Path]:
    return sorted((where.folder / FOLDER).glob(f"*/{VERDICT}"))


def damaged(where: state_folder.State) -> list[str]:
    """Verdicts that cannot be read, and why, a sentence each; the others count without them."""
    found = []
    for path in _paths(where):
        try:
            signed_documents.read(path, Verdict, "verdict")
        except errors.FedvfmError as error:
            found.append(f"{error}. Remove the folder; the adapter comes again if it is asked for")
    return found


def full(where: state_folder.State) -> bool:
    """Whether no more adapters are kept; what was declined takes no place, what cannot be read may."""
    return sum(one.verdict != DECLINED for one, _ in kept(where)) + len(damaged(where)) >= MAX_KEPT


def forget_declined(where: state_folder.State) -> None:
    """Let go of the oldest verdicts on what a rule declined, beyond as many as adapters; the audit log has them."""
    declined = [folder for one, folder in kept(where) if one.verdict == DECLINED and one.reason != "person"]
    for folder in declined[:-MAX_KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def place(where: state_folder.State, found: Verdict) -> Path:
    """The folder of an adapter: where it lies already (earlier releases cut the hashes in its name), or a new one."""
    both = (found.recipe, found.fingerprint)
    there = (folder for one, folder in kept(where) if (one.recipe, one.fingerprint) == both)
    return next(there, where.folder / FOLDER / found.name)


def find(where: state_folder.State, recipe: str, fingerprint: str) -> Verdict | None:
    """The verdict on one adapter, if there is one."""
    both = (recipe, fingerprint)
    return next((one for one, _ in kept(where) if (one.recipe, one.fingerprint) == both), None)


def decide(where: state_folder.State, asked: str, accept: bool) -> Verdict:
    """A person's decision on an adapter that waits for one; declined, it is removed.

    Args:
        where: the site's state folder.
        asked: its fingerprint, or the first twelve letters or more.
        accept: keep it, or not.

    Raises:
        TrustError: if no such adapter waits.
    """
    waiting = [(one, folder) for one, folder in kept(where) if one.verdict == PENDING]
    fits = [pair for pair in waiting if len(asked) >= 12 and pair[0].fingerprint.startswith(asked)]
    if len(fits) != 1:
        known = ", ".join(one.fingerprint[:12] for one, _ in waiting) or "none"
        raise errors.TrustError(
            f"adapter '{signed_documents.shown(asked)[:80]}': waits for no decision; waiting: {known}"
        )
    before, folder = fits[0]
    now = signed_documents.stamp(signed_documents.now())
    found = before.model_copy(update={"verdict": ACCEPTED if accept else DECLINED, "reason": "person", "time": now})
    if not accept:
        empty(folder)
    signed_documents.write(folder / VERDICT, found)
    record(where, found)
    return found


def to_json(where: state_folder.State) -> list[dict[str, Any]]:
    """All verdicts for scripts; ``folder`` is empty where the adapter was not kept."""
    rows: list[dict[str, Any]] = []
    for one, folder in kept(where):
        rows.append({**one.model_dump(mode="json"), "folder": "" if one.verdict == DECLINED else str(folder)})
    return rows
