"""``fedvfm doctor client``: whether a site is ready, and what to do where it is not. Changes and sends nothing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedvfm import errors
from fedvfm.client import site_file, state_folder, weights
from fedvfm.client.gate import policy, split_pin
from fedvfm.config import batch, schema
from fedvfm.doctor import host, network, windows
from fedvfm.report import finding
from fedvfm.runtime import processes
from fedvfm.trust import keys, locked_recipe

if TYPE_CHECKING:
    from fedvfm.client import privacy_report
    from fedvfm.data import sample as samples

RUN = "run"
CHILDREN = ("supernode", "executor")
BASE_BYTES = 256 * host.MIB
"""Logs, and what Flower keeps."""
KEPT = 15
"""Adapters of a recipe: two that came, the update that left, residuals and personal arrays of three rounds each, the
final one as it came and with the site's own arrays, and of all but these the file that is being written."""


def examine(folder: Path, settings: Path, *, data: bool = True, limit: int = 0) -> list[finding.Row]:
    """All rows of a site.

    Args:
        folder: the state folder.
        settings: the site's own file.
        data: whether to look at the data too, which takes longest.
        limit: of samples to look at, 0 for all.
    """
    try:
        site = site_file.read_site(settings)
    except errors.ConfigError as error:
        return [finding.blocker("state", str(error), f"mend {settings}")]
    try:
        where = state_folder.open_state(folder)
        approved = weights.approved(where)
    except errors.FedvfmError as error:
        return [finding.blocker("state", str(error), "name the folder with --state, or run: fedvfm client join")]
    rows = [_names(where, site, settings)]
    rows += finding.caught("files", lambda: [host.private(folder)])
    rows += finding.caught("files", lambda: _key(where))
    rows += finding.caught("reach", lambda: network.examine(network.route(where.about.address), where.authority))
    rows.append(network.settings())
    rows += windows.examine(folder)
    rows += finding.caught("disk", lambda: [host.disk(folder, _need(approved))])
    rows += finding.caught("versions", lambda: host.versions({f"recipe {r.hash[:12]}": r.version for r in approved}))
    rows += finding.caught("approval", lambda: [_approval(where, approved)])
    listed, about_data = _data(settings, site, approved, limit) if data else (None, [])
    for recipe in approved:
        rows += _recipe(where, site, recipe, settings, listed if recipe is approved[-1] else None)
    if site.batch is None:
        rows += finding.caught("device", lambda: _device(site, approved))
    else:
        rows += finding.caught("batch", lambda: _batch(site.batch))
    rows += [_backbone(recipe) for recipe in approved]
    rows.append(host.alive(children(where)))
    return rows + about_data


def children(where: state_folder.State) -> dict[str, int | None]:
    """The site's processes and their numbers; None for one that does not run."""
    return {name: processes.running(processes.pid_path(where.folder / RUN, name)) for name in CHILDREN}


def alive(where: state_folder.State) -> Mapping[str, bool]:
    """For the health probe: which of them run."""
    return {name: pid is not None for name, pid in children(where).items()}


def _names(where: state_folder.State, site: schema.SiteConfig, settings: Path) -> finding.Row:
    if site.name != where.about.site:
        told = f"{settings} says name = '{site.name}', this state folder joined as '{where.about.site}'"
        return finding.blocker("state", told, f'write name = "{where.about.site}", or name the other --state')
    return finding.ok("state", f"site '{site.name}' of federation '{where.about.federation}'")


def _key(where: state_folder.State) -> list[finding.Row]:
    public = keys.public_text(keys.read_private(where.key))
    if public != where.public_key.read_text().strip():
        return [
            finding.blocker("files", f"{where.key} and {where.public_key} are no pair", "restore both from one backup")
        ]
    return []


def _need(approved: Sequence[locked_recipe.LockedRecipe]) -> int:
    """Logs, and of each recipe as many arrays of an adapter's size as lie there at most, however many rounds it has."""
    return BASE_BYTES + sum(4 * spec.size * KEPT for one in approved for spec in one.manifest)


def _approval(where: state_folder.State, approved: Sequence[locked_recipe.LockedRecipe]) -> finding.Row:
    waiting = [one for one in where.seen() if one not in {each.hash for each in approved}]
    if waiting:
        shown = ", ".join(one[:12] for one in waiting)
        remedy = f"fedvfm client review {waiting[0][:12]}, then fedvfm client approve {waiting[0][:12]}, or leave it"
        remedy = state_folder.named(remedy, where.folder)
        return finding.warning("approval", f"not approved: recipe {shown}", remedy)
    if not approved:
        return finding.warning("approval", "no recipe is approved", "wait for one, review it and approve it")
    return finding.ok("approval", "approved: recipe " + ", ".join(one.hash[:12] for one in approved))


def _recipe(
    where: state_folder.State,
    site: schema.SiteConfig,
    recipe: locked_recipe.LockedRecipe,
    settings: Path,
    listed: samples.Source | None,
) -> list[finding.Row]:
    """What the site's policy, split and budget say of an approved recipe; ``listed`` is the data, where it is known."""
    from fedvfm.client import privacy_report

    judged, uncounted = privacy_report.Judged(recipe.recipe, site.policy, policy.Facts.of(recipe)), None
    try:
        judged = privacy_report.judge(recipe, site, listed=listed, examined=listed is not None)
    except errors.FedvfmError as error:
        uncounted = error
    charged = finding.caught("privacy", lambda: _privacy(site, judged, uncounted, settings))
    return [_policy(recipe, judged), *_split(where, site, recipe, settings), *charged]


