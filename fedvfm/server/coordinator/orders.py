"""The coordinator steers: pause, resume, finish early, extend, the next recipe, a site dropped or taken in again.

Orders lie in ``steering.json`` of the state folder, written whole or not at all. The round loop reads them between two
rounds, so the round in hand is never lost, and they outlast every process. They hold whether the server runs or not.

**Extending.** The number of rounds is part of what the sites approved, so more of them are another recipe: the same
but for ``rounds`` (that many more) and ``start`` (the last adapter of the one before). Its hash is new, each site is
asked for its approval anew, rounds and the learning rate's schedule count from 1, and what the server's own step keeps
(momentum) begins empty. A federation that still runs is extended when it has come to its end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.server import state_folder
from fedvfm.state import checkpoint
from fedvfm.storage import storage
from fedvfm.trust import approvals, locked_recipe, signed_documents
from fedvfm.trust import roster as rosters

FILE = "steering.json"
MAX_FOLLOWING = 100


class Order(schema.Strict):
    """Who ordered something, and when."""

    who: Annotated[str, Field(max_length=200)]
    time: signed_documents.Time


class Finish(Order):
    """To end a recipe after the round in hand.

    Attributes:
        taken: the final test has begun, so the order can be taken back no more, unless that test fails.
    """

    recipe: schema.Sha256
    taken: bool = False


class Extend(Order):
    """To go on from a recipe's last adapter for some rounds more."""

    recipe: schema.Sha256
    rounds: Annotated[int, Field(ge=1, le=100_000)]


class Orders(schema.Strict):
    """What ``steering.json`` says.

    Attributes:
        paused: no round begins while it stands.
        finish, extend: of the recipe they name and no other.
        following: recipes to take up when the present one is finished, in this order.
    """

    format: Literal["fedvfm-steering-1"] = "fedvfm-steering-1"
    paused: Order | None = None
    finish: Finish | None = None
    extend: Extend | None = None
    following: Annotated[tuple[schema.Sha256, ...], Field(strict=False, max_length=MAX_FOLLOWING)] = ()

    def finishes(self, recipe: str) -> bool:
        """Whether this recipe is to end after the round in hand."""
        return self.finish is not None and self.finish.recipe == recipe

    def extends(self, recipe: str) -> int:
        """By how many rounds this recipe is to be extended when it is finished."""
        return self.extend.rounds if self.extend is not None and self.extend.recipe == recipe else 0


def path_of(where: state_folder.State) -> Path:
    """The file of the orders."""
    return where.folder / FILE


def read(where: state_folder.State) -> Orders:
    """The orders that stand; none if there is no file.

    Raises:
        TrustError: if the file is not of the known form.
    """
    path = path_of(where)
    return signed_documents.read(path, Orders, "orders") if path.exists() else Orders()


@contextlib.contextmanager
def _changing(where: state_folder.State) -> Iterator[Callable[[Orders], None]]:
    """The only right to change orders and the present recipe, among all processes."""
    with storage.exclusive(path_of(where)):
        yield lambda orders: (signed_documents.write(path_of(where), orders), None)[1]


def _order() -> dict[str, Any]:
    return {"who": approvals.who(), "time": signed_documents.stamp(signed_documents.now())}


def _refuse(verb: str, fault: str) -> errors.ConfigError:
    return errors.ConfigError(f"server {verb}", [fault])


def pause(where: state_folder.State) -> Order:
    """Let no further round begin; an order that stands is kept."""
    with _changing(where) as write:
        orders = read(where)
        if orders.paused is not None:
            return orders.paused
        made = Order(**_order())
        where.audit.record("steered", kind="pause")
        write(orders.model_copy(update={"paused": made}))
        return made


def resume(where: state_folder.State) -> bool:
    """Let rounds begin again; whether they did not."""
    with _changing(where) as write:
        orders = read(where)
        if orders.paused is None:
            return False
        where.audit.record("steered", kind="resume")
        write(orders.model_copy(update={"paused": None}))
        return True


