"""The hospital's own file: read, checked against the recipe, and turned into splits of its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvfm import errors, seeding
from fedvfm.config import privacy, schema
from fedvfm.config import survey as surveys
from fedvfm.data import bags, channels, columns, defect, input_rows, labels, partial_labels, unlabelled
from fedvfm.data import sample as samples
from fedvfm.data.partition import splits as splitting
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import table as sources
from fedvfm.privacy import records
from fedvfm.survey import collection
from fedvfm.trust import recipes

if TYPE_CHECKING:
    from fedvfm.model import adapted_model

TEST_SHARE_NEEDED = (
    "Before the first round raise split.test_share (0.25 where it is left out), or give the table a column 'split'; "
    "val_share may be 0"
)
"""What helps where no share of the patients is for testing, and each is drawn alone."""


@dataclass(frozen=True)
class Own:
    """A hospital's settings, and the recipe it would train.

    Attributes:
        site: its file, with absolute paths.
        recipe: the recipe, or None where none was given.
        shapes: its model on the meta device.
    """

    site: schema.SiteConfig
    recipe: schema.Recipe | None = None
    shapes: adapted_model.AdaptedModel | None = None


def read(settings: Path | schema.SiteConfig, recipe: Path | schema.Recipe | None = None) -> Own:
    """A site's settings and the recipe they name, if it can be trained with here; ``recipe`` is taken in its place.

    Raises:
        ConfigError: listing every fault of form, names and parameters of either file.
        TrustError: if a locked recipe or an invite is not of its form.
        WeightsError: if the backbone's shapes are not known on this machine.
    """
    site = read_site(settings) if isinstance(settings, Path) else settings
    asked = recipe or (None if site.recipe is None else Path(site.recipe))
    if asked is None:
        return Own(site)
    chosen = recipes.written(asked) if isinstance(asked, Path) else asked
    from fedvfm.model import adapted_model  # torch is loaded only once the file has its form

    shapes, faults = adapted_model.examine(chosen)
    if faults:
        raise errors.ConfigError(str(asked) if isinstance(asked, Path) else "recipe", faults)
    return Own(site, chosen, shapes)


def read_site(path: Path, joined: str | None = None, data: bytes | None = None) -> schema.SiteConfig:
    """A site's file alone, its paths made absolute; ``data`` is its content, where that was read before.

    Raises:
        ConfigError: listing every fault, or if it names another site than the one that ``joined``.
    """
    site = _site(schema.read_toml(path, data), path)
    if joined is not None and site.name != joined:
        raise errors.ConfigError(str(path), [f"name = '{site.name}': this site joined as '{joined}'"])
    return site


def read_policy(path: Path) -> schema.SiteConfig | schema.PolicyConfig:
    """A site's file, or the policy of one that holds nothing else.

    Raises:
        ConfigError: listing every fault.
    """
    values = schema.read_toml(path)
    if set(values) - {"policy"}:
        return _site(values, path)
    table = values.get("policy", {})
    if not isinstance(table, dict):
        raise errors.ConfigError(str(path), ["policy: must be a table: [policy]"])
    return schema.parse(schema.PolicyConfig, table, f"{path}, [policy]")


def _site(values: Mapping[str, Any], path: Path) -> schema.SiteConfig:
    site = schema.parse(schema.SiteConfig, values, str(path))
    name = site.data.source.partition(":")[0]
    if name not in sources.TABLE:
        raise errors.ConfigError(str(path), [f"data.source: {sources.TABLE.fault(name)}"])
    if faults := _faults(site):
        raise errors.ConfigError(str(path), faults)

    def beside(other: str | None) -> str | None:
        return None if other is None else str(path.absolute().parent / Path(other).expanduser())

    changes: dict[str, Any] = {"recipe": beside(site.recipe)}
    options = dict(site.data.options)
    if site.without_labels and name == "folder":
        options.setdefault("layout", "images")
    changes["data"] = site.data.model_copy(update={"path": beside(site.data.path), "options": options})
    if site.privacy is not None:
        changes["privacy"] = site.privacy.model_copy(update={"ledger": beside(site.privacy.ledger)})
    return site.model_copy(update=changes)


def _faults(site: schema.SiteConfig) -> list[str]:
    """What does not go with training in batch jobs, or without labels."""
    wrong = []
    if site.batch is not None and site.data.options.get("patients") == "hash":
        wrong.append(
            "batch: data.options.patients = 'hash' needs a key, and no key reaches a compute node; give patients.csv "
            "(id,patient) instead"
        )
    if site.without_labels and (site.policy.final.max_drop is not None or site.policy.final.min_score is not None):
        wrong.append(
            "role = 'unlabelled': policy.final.min_score and max_drop need scores, and nothing is labelled here; use "
            "policy.final.accept = 'ask' or 'always'"
        )
    if site.batch is not None and site.policy.final.max_drop is not None:
        wrong.append(
            "batch: policy.final.max_drop scores this site's own update on the client's machine, which computes "
            "nothing; use min_score, or accept = 'ask'"
        )
    return wrong


@dataclass(frozen=True)
class Splits:
    """One site's samples in their splits.

    Attributes:
        parts: samples by split.
        torn: samples of patients for whom the data prescribes several splits; they are in ``train``.
    """

    parts: dict[str, list[samples.Sample]]
    torn: tuple[samples.Sample, ...]


def belonging(site: schema.SiteConfig, everything: Sequence[samples.Sample]) -> list[samples.Sample]:
    """The samples of the natural sites that the hospital includes, or all."""
    return [one for one in everything if not site.include or one.site in site.include]


def split(site: schema.SiteConfig, own: Sequence[samples.Sample], source: object = None) -> Splits:
    """Train, val and test: as the data prescribes, else drawn by patients under the site's own seed.

    The draw depends on the site's name, its split settings and its samples, so that it is the same for every recipe
    that cuts volumes in the same plane; one for cases draws otherwise than one for images. Where the site's file has
    ``[privacy]`` every patient is drawn alone: there one patient more must not move another one between train and test.

    Args:
        site: the site's file.
        own: its samples.
        source: where they come from; see :func:`fedvfm.privacy.records.stable`.
    """
    prescribed: dict[str, set[str]] = {}
    for one in own:
        if one.split in splitting.SPLITS:
            prescribed.setdefault(splitting.group_of(one), set()).add(one.split)
    torn = {group for group, names in prescribed.items() if len(names) > 1}
    settled = [_settled(one, torn) for one in own]
    partition = schema.PartitionConfig(val_share=site.split.val_share, test_share=site.split.test_share)
    if site.privacy is None:
        drawn = splitting.split(site.name, settled, partition, seeding.stream(site.split.seed, site.name, "split"))
    else:
        drawn = splitting.split_alone(
            site.name, settled, partition, site.split.seed, lambda one: records.group(one, source)
        )
    # By id, as in a simulation: another order would be another order of training, and other bits.
    drawn = {name: sorted(part, key=lambda one: one.id) for name, part in drawn.items()}
    return Splits(drawn, tuple(one for one in own if splitting.group_of(one) in torn))


def require_no_skipping(site: schema.SiteConfig, recipe: schema.Recipe | None) -> None:
    """Refuse ``[data] unreadable = "skip"`` where privacy is counted.

    Who is trained on must not hang on the state of a file.

    Raises:
        ConfigError: saying so.
    """
    private = site.privacy is not None or (recipe is not None and recipe.privacy.mechanism != privacy.NO_MECHANISM)
    if private and site.data.unreadable == "skip":
        raise errors.ConfigError(
            f"site '{site.name}'",
            [
                'data.unreadable = "skip" is not for a site with [privacy] or under a mechanism; repair or remove the '
                "files"
            ],
        )


def hospital(
    site: schema.SiteConfig, recipe: schema.Recipe, listed: samples.Source | None = None
) -> virtual_hospitals.Hospital:
    """The site's own samples as a recipe takes them: ``listed`` now or before, and split; no image is read.

    Raises:
        ConfigError: if recipe and data do not go together.
        DataError: if the data cannot be listed, a patient stands in several splits, or the split under ``[privacy]``
            leaves nothing to train or test on.
    """
    require_no_skipping(site, recipe)
    raw = sources.make(site.data, recipe.data) if listed is None else listed
    source = unlabelled.shown(raw, site.labels, recipe.data.class_names, without_labels=site.without_labels)
    faults = unlabelled.faults(recipe) if site.without_labels else labels.faults(recipe, source.info)
    if faults:
        raise errors.ConfigError("recipe and data", faults)
    source = partial_labels.declared(bags.of(source, recipe, table=site.table == "given"), site.labelled, recipe)
    own = belonging(site, source.samples())
    parts = trained_alone(site, whole(site, split(site, own, source)))
    _require_parts(site, own, parts)
    train, val, test = (tuple(parts[name]) for name in ("train", "val", "test"))
    columns.require_follow_up(recipe, site.name, {"train": train, "val": val, "test": test})
    partly = isinstance(source, partial_labels.PartlyLabelled)
    return virtual_hospitals.Hospital(
        site.name,
        source,
        train,
        val,
        test,
        labelled=tuple(sorted(site.labelled)) if partly else (),
        lacking=channels.lacking(recipe.data, site.data),
        without_labels=site.without_labels,
    )


def trained_alone(site: schema.SiteConfig, parts: dict[str, list[samples.Sample]]) -> dict[str, list[samples.Sample]]:
    """The parts of a split; of a site without labels what trains alone.

    Its other patients stay apart all the same: whoever labels them later has patients that nothing was trained on.
    """
    return {**parts, "val": [], "test": []} if site.without_labels else parts


def surveyed(site: schema.SiteConfig, survey: surveys.Survey) -> tuple[samples.Source, list[samples.Sample]]:
    """The source and the site's own samples that a survey looks at: those of train and validation; no image is read.

    Raises:
        ConfigError: if survey and data do not go together.
        DataError: if the data cannot be listed, or a patient stands in several splits.
    """
    require_no_skipping(site, None)
    contract = collection.contract(survey)
    raw = sources.make(site.data, contract)
    source = unlabelled.shown(raw, site.labels, contract.class_names, without_labels=site.without_labels)
    wrong = [] if site.without_labels else labels.class_faults(survey.task, survey.class_names, source.info)
    wrong += collection.label_faults(survey, site.labelled, without_labels=site.without_labels)
    if wrong:
        raise errors.ConfigError("survey and data", wrong)
    if survey.columns and site.table == "given":
        source = input_rows.InputRows(source, collection.inputs(survey), "survey.columns")
    parts = whole(site, split(site, belonging(site, source.samples()), source))
    return source, collection.imaged(sample for name in collection.SEEN for sample in parts[name])


def whole(site: schema.SiteConfig, found: Splits) -> dict[str, list[samples.Sample]]:
    """The parts of a split that tears no patient: ``fedvfm data check`` alone goes on with one that does.

    Raises:
        PartitionError: with the number of patients for whom the data prescribes several splits; names stay out of it.
    """
    torn = len({splitting.group_of(one) for one in found.torn})
    if torn:
        named = " and ".join(name for name in splitting.SPLITS if any(one.split == name for one in found.torn))
        raise errors.PartitionError(
            f"site '{site.name}': {torn} patient{'s have' if torn > 1 else ' has'} images in {named}; whoever is "
            "trained on and tested makes the score too good. Keep each patient in one split; 'fedvfm data check "
            "SITE.toml --files FILE.csv' writes down whose images they are",
            code=defect.PATIENT_ACROSS_SPLITS,
        )
    return found.parts


def _require_parts(
    site: schema.SiteConfig, own: Sequence[samples.Sample], parts: dict[str, list[samples.Sample]]
) -> None:
    """Where patients are drawn alone, chance may leave a part empty; what the data prescribes is as it is."""
    needed = ("train",) if site.without_labels else ("train", "test")
    empty = [name for name in needed if not parts[name]]
    if site.privacy is None or not empty or all(one.split in splitting.SPLITS for one in own):
        return
    if "test" in empty and not site.split.test_share:
        raise errors.DataError(
            f"site '{site.name}': split.test_share = 0, and with [privacy] no patient is put into test then; what is "
            f"trained must be tested. {TEST_SHARE_NEEDED}"
        )
    groups = len({splitting.group_of(one) for one in own})
    raise errors.DataError(
        f"site '{site.name}': no {' and no '.join(empty)} sample. With [privacy] in the site's file each of its "
        f"{groups} patients (or images) is put into train, val or test by itself. Bring more patients, give them a "
        "column 'split' in the table, or, before the first round, change split.seed or the shares"
    )


def _settled(one: samples.Sample, torn: set[str]) -> samples.Sample:
    if splitting.group_of(one) in torn:
        return dataclasses.replace(one, split="train")
    return one if one.split is None or one.split in splitting.SPLITS else dataclasses.replace(one, split=None)
