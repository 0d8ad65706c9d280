"""A recipe in plain words, for the person who answers for a hospital's data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fedvfm.backbones import licences
from fedvfm.client.gate import policy
from fedvfm.config import licence, privacy, schema
from fedvfm.data import unlabelled
from fedvfm.secure_aggregation import shared_noise
from fedvfm.state import factors, groups
from fedvfm.trust import locked_recipe, roster_document, signed_documents

FEW = 4
"""Patients in a step, below which a person is warned."""
NEVER = (
    "images, masks, labels, values of tables, file names, patient names or numbers, and what the policy holds back; "
    "they stay on this machine"
)


def words(locked: locked_recipe.LockedRecipe, here: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Heading and sentence, row by row. Foreign text is shown with its control characters escaped.

    Args:
        locked: the recipe.
        here: what its privacy comes to at this site, in sentences; empty where that is not known.
    """
    recipe = locked.recipe
    rows = [
        ("recipe", locked.hash),
        ("task", _task(locked)),
        *((("sentences", recipe.words.describe(recipe.data.class_names)),) if recipe.words is not None else ()),
        ("backbone", _backbone(locked)),
        *((("licence", _licence(recipe.backbone)),) if locked.backbone_sha256 else ()),
        ("what trains", _trains(locked)),
        ("starts from", _start(locked)),
        ("how long", _rounds(locked)),
        ("how it learns", _learns(recipe)),
        ("sites", _sites(recipe)),
        *((("without labels", recipe.unlabelled.said),) if recipe.unlabelled is not None else ()),
        *((("slow sites", recipe.asynchronous.said),) if recipe.asynchronous is not None else ()),
        ("what images become", _contract(locked)),
        *((("what of your table is used", _table(recipe)),) if recipe.inputs.columns else ()),
        ("leaves at the start", _greeting(recipe)),
        ("leaves each round", _leaves(locked)),
        (
            "leaves at the end",
            "one word on the final adapter, which this site scores on its own test images: accepted, declined, pending",
        ),
        ("leaves with all", "length and hash of this site's audit log, so that neither end can rewrite its own unseen"),
        ("metrics that leave", _metrics(recipe)),
        ("never leaves", NEVER),
        ("privacy", _privacy(recipe)),
        *(("privacy here", one) for one in here),
        *((("coordinator sees", _hidden(recipe)),) if recipe.secure_aggregation is not None else ()),
        ("how updates join", f"rule {recipe.aggregation.rule}, weighted by {recipe.aggregation.weighting}"),
        *(
            (("numbers travel as", f"codec {recipe.codec}, differences, in both directions"),)
            if recipe.codec != "fp32"
            else ()
        ),
        ("made by", f"fedvfm {locked.version}"),
    ]
    return [(heading, signed_documents.shown(text)) for heading, text in rows]


def without_labels(recipe: schema.Recipe) -> str:
    """What a recipe comes to at a site of role "unlabelled", in words."""
    wrong = unlabelled.faults(recipe)
    if wrong:
        return f"REFUSES: {wrong[0]}"
    return (
        "trains without labels: on what the round's adapter is sure of on this site's own images. No score leaves or "
        "judges the final adapter here, since nothing is labelled; an adapter that is sure and wrong is not noticed"
    )