def finish(where: state_folder.State) -> Finish:
    """End the present recipe after the round in hand, as if it were the last: final test, adapter, evaluation.

    A pause ends with it. Where no round was finished yet, the first one is.

    Raises:
        ConfigError: if it is finished already.
    """
    with _changing(where) as write:
        where = state_folder.open_state(where.folder)
        recipe, orders = where.about.recipe, read(where)
        if where.finished(recipe):
            raise _refuse("finish", f"recipe {recipe[:12]} is finished already")
        if orders.finish is not None and orders.finish.recipe == recipe:
            return orders.finish
        made = Finish(recipe=recipe, **_order())
        where.audit.record("steered", kind="finish", recipe=recipe)
        write(orders.model_copy(update={"finish": made, "paused": None}))
        return made


def unfinish(where: state_folder.State) -> bool:
    """Take :func:`finish` back while the round in hand runs, or sites are waited for; whether it was ordered.

    A pause that ended with the order does not begin again.

    Raises:
        ConfigError: if the final test has begun, or is over.
    """
    with _changing(where) as write:
        where = state_folder.open_state(where.folder)
        recipe, orders = where.about.recipe, read(where)
        late = "is finished already" if where.finished(recipe) else "is at its final test"
        if where.finished(recipe) or (orders.finish is not None and orders.finishes(recipe) and orders.finish.taken):
            raise _refuse("finish --undo", f"recipe {recipe[:12]} {late}. For more rounds: fedvfm server extend")
        if not orders.finishes(recipe):
            return False
        where.audit.record("steered", kind="finish-undone", recipe=recipe)
        write(orders.model_copy(update={"finish": None}))
        return True


def take_finish(where: state_folder.State, recipe: str) -> bool:
    """Turn to the final test because it was ordered; False if the order was taken back meanwhile."""
    with _changing(where) as write:
        orders = read(where)
        if orders.finish is None or not orders.finishes(recipe):
            return False
        if not orders.finish.taken:
            write(orders.model_copy(update={"finish": orders.finish.model_copy(update={"taken": True})}))
        return True


def untake_finish(where: state_folder.State, recipe: str) -> None:
    """Let the order be taken back again, as the final test has failed."""
    with _changing(where) as write:
        orders = read(where)
        if orders.finish is not None and orders.finishes(recipe) and orders.finish.taken:
            write(orders.model_copy(update={"finish": orders.finish.model_copy(update={"taken": False})}))


def extend(where: state_folder.State, rounds: int) -> str:
    """Go on for ``rounds`` rounds more; see the head of this module.

    Returns: the hash of the new recipe, or empty if that is made when the present one is finished.

    Raises:
        ConfigError: if that is no number of rounds.
        CheckpointError: if the last adapter is damaged.
    """
    if not 1 <= rounds <= 100_000:
        raise _refuse("extend", f"--rounds {rounds}: from 1 to 100000")
    with _changing(where) as write:
        where = state_folder.open_state(where.folder)
        made = Extend(recipe=where.about.recipe, rounds=rounds, **_order())
        where.audit.record("steered", kind="extend", recipe=made.recipe, round=rounds)
        orders = read(where).model_copy(update={"extend": made})
        write(orders)
        return _settle(where, write) if where.finished(made.recipe) else ""


def add_recipe(where: state_folder.State, locked: locked_recipe.LockedRecipe, *, at_once: bool = False) -> bool:
    """Keep a further recipe and take it up: now if the present one is finished, else when it is, or ``at_once``.

    A recipe that is put aside so keeps its rounds; adding it again takes it up where it was. The sites are told over
    TLS when it begins, and each answers only after its own approval.

    Returns: whether it is the present one now.

    Raises:
        CheckpointError: without the initial adapter.
        ConfigError: if it is finished, or waits already among too many.
    """
    if locked.recipe.start not in (None, locked.initial):
        raise errors.CheckpointError("the locked recipe starts from another adapter than the one it names")
    with _changing(where) as write:
        where = state_folder.open_state(where.folder)
        orders, recipe = read(where), locked.hash
        if where.finished(recipe):
            raise _refuse("recipe", f"recipe {recipe[:12]} is finished. To go on from it: fedvfm server extend")
        if not where.recipe_path(recipe).exists():
            state_folder.keep_recipe(where, locked)
        if recipe == where.about.recipe:
            return True
        if at_once or where.finished(where.about.recipe):
            write(_without(orders, recipe))
            _turn_to(where, recipe)
            return True
        if recipe not in orders.following:
            if len(orders.following) >= MAX_FOLLOWING:
                raise _refuse("recipe", f"{MAX_FOLLOWING} recipes wait already")
            where.audit.record("steered", kind="recipe-waits", recipe=recipe)
            write(orders.model_copy(update={"following": (*orders.following, recipe)}))
        return False


