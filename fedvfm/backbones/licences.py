"""What is known of the licence of a backbone's weights: of the recipe, of the table, of an import. Imports no torch."""

from __future__ import annotations

import contextlib

from fedvfm import errors
from fedvfm.backbones import record, weights
from fedvfm.config import licence, schema


def of(settings: schema.BackboneConfig) -> licence.Licence:
    """What the recipe states and what this machine knows of the name; where they differ, both count."""
    stated = licence.Licence.of(settings.licence or "", settings.licence_limits)
    return stated + known(settings.name)


def known(name: str) -> licence.Licence:
    """What was said when weights of this name were imported here, else what the table says of it."""
    imported = recorded(name)
    if imported:
        return imported
    for own, row in weights.KNOWN.items():
        if name == own or (row.hub and name == row.hub):
            return licence.Licence.of(row.licence, row.limits)
    return licence.Licence()


def recorded(name: str) -> licence.Licence:
    """What was said when weights of this name were imported here."""
    kept = None
    if weights.NAME.fullmatch(name):
        with contextlib.suppress(errors.WeightsError):  # who loads the weights is told that their record is damaged
            kept = record.read(weights.own_folder(name))
    return licence.Licence() if kept is None else licence.Licence.of(kept.licence, kept.limits)


def stated(settings: schema.BackboneConfig) -> schema.BackboneConfig:
    """The settings with what was said at the import here, where they do not say anything themselves."""
    here = recorded(settings.name)
    if settings.licence is not None or settings.licence_limits or not here:
        return settings
    update = {"licence": here.names[0] if here.names else None, "licence_limits": here.limits}
    return settings.model_copy(update=update)


def require_derivatives(
    terms: licence.Licence,
    backbone: str,
    what: str,
    instead: str = "--format peft or monai, which leave the weights as they are",
) -> None:
    """Refuse to write weights that others' licence forbids to change and pass on.

    Args:
        terms: of the weights.
        backbone: its name.
        what: would be written.
        instead: what may be exported.

    Raises:
        LicenceForbids: if it does.
    """
    if licence.NO_DERIVATIVES in terms.limits:
        raise errors.LicenceForbids(
            what,
            [
                f"the weights of backbone '{backbone}' are under {terms}: a model with the adapter in it would be a "
                f"derivative, and is not written. Export {instead}, or hand the adapter on as it is"
            ],
        )
