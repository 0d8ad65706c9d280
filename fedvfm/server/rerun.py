"""A rerun without a site that withdrew: the rounds before it came in stand, the later ones are made again.

The server keeps the checkpoint of each round after which a site came in
(:func:`fedvfm.server.rounds.journal.bases`), at most one a site. The later rounds are made by the sites that are left,
from that checkpoint, under a recipe of its own: the same but for ``rerun`` and ``start``, so each site is asked for its
approval. Its journal begins with the lines of the rounds that stand, and rounds keep their numbers, so it ends with the
bytes of a federation that never had the site; under asynchronous rounds, which depend on who answers first, without a
part of it all the same. Late updates of the rounds that stand are waited for by nobody. Where sites keep something from
round to round (personal arrays, what coding lost) no middle can be gone on from, and the rerun is from round 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.protocol import codecs
from fedvfm.server import state_folder, withdrawal
from fedvfm.server.coordinator import orders
from fedvfm.server.rounds import journal as journals
from fedvfm.state import checkpoint, state
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import locked_recipe
from fedvfm.trust import roster as rosters


@dataclass(frozen=True)
class Plan:
    """A rerun as it can be made.

    Attributes:
        of: hash of the recipe whose later rounds are made again.
        after: the last round that stands.
        locked: the recipe of the rerun, with its initial adapter.
        why: why it begins earlier than before the site came in; empty where it does not.
        again: recipes that went on from the one that is made again, and end with it.
    """

    of: str
    after: int
    locked: locked_recipe.LockedRecipe
    why: str
    again: tuple[str, ...]


def plan(where: state_folder.State, document: withdrawal.Withdrawal) -> Plan | None:
    """The rerun that takes the place of the present recipe; None where that has no part of the site.

    Raises:
        CheckpointError: if a checkpoint that is needed was changed.
    """
    firsts = {row.recipe: row.first for row in document.touched}
    recipe, again = where.about.recipe, list[str]()
    if recipe not in firsts:
        return None
    while firsts[recipe] == 0:  # it goes on from another recipe's adapter
        start, before = withdrawal.locked(where, recipe).recipe.start, recipe
        again.insert(0, recipe)
        earlier = {name: withdrawal.rounds_of(where, name) for name in firsts if name != before}
        recipe = next(name for name, rows in earlier.items() if any(row["fingerprint"] == start for row in rows))
    base = firsts[recipe] - 1
    after, adapter, why = _base(where, recipe, base)
    locked = withdrawal.locked(where, recipe)
    root = _root(where, recipe)
    own = locked.recipe.model_copy(
        update={
            "rerun": schema.Rerun(of=recipe, after=after),
            "start": adapter.fingerprint if after else root.recipe.start,
        }
    )
    values = {"hash": own.hash, "recipe": own, "initial": adapter.fingerprint, "version": locked_recipe.version()}
    return Plan(recipe, after, locked.model_copy(update=values).with_adapter(adapter), why, tuple(again))


def _base(where: state_folder.State, recipe: str, base: int) -> tuple[int, state.AdapterState, str]:
    """The latest round up to ``base`` that can be gone on from, its adapter, and why it is not ``base`` itself."""
    own, why = withdrawal.locked(where, recipe).recipe, ""
    if base and (own.personal.kind != "none" or own.codec != codecs.PLAIN):
        base, why = 0, "sites keep arrays of their own from round to round in this recipe"
    lines = {int(line["round"]): str(line["fingerprint"]) for line in withdrawal.rounds_of(where, recipe)}
    for number in range(base, 0, -1):
        path = checkpoint.path_of(where.run_path(recipe) / "checkpoints", number)
        if path.exists():
            adapter, _, _ = checkpoint.read(path)
            if adapter.fingerprint != lines[number]:
                raise errors.CheckpointError(
                    f"{path} is not the adapter the journal names for round {number}. Restore it from a backup"
                )
            return number, adapter, "" if number == base else f"the checkpoint of round {base} is not here any more"
    root = _root(where, recipe)
    path = where.recipe_path(root.hash).with_suffix(".safetensors")
    why = why or (f"the checkpoint of round {base} is not here any more" if base else "")
    return 0, root.with_adapter(checkpoint.read(path)[0], path).adapter, why


def _root(where: state_folder.State, recipe: str) -> locked_recipe.LockedRecipe:
    """The recipe whose initial adapter round 1 began with: of a rerun, the one that was first."""
    locked = withdrawal.locked(where, recipe)
    while locked.recipe.rerun is not None and locked.recipe.rerun.after:
        locked = withdrawal.locked(where, locked.recipe.rerun.of)
    return locked


def take_up(where: state_folder.State, planned: Plan) -> str:
    """Make a planned rerun the present recipe; its hash. Done again it changes nothing.

    Raises:
        ConfigError: if it is finished already.
        CheckpointError: if what stands was changed.
    """
    _seed(where, planned)
    orders.add_recipe(where, planned.locked, at_once=True)
    return planned.locked.hash


def _seed(where: state_folder.State, planned: Plan) -> None:
    """The rounds that stand, in the folder of the rerun: checkpoints first, then the journal, whole or not at all."""
    folder, before = where.run_path(planned.locked.hash), where.run_path(planned.of)
    path = folder / "journal.jsonl"
    if planned.after == 0 or (path.exists() and len(hash_chain.read(path)) >= planned.after):
        return
    storage.make_private(folder)
    lines = [line for line in withdrawal.rounds_of(where, planned.of) if int(line["round"]) <= planned.after]
    for number in sorted(journals.bases(lines) | {planned.after}):
        source = checkpoint.path_of(before / "checkpoints", number)
        if source.exists():
            adapter, kept, _ = checkpoint.read(source)
            checkpoint.save(folder / "checkpoints", number, adapter, kept, planned.locked.hash)
    withdrawn = {name for name, entry in where.sites().items() if entry.status == rosters.WITHDRAWN}
    head, text = hash_chain.ZERO, ""
    for line in lines:
        entry = hash_chain.linked(_copied(line, planned.locked.hash, withdrawn), head)
        head, text = str(entry["hash"]), text + hash_chain.canonical(entry) + "\n"
    storage.write_text(path, text)


def _copied(line: Mapping[str, Any], recipe: str, withdrawn: set[str]) -> dict[str, Any]:
    """A line of the journal for the rerun's: names the line it is, and holds no score of a site that withdrew."""
    kept = {key: value for key, value in line.items() if key not in ("prev", "hash", "recipe")}
    kept["validation"] = {name: row for name, row in line["validation"].items() if name not in withdrawn}
    return {"recipe": recipe, **kept, "copied": line["hash"]}