def _policy(recipe: locked_recipe.LockedRecipe, judged: privacy_report.Judged) -> finding.Row:
    verdicts = judged.verdicts or ()
    wrong = [f"{one.rule} (asked {one.asked}; allowed {one.allowed})" for one in verdicts if not one.accepted]
    if wrong:
        remedy = f"fedvfm client review {recipe.hash[:12]} --print-policy shows the [policy] that accepts it"
        told = f"approved recipe {recipe.hash[:12]} is refused by the policy: {'; '.join(wrong)}"
        return finding.blocker("policy", told, remedy)
    return finding.ok("policy", f"accepts recipe {recipe.hash[:12]}")


def _split(
    where: state_folder.State, site: schema.SiteConfig, recipe: locked_recipe.LockedRecipe, settings: Path
) -> list[finding.Row]:
    """Whether a recipe that began here is split as it was."""
    try:
        split_pin.require(where, split_pin.of(recipe.hash, site))
    except errors.PolicyRefused as refusal:
        remedy = f"mend [privacy] and [split] of {settings}, or withdraw the approval"
        return [finding.blocker("split", refusal.detail, remedy)]
    return []


def _privacy(
    site: schema.SiteConfig, judged: privacy_report.Judged, uncounted: errors.FedvfmError | None, settings: Path
) -> list[finding.Row]:
    """Whether the rounds of a recipe with a mechanism can be charged, and what they come to here."""
    from fedvfm.client import privacy_report
    from fedvfm.client.gate import privacy_charge

    try:
        budget = privacy_charge.require(judged.recipe, site.privacy)
    except errors.PolicyRefused as refusal:
        return [finding.blocker("privacy", refusal.detail, f"mend [privacy] of {settings}, or withdraw the approval")]
    if budget is None:
        return []
    if uncounted is not None:
        raise uncounted
    found = judged.here
    if found is None:
        return [finding.blocker("privacy", "there is no training image to draw from", f"fedvfm data check {settings}")]
    told = "; ".join(privacy_report.words(found))
    if found.waiting:
        return [finding.blocker("privacy", told, "fedvfm ledger reconcile --against a receipt or the other end's log")]
    if not found.fits:
        return [
            finding.warning("privacy", told, "raise the recipe's noise, ask for fewer rounds, or decide on the budget")
        ]
    return [finding.ok("privacy", told)]


def _device(site: schema.SiteConfig, approved: Sequence[locked_recipe.LockedRecipe]) -> list[finding.Row]:
    """Device and memory, and what each way of asking for a precision comes to here."""
    from fedvfm.client.readiness import resources  # torch takes its time
    from fedvfm.model import precision

    found, wrong = resources.look(site.device)
    severity = {"blocker": finding.BLOCKER, "warning": finding.WARNING}
    rows = [
        finding.Row("device", severity.get(one.severity, finding.WARNING), one.problem, one.remedy) for one in wrong
    ]
    name = f" ({found.device_name})" if found.device_name else ""
    rows = rows or [finding.ok("device", f"{found.device}{name}, {found.memory:,.0f} MiB of memory free")]
    ways = sorted({one.recipe.precision for one in approved} or {"auto"})
    return rows + [finding.ok("precision", f"{way}: {precision.words(way, found.device)}") for way in ways]


def _batch(settings: batch.BatchConfig | None) -> list[finding.Row]:
    """Whether jobs can be given: the shared folder is this user's alone, and the commands are there. None is given."""
    from fedvfm.client.batch import spool

    if settings is None:
        return []
    spool.require_private(Path(settings.spool))
    commands = {key: getattr(settings, key)[0] for key in ("submit", "query", "cancel")}
    lacking = [f"batch.{key} = {name}" for key, name in commands.items() if shutil.which(name) is None]
    if lacking:
        problem = f"no such program: {', '.join(lacking)}"
        return [finding.blocker("batch", problem, "install the scheduler's commands here, or name their whole paths")]
    shown = (
        f"jobs go to {settings.submit[0]} through {settings.spool}; device and memory are those of the compute nodes"
    )
    return [finding.ok("batch", shown)]


def _backbone(recipe: locked_recipe.LockedRecipe) -> finding.Row:
    name, fault = recipe.recipe.backbone.name, weights.fault(recipe)
    if fault is not None:
        return finding.blocker("backbone", fault.problem, fault.remedy)
    if not recipe.backbone_sha256:
        return finding.ok("backbone", f"'{name}' is made from the recipe's seed")
    return finding.ok("backbone", f"'{name}', sha256 {recipe.backbone_sha256[:12]} as the recipe pins")


def _data(
    settings: Path, site: schema.SiteConfig, approved: Sequence[locked_recipe.LockedRecipe], limit: int
) -> tuple[samples.Source | None, list[finding.Row]]:
    """What ``fedvfm data check`` finds, in a line each; its own page says more. And the data, where it is whole."""
    from fedvfm.client.readiness import check, offline

    try:
        with offline.closed():
            made = check.check(site_file.read(site, approved[-1].recipe if approved else None), limit=limit)
    except errors.FedvfmError as error:
        return None, [finding.blocker("data", str(error), f"fedvfm data check {settings}")]
    severity = {"blocker": finding.BLOCKER, "warning": finding.WARNING}
    rows = [
        finding.Row("data", severity[one.severity], f"{one.code}: {one.problem}", one.remedy)
        for one in made.findings
        if one.severity in severity
    ]
    number = 0 if made.seen is None else len(made.seen.samples)
    return made.listed, rows or [finding.ok("data", f"{number:,} samples, no blocker and no warning")]
