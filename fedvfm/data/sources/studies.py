"""DICOM study folders: ``studies/NAME/`` holds one series, however deep; labels in a table, or masks.

Masks are DICOM-SEG objects in the study's own folder, or ``masks/NAME.*`` (NIfTI, NRRD, DICOM-SEG); where neither
``masks/`` nor a mask is meant, ``labels.csv`` (or ``patients.csv``, ``index.csv``) has a column ``label`` with the name
of a class for every study.

A study may hold several radiographs or clips that are no volume (frontal and lateral view, clips of ultrasound): each
is a case of its own, "NAME/1", "NAME/2", ..., with the study's label, patient and split. Its masks are the DICOM-SEG
objects that name it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fedvfm import errors
from fedvfm.data import defect
from fedvfm.data.sources import layouts
from fedvfm.data.volumes import dicom, dicom_series, series_selector


def collect(folder: Path, options: layouts.Options) -> layouts.Layout:
    """The studies of ``studies/``; segmentation, or classification where a table has labels.

    Raises:
        DataError: if a table cannot be read.
    """
    names = options.class_names or layouts.DEFAULT_NAMES
    layout = layouts.Layout("studies", names, options.mask_values or tuple(range(len(names))))
    if not (folder / "studies").is_dir():
        layout.faults.append(defect.OPTIONS.fault(f"studies/: no such folder; {layouts.REMEDY}"))
        return layout
    found = {path.name: path for path in folders(folder / "studies", layout.faults)}
    layout.left += layouts.beside(folder / "studies", list(found.values()), "studies/")
    layout.names = list(found)
    table = None if (folder / "masks").is_dir() else layouts.labelled(folder)
    if table is not None:
        layout.class_names, layout.mask_values = options.class_names, ()
        every = layouts.with_imageless(layout, *table, found, layouts.imageless(folder))
        layout.names = list(every)
        layouts.classify(layout, *table, every)
    elif (folder / "masks").is_dir():
        _with_masks(layout, found, folder / "masks")
    else:
        layout.cases = [layouts.Case(name, (path,), path) for name, path in found.items()]
    return layout


def folders(folder: Path, faults: list[errors.Fault]) -> Sequence[Path]:
    """Its folders; files beside them are named, because they may be a study that someone forgot to put into one."""
    loose = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    faults += layouts.lost(folder, "studies/")
    wrong = [path for path in loose if path.suffix.lower() not in layouts.IGNORED and dicom.is_dicom(path)]
    if wrong:
        faults.append(
            defect.ENDING.fault(
                f"studies/: {len(wrong)} DICOM file(s) outside of a study's folder; put each study into its own"
            )
        )
    return layouts.folders_in(folder)


def _with_masks(layout: layouts.Layout, found: dict[str, Path], folder: Path) -> None:
    masks: dict[str, Path] = {path.name: path for path in layouts.folders_in(folder)}
    for name, path in layouts.images_in(folder, layout.faults, deeper=True).items():
        if name in masks:
            layout.faults.append(
                defect.NAME_TWICE.fault(f"masks/{path.name}: a folder of this name is there, too; keep one")
            )
        masks[name] = path
    layout.faults += layouts.alone(
        {name: f"studies/{name}" for name in found},
        {name: f"masks/{path.name}" for name, path in masks.items()},
        "studies/{}/",
        "masks/{}.*",
    )
    layout.cases = [layouts.Case(name, (path,), masks[name]) for name, path in found.items() if name in masks]


def parts(case: layouts.Case, words: str) -> tuple[list[layouts.Case], dicom.Study]:
    """The images of a study folder as cases of their own, where they are radiographs or clips; none of other studies.

    In the order of their series and of the files' names. Images with a place in the patient belong together, and of
    several modalities nobody can tell which one is meant.

    Raises:
        DataError: if the folder cannot be read.
    """
    study = dicom.find(case.images[0])
    meant = series_selector.among(study.series, words)
    files = list(dict.fromkeys(file for one in meant for file in sorted({each.frame.file for each in one.slices})))
    apart = all(dicom_series.is_apart(one) for one in meant) and len({one.modality for one in meant}) == 1
    whose = case.mask is None or case.mask.is_dir()
    if len(files) < 2 or not apart or not whose:
        return [], study
    return [
        dataclasses.replace(case, name=f"{case.name}/{number}", images=(file,), study=case.name)
        for number, file in enumerate(files, 1)
    ], study