def choices(where: state_folder.State, site: str, folder: Path) -> list[str]:
    """What the coordinator's people can do, where the present recipe has a part of the site."""
    command = f'fedvfm server withdraw "{site}" --rerun --state {folder}'
    if where.finished(where.about.recipe):
        return [f"to make it: {command}"]
    return [f"rounds are paused. To make it: {command}", f"or to go on as it is: fedvfm server resume --state {folder}"]


def paused(where: state_folder.State, folder: Path) -> list[str]:
    """What keeps the rerun from its first round; nothing where nothing does."""
    where = state_folder.open_state(where.folder)
    hidden = where.lock().recipe.secure_aggregation is not None
    return [
        *([f"before: fedvfm server publish-roster --state {folder}"] if hidden else []),
        *([f"rounds are paused: fedvfm server resume --state {folder}"] if orders.read(where).paused else []),
    ]


def sentence(planned: Plan) -> str:
    """What it would be."""
    total = planned.locked.recipe.rounds
    why = f" ({planned.why})" if planned.why else ""
    text = f"a rerun makes rounds {planned.after + 1} to {total} of recipe {planned.of[:12]} again without it{why}"
    if planned.again:
        later = ", ".join(recipe[:12] for recipe in planned.again)
        text += f"; then 'fedvfm server extend' for what went on from it: {later}"
    return text