def settle(where: state_folder.State) -> state_folder.State:
    """If the present recipe is finished, turn to what was ordered to follow it; the state folder as it is then."""
    with _changing(where) as write:
        where = state_folder.open_state(where.folder)
        if where.finished(where.about.recipe):
            _settle(where, write)
    return state_folder.open_state(where.folder)


def _settle(where: state_folder.State, write: Callable[[Orders], None]) -> str:
    """The recipe that follows the present, finished one, made the present one; empty if none does.

    Orders are taken off last: what a crash leaves half done is done again, to the same end.
    """
    orders, recipe = read(where), where.about.recipe
    more = orders.extends(recipe)
    if more:
        following = _extended(where, more)
        if not where.finished(following):
            _turn_to(where, following)
        write(_without(orders, following).model_copy(update={"extend": None, "finish": None}))
        return following
    waiting = [one for one in orders.following if one != recipe and not where.finished(one)]
    if waiting:
        _turn_to(where, waiting[0])
    if orders.following:
        write(orders.model_copy(update={"following": tuple(waiting[1:]), "finish": None}))
    return waiting[0] if waiting else ""


def _without(orders: Orders, recipe: str) -> Orders:
    return orders.model_copy(update={"following": tuple(one for one in orders.following if one != recipe)})


def _turn_to(where: state_folder.State, recipe: str) -> None:
    """Make a kept recipe the present one. The record comes first; without the file after it, it is made again."""
    where.audit.record("steered", kind="recipe", recipe=recipe)
    signed_documents.write(where.folder / state_folder.ABOUT, where.about.model_copy(update={"recipe": recipe}))


def _extended(where: state_folder.State, rounds: int) -> str:
    """Keep the recipe that goes on from the present one's last adapter."""
    last, _, _ = checkpoint.read(where.run_path(where.about.recipe) / "adapter.safetensors")
    before = where.lock()
    recipe = before.recipe.model_copy(update={"rounds": rounds, "start": last.fingerprint})
    made = before.model_copy(
        update={"hash": recipe.hash, "recipe": recipe, "initial": last.fingerprint, "version": locked_recipe.version()}
    )
    if not where.recipe_path(made.hash).exists():
        state_folder.keep_recipe(where, made.with_adapter(last))
    return made.hash


def drop(where: state_folder.State, site: str) -> rosters.Entry:
    """Ask a site nothing more: it withdrew, or is not wanted now. Its entry stays, its key may come back.

    Unlike a revoked site it can be taken in again with :func:`readmit`, without a new key. The round in hand does not
    wait for it; what was admitted of it before counts.

    Raises:
        TrustError: if it is not approved.
    """
    entry = where.roster.drop(site, signed_documents.now())
    where.audit.record("steered", kind="drop", site=site, key=entry.key_fingerprint)
    return entry


def readmit(where: state_folder.State, site: str) -> rosters.Entry:
    """Take a dropped site in again, at the next round.

    Raises:
        TrustError: if it was not dropped.
    """
    entry = where.roster.readmit(site, signed_documents.now())
    where.audit.record("steered", kind="readmit", site=site, key=entry.key_fingerprint)
    return entry


def told(orders: Orders, recipe: str) -> dict[str, Any]:
    """What ``server status`` says of the orders."""
    return {
        "paused": None if orders.paused is None else orders.paused.model_dump(),
        "finishing": orders.finishes(recipe),
        "extended_by": orders.extends(recipe),
        "following": list(orders.following),
    }
