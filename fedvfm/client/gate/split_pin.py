"""What a recipe's split into train, val and test follows from, kept at the site once an update or score is to leave.

With ``[privacy]`` every patient is put into a part by keyed hash, without it shares are exact: written or removed in
mid-recipe it makes another split, and so do another seed and other shares. Then a patient who was tested is trained on,
and one was trained on outside the ledger. So the site answers nothing more of a recipe whose split is another one than
when it began.

    splits/<hash>.json           one a recipe that something was computed for; ``purge`` leaves it
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fedvfm import errors
from fedvfm.client import state_folder
from fedvfm.config import base, schema
from fedvfm.storage import storage
from fedvfm.trust import signed_documents

FOLDER = "splits"
REASON = "policy-split"
_KINDS = {"exact": "without [privacy]: exact shares", "keyed": "with [privacy]: each patient by itself"}


class Basis(schema.Strict):
    """What a split follows from, beside the data.

    Attributes:
        recipe: hash of the recipe that is trained with it.
        kind: "keyed" draws each patient alone, from seed and name; "exact" draws all together.
        seed, val_share, test_share: of the site's ``[split]``.
    """

    format: Literal["fedvfm-split-1"] = "fedvfm-split-1"
    recipe: schema.Sha256
    kind: Literal["exact", "keyed"]
    seed: int
    val_share: base.Fraction
    test_share: base.Fraction


def of(recipe: str, site: schema.SiteConfig) -> Basis:
    """What a recipe's split follows from by the site's file as it is."""
    return Basis(
        recipe=recipe,
        kind="exact" if site.privacy is None else "keyed",
        seed=site.split.seed,
        val_share=site.split.val_share,
        test_share=site.split.test_share,
    )


def keep(where: state_folder.State, basis: Basis) -> None:
    """Write it down before the first answer of a recipe leaves; what stands there already stays.

    Raises:
        StorageError: if the disk refuses; then nothing may leave.
    """
    path = _path(where, basis.recipe)
    if path.exists():
        return
    with storage.guard(path):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    storage.write_text(path, signed_documents.to_text(basis))


def require(where: state_folder.State, basis: Basis) -> None:
    """Check that a recipe that began here is split as it was; one that did not may be split in any way.

    Raises:
        PolicyRefused: "policy-split", naming every value that differs, as it was and as it is.
    """
    path = _path(where, basis.recipe)
    if not path.exists():
        return
    try:
        before = signed_documents.read(path, Basis, "note of a split")
    except errors.TrustError as error:
        told = f"{error}. Restore it from a backup; or, where [privacy] and [split] are as they were, remove it"
        raise errors.PolicyRefused(REASON, told) from None
    changed = _changes(before, basis)
    if changed:
        raise errors.PolicyRefused(
            REASON,
            f"recipe {basis.recipe[:12]} began here with another split into train, val and test: {'; '.join(changed)}. "
            "Patients who were tested would be trained on. Put the site's file back as it was, or ask for another "
            "recipe: one that has not begun here takes any split",
        )


def _changes(before: Basis, now: Basis) -> list[str]:
    found = [] if before.kind == now.kind else [f"it was {_KINDS[before.kind]}, it is {_KINDS[now.kind]}"]
    for name in ("seed", "val_share", "test_share"):
        was, stands = getattr(before, name), getattr(now, name)
        found += [] if was == stands else [f"split.{name} was {was}, it is {stands}"]
    return found


def _path(where: state_folder.State, recipe: str) -> Path:
    return where.folder / FOLDER / f"{recipe}.json"
