"""One image and mask of every site, opened and held against the recipe before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from fedvfm import errors
from fedvfm.client.training import site as sites
from fedvfm.data import bags
from fedvfm.data.partition import virtual_hospitals
from fedvfm.model import adapted_model, memory


def inspect(model: adapted_model.AdaptedModel, hospitals: Sequence[virtual_hospitals.Hospital]) -> list[memory.Images]:
    """Open the first training sample of every hospital as training would; what the samples of each come to.

    Args:
        model: its shapes will do.
        hospitals: the sites.

    Raises:
        DataError: what training would refuse in these samples, all at once, each with its site and sample.
    """
    found, faults = [], []
    for hospital in hospitals:
        try:
            found.append(_open(model, hospital))
        except errors.DataError as error:
            faults.append(error.fault())
    if faults:
        raise errors.DataError("\n".join(faults), faults)
    return found


def _open(model: adapted_model.AdaptedModel, hospital: virtual_hospitals.Hospital) -> memory.Images:
    site, sample = sites.Site(hospital.name, hospital), bags.read_of(hospital.train[:1])[0]
    whole = site.whole(model, sample)
    view = site.example(model, sample, 0 if model.recipe.data.views else -1, ("epoch", 0)).prepared
    try:
        if not hospital.without_labels:
            model.task.target(view, sample.truth)
    except errors.DataError as error:
        raise error.at(f"site '{hospital.name}', sample '{sample.id}'") from error
    train, evaluated = (len(bags.read_of(part)) for part in (hospital.train, hospital.val + hospital.test))
    sizes = sites.kept_bytes(whole), sites.kept_bytes(view)
    return memory.Images(whole.image.shape[1:], *sizes, train, evaluated)
