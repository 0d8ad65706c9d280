"""A benefit statement: the adapter a site chose beside the one it trained alone, on its own test split, signed.

It stays at the site, in the folder of the adapter that it is about; no message carries it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from fedvfm import errors
from fedvfm.client import state_folder
from fedvfm.client.personal import choice
from fedvfm.config import schema
from fedvfm.model import adapter_folder
from fedvfm.report import bootstrap
from fedvfm.trust import keys, signed_documents

JOINED, NO_DIFFERENCE, DECLINED, WORSE = "joined", "no difference", "declined", "worse"
TOO_FEW = "cannot tell"
"""A site's word: what it chose is of the federation and better than its own model; not to be told apart from it; it
chose its own model; what it chose is of the federation and worse than its own; no interval may be stated."""

FOLDER, STATEMENT = "personal", adapter_folder.STATEMENT


def word(chosen: str, gap: bootstrap.Difference) -> str:
    """The word of a site that chose this, which on its test split is ``gap`` above its own model."""
    if chosen == choice.ALONE:
        return DECLINED
    if gap.low is None:
        return TOO_FEW
    return {bootstrap.GAINS: JOINED, bootstrap.LOSES: WORSE}.get(gap.word, NO_DIFFERENCE)


class Gap(schema.Strict):
    """A paired difference of two adapters on one test split, with its 95 % interval or why there is none."""

    mean: float
    low: float | None = None
    high: float | None = None
    no_interval: str = ""

    @classmethod
    def of(cls, gap: bootstrap.Difference) -> Self:
        """From a bootstrap."""
        return cls(mean=gap.mean, low=gap.low, high=gap.high, no_interval=gap.reason)

    @property
    def words(self) -> str:
        """As people read it."""
        if self.low is None:
            return f"{self.mean:+.3f} (no interval: {self.no_interval})"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


class Statement(signed_documents.Document):
    """What a site chose, and what that is worth on its own test split; signed with the site's key.

    Attributes:
        recipe, fingerprint: of the federation's final adapter.
        adapter: fingerprint of the chosen one.
        choice: its name: "global", "personal", a mix, or "local-only".
        reason: "validation", or "few" where there were too few patients to go by.
        validation_units, test_units: independent ones: patients, or images where none is known.
        metric: the primary one; ``scores`` are its values by candidate, of the test split.
        minus_global, minus_local_only: of the chosen adapter; ``global_minus_local_only`` of the global one.
        word: None where the site trained no adapter alone.
        private: whether the adapter holds what was learned of records without noise, under a recipe with a mechanism.
    """

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature",)

    format: Literal["fedvfm-benefit-1"] = "fedvfm-benefit-1"
    site: schema.SiteName
    recipe: schema.Sha256
    fingerprint: schema.Sha256
    adapter: schema.Sha256
    choice: str
    reason: Literal["validation", "few"]
    validation_units: Annotated[int, Field(ge=0)]
    test_units: Annotated[int, Field(ge=0)]
    metric: str
    scores: dict[str, float]
    minus_global: Gap | None = None
    minus_local_only: Gap | None = None
    global_minus_local_only: Gap | None = None
    word: Literal["joined", "no difference", "declined", "worse", "cannot tell"] | None = None
    private: bool = False
    time: signed_documents.Time
    public_key: signed_documents.PublicKey
    signature: signed_documents.Signature

    @property
    def genuine(self) -> bool:
        """Whether it is as the site with this key signed it."""
        return keys.verified(keys.read_public(self.public_key), self.signature, self.signed_bytes())


def signed(values: Mapping[str, Any], key: keys.Private) -> Statement:
    """A statement of these values, signed now."""
    draft = Statement(
        **values,
        time=signed_documents.stamp(signed_documents.now()),
        public_key=keys.public_text(key),
        signature="A" * 40,
    )
    return draft.model_copy(update={"signature": keys.sign(key, draft.signed_bytes())})


def read(path: Path) -> Statement:
    """A statement that its own key signed.

    Raises:
        TrustError: if it is of no known form, or was changed.
    """
    statement = signed_documents.read(path, Statement, "benefit statement")
    if not statement.genuine:
        raise errors.TrustError(
            f"{path}: was changed after it was signed. Make it again: fedvfm client adapter personal"
        )
    return statement


@dataclass(frozen=True)
class Kept:
    """What was made here: the statement, and the folder of the adapter that it is about."""

    statement: Statement
    folder: Path


def kept(where: state_folder.State) -> list[Kept]:
    """Every personal adapter whose statement can be read, the newest last."""
    rows = []
    for path in sorted((where.folder / FOLDER).glob(f"*/{STATEMENT}")):
        try:
            rows.append(Kept(read(path), path.parent))
        except errors.TrustError:
            continue
    return sorted(rows, key=lambda row: row.statement.time)


def to_json(where: state_folder.State) -> list[dict[str, Any]]:
    """All of them for scripts: each statement, and the folder."""
    return [{**row.statement.model_dump(mode="json"), "folder": str(row.folder)} for row in kept(where)]


def lines(statement: Statement) -> list[str]:
    """What a person reads."""
    scores = ", ".join(f"{name} {value:.3f}" for name, value in statement.scores.items())
    rows = [
        f"chosen: {statement.choice} ({statement.reason}: {statement.validation_units} validation patients or images)",
        *([choice.rests_on(statement.validation_units)] if statement.validation_units < choice.FEW else []),
        f"test {statement.metric} on {statement.test_units} patients or images: {scores or 'no test samples'}",
    ]
    gaps = {
        "chosen minus global": statement.minus_global,
        "chosen minus local-only": statement.minus_local_only,
        "global minus local-only": statement.global_minus_local_only,
    }
    rows += [f"{name}: {gap.words}" for name, gap in gaps.items() if gap is not None]
    if statement.word is not None:
        rows.append(f"joining: {statement.word}")
    else:
        rows.append(
            "joining: cannot be judged, as no adapter was trained here alone ([personal] local_only = true trains one)"
        )
    if statement.private:
        rows.append("NOT PRIVATE: this adapter was trained on without noise. It must not leave this site")
    return rows