def to_json(
    locked: locked_recipe.LockedRecipe,
    verdicts: Sequence[policy.Verdict] | None,
    here: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The review for scripts; without a policy there is no verdict, without data nothing of privacy here."""
    return {
        "recipe": locked.hash,
        "words": dict(words(locked)),
        "privacy": here,
        "accepted": None if verdicts is None else all(one.accepted for one in verdicts),
        "rules": [vars(one) for one in verdicts or ()],
    }


def _hidden(recipe: schema.Recipe) -> str:
    secure = recipe.secure_aggregation
    if secure is None:
        return "this site's update, as it is"
    return (
        f"the sum of the updates of {recipe.min_sites} sites or more, and no single one, unless more than "
        f"{secure.colluders} of the other sites work together with it; metrics of evaluation, and what the sums of two "
        "rounds differ in, it sees as they are. The sites that may be in a sum stand in the roster document, which you "
        "approve beside the recipe: ask the people of those hospitals whether these are their keys"
    )


def roster_lines(
    documents: Sequence[roster_document.RosterDocument], approved: str, recipe: schema.Recipe
) -> list[tuple[str, str]]:
    """Heading and sentence of each roster document that came here, the newest last.

    Args:
        documents: as they came.
        approved: hash of the one that the standing approval of the recipe names.
        recipe: with secure aggregation.
    """
    rows = []
    for document in documents:
        standing = "approved here" if document.hash == approved else "not approved here"
        few = "; too few sites for this recipe" if len(document.sites) < recipe.min_sites else ""
        sites = ", ".join(f"{row.site} {row.spoken_key}" for row in document.sites)
        rows.append(("roster", f"{document.hash} of {document.created}, {standing}{few}: {sites}"))
    return rows or [("roster", "no roster document came here yet; a running client is sent it by the coordinator")]


def _greeting(recipe: schema.Recipe) -> str:
    train = "the number of images in train, val and test"
    if not _plain(recipe) or recipe.secure_aggregation is not None:
        train = "whether there are training images, the number of images in val and test"
    labelled = ", the names of the classes that this site labels" if recipe.task.partial_labels else ""
    labelled += ", the names of the channels that this site lacks" if recipe.data.optional_channels else ""
    labelled += ", whether this site has labels" if recipe.unlabelled is not None else ""
    return f"{train}{labelled}, and hashes that identify the backbone"


def _metrics(recipe: schema.Recipe) -> str:
    names = ", ".join(policy.leaving(recipe))
    if _plain(recipe):
        return names
    return f"{names}; from val and test patients who are not trained on, and outside epsilon"


def _plain(recipe: schema.Recipe) -> bool:
    return recipe.privacy.mechanism == privacy.NO_MECHANISM


def _privacy(recipe: schema.Recipe) -> str:
    own = recipe.privacy
    if own.mechanism == privacy.NO_MECHANISM:
        return "none: no differential privacy; the numbers can reveal facts about single training images"
    size = f"noise multiplier {own.noise_multiplier:g}" if own.epsilon is None else f"epsilon {own.epsilon:g} in all"
    said = f"{own.mechanism}: {size}, delta {own.delta:g}, clip {own.clip:g}"
    if own.mechanism == privacy.SITE_LEVEL:
        return (
            f"{said}; for what the coordinator makes of all updates, not metrics. It adds the noise: it sees this "
            "site's update without any, and must be trusted"
        )
    if own.mechanism in privacy.SHARED:
        return f"{said}; {shared(recipe)}"
    return (
        f"{said}; for each update that leaves, not metrics. It hides what one "
        f"{privacy.UNITS[own.mechanism]} adds, not about how many there are, unless [privacy] of the site's "
        "file has units"
    )


def shared(recipe: schema.Recipe) -> str:
    """What noise that the sites share hides, and whom it stands on."""
    unit = privacy.UNITS[recipe.privacy.mechanism]
    noise = shared_noise.of(recipe)
    share = "a part of the noise" if noise is None else f"1/sqrt({noise.honest}) of the noise"
    honest = "the other sites" if noise is None else f"{noise.honest} sites of each sum, this one among them,"
    return (
        f"for the sum of the sites' updates, not metrics. It hides one {unit}'s part in the sum. This site adds "
        f"{share}, so it stands on {honest} being honest and on secure aggregation: with fewer honest ones there is "
        "less noise, and this site's update without its masks would have only its own part"
    )


def _task(locked: locked_recipe.LockedRecipe) -> str:
    recipe, names = locked.recipe, locked.recipe.data.class_names
    target, listed = recipe.target, ", ".join(names)
    units = [f" {unit}" if unit else "" for unit in target.units or ("",) * len(names)]
    if target.kind == "cox":
        what = f"a risk that orders cases, from your table's columns {listed} (time, event)"
    elif target.kind == "survival":
        ends = ", ".join(f"{end:g}" for end in target.bins)
        what = f"the chance of no event up to {ends}{units[0]}, from your table's columns {listed} (time, event)"
    elif target.kind == "regression":
        ranges = zip(names, target.ranges, units, strict=True)
        numbers = ", ".join(f"{name} ({low:g} to {high:g}{unit})" for name, (low, high), unit in ranges)
        what = f"numbers, from your table's columns {numbers}"
    elif target.kind == "multi-label":
        what = f"{len(names)} labels, each there or not, from your table's columns {listed}"
    elif recipe.task.kind == "detection":
        what = f"boxes around {', '.join(names[1:])}, from your masks; the background is {names[0]}"
    else:
        what = f"{len(names)} {'grades, the lowest first' if target.kind == 'ordinal' else 'classes'}: {listed}"
    return f"{recipe.task.kind} of {what}"


def _table(recipe: schema.Recipe) -> str:
    """Columns, how they are standardised, and that no value of them leaves."""
    chosen = recipe.inputs
    units = [f" {unit}" if unit else "" for unit in chosen.units or ("",) * len(chosen.numbers)]
    numbers = [
        f"{name} ({low:g} to {high:g}{unit})"
        for name, (low, high), unit in zip(chosen.numbers, chosen.ranges, units, strict=True)
    ]
    words = [f"{name} ({', '.join(chosen.categories[name])})" for name in sorted(chosen.categories)]
    bare = "; cases of which your table says image = none are learned from by their row alone"
    bare = bare if chosen.images_missing else ""
    kept = (
        ""
        if recipe.privacy.mechanism != privacy.NO_MECHANISM
        else ("; the head learns from them, and with few patients an update can tell of single values")
    )
    return (
        f"columns {', '.join((*numbers, *words))}, beside each image or case; standardised by public numbers of the "
        f"recipe; no value and no mean of them leaves{bare}{kept}"
    )


def _backbone(locked: locked_recipe.LockedRecipe) -> str:
    name = locked.recipe.backbone.name
    if not locked.backbone_sha256:
        return f"{name}, {locked.backbone_parameters:,} numbers made from the seed; no pretrained weights"
    return (
        f"{name}, {locked.backbone_parameters:,} frozen numbers, weights sha256 {locked.backbone_sha256}; they are "
        "already here or fetched by you, and never change"
    )


def _licence(backbone: schema.BackboneConfig) -> str:
    """Who says which terms of use the weights are under, and what they forbid."""
    stated, known = licence.Licence.of(backbone.licence or "", backbone.licence_limits), licences.known(backbone.name)
    both = stated + known
    if not both:
        return "neither the recipe nor this machine says the terms of use of the weights; read their publisher's"
    said = [f"{terms}, {who}" for terms, who in ((stated, "says the recipe"), (known, "as known here")) if terms]
    if not known:
        said.append("nothing is known of it here")
    return "; ".join([*said, *(f"{limit}: {licence.LIMITS[limit]}" for limit in both.limits)])


def _trains(locked: locked_recipe.LockedRecipe) -> str:
    sizes: Counter[str] = Counter()
    for spec in locked.manifest:
        sizes[spec.group] += spec.size
    parts = ", ".join(f"{size:,} in {group}" for group, size in sorted(sizes.items()))
    kept = f"what is in {factors.RESIDUAL} the coordinator fills, it trains nowhere" if sizes[factors.RESIDUAL] else ""
    ways = factors.describe(locked.recipe.adapter.factors), groups.describe(locked.recipe), kept
    some = "; ".join(filter(None, ways))
    whole = f"adapter '{locked.recipe.adapter.kind}' and head: {locked.manifest.parameters:,} numbers ({parts})"
    return f"{whole}; {some}" if some else whole


def _start(locked: locked_recipe.LockedRecipe) -> str:
    start, rerun = locked.recipe.start, locked.recipe.rerun
    if rerun is not None:
        again = f"a hospital withdrew from recipe {rerun.of[:12]}; rounds {rerun.after + 1} to {locked.recipe.rounds}"
        before = f"adapter {start}, which its round {rerun.after} left" if rerun.after else "the seed"
        return f"{start if start and not rerun.after else before}: {again} are made again without it"
    if start is None:
        return "the seed"
    held = "round 1 is held to it, unless this site has a rank of its own; later rounds start from all sites' work"
    return f"what an earlier recipe trained: adapter {start}; {held}"


def _rounds(locked: locked_recipe.LockedRecipe) -> str:
    recipe = locked.recipe
    passes = recipe.optimiser.local_epochs
    often = "never validated" if not recipe.evaluation.every else f"validated every {_times(recipe.evaluation.every)}"
    minutes = recipe.optimiser.round_minutes
    most = f", {minutes:g} minutes at most" if minutes else ""
    most += ", and as long again for what stays here" if recipe.personal.kind in groups.BESIDE else ""
    return (
        f"{recipe.rounds} rounds of {passes} {'pass' if passes == 1 else 'passes'} over this site's training images"
        f"{most}, {often}, tested once at the end"
    )


def _learns(recipe: schema.Recipe) -> str:
    own = recipe.optimiser
    said = f"{own.name}, learning rate {own.learning_rate:g}, steps of {own.batch_size} images"
    if own.control_variates:
        said += (
            "; plain steps, each corrected by the coordinator (SCAFFOLD): from what this site sends it computes the "
            "mean gradient over this site's images, and keeps it"
        )
    if not _plain(recipe) or own.batch_size >= FEW:
        return said
    return f"{said}. A step sees few patients: the fewer, and the fewer steps, the more of each shows in the update"


def _sites(recipe: schema.Recipe) -> str:
    if recipe.min_sites == 1:
        return "no promise of how many sites an adapter is made of; with few, each one's update shows in it"
    if recipe.secure_aggregation is not None:
        return f"{recipe.min_sites} or more of the roster document, or no sum is opened: this site's client checks it"
    return (
        f"the coordinator promises that no adapter is made of fewer than {recipe.min_sites} sites; it sees each "
        "one's update, and nothing here can check the promise"
    )


def steps_here(recipe: schema.Recipe, subjects: int, images: int) -> str:
    """What a round at this site is made of, for its people; nothing of it leaves."""
    most = min(recipe.optimiser.batch_size, images, subjects)
    steps = policy.steps(recipe, images)
    said = f"{subjects} patients, {images} images, {steps} steps a round of {most} patients or fewer"
    few = _plain(recipe) and (most < FEW or subjects < schema.PolicyConfig().min_train_units)
    return f"{said}; warning: so few that single patients may show in an update" if few else said


def _times(every: int) -> str:
    return "round" if every == 1 else f"{every} rounds"


def _contract(locked: locked_recipe.LockedRecipe) -> str:
    data = locked.recipe.data
    size, unit = " x ".join(map(str, data.patch_size)), "voxels" if data.depth else "pixels"
    how = "resized to" if data.fit == "resize" else "cut into pieces of"
    if data.spacing:
        how = f"resampled to voxels of {' x '.join(f'{side:g}' for side in data.spacing)} mm, {how}"
    return f"modality {data.modality}; {how} {size} {unit}; intensity {data.intensity}"


def _leaves(locked: locked_recipe.LockedRecipe) -> str:
    left = groups.told(locked.manifest, locked.recipe)
    if locked.recipe.secure_aggregation is not None:
        beside = "the number of training images and the loss" if _plain(locked.recipe) else "that it is one update"
        return (
            f"{left}, masked, in 8 bytes each; beside them, masked too, {beside}; and sealed shares of keys for the "
            "other sites"
        )
    if not _plain(locked.recipe):
        return f"{left}, and nothing else that is computed from training images: no loss, no count"
    return f"{left}, how many training images they come from, and the metrics below"
