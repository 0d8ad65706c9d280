"""DICOM study folders: ``studies/NAME/`` holds one series, however deep; labels in a table, or masks.

Masks are DICOM-SEG objects in the study's own folder, or ``masks/NAME.*`` (NIfTI, NRRD, DICOM-SEG); where neither
``masks/`` nor a mask is meant, ``labels.csv`` (or ``patients.csv``, ``index.csv``) has a column ``label`` with the name
of a class for every study.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedvfm import registry
from fedvfm.data import dicom
from fedvfm.data.sources import layouts


def collect(folder: Path, options: layouts.Options) -> layouts.Layout:
    """The studies of ``studies/``; segmentation, or classification where a table has labels.

    Raises:
        DataError: if a table cannot be read.
    """
    names = options.class_names or layouts.DEFAULT_NAMES
    layout = layouts.Layout("studies", names, options.mask_values or tuple(range(len(names))))
    if not (folder / "studies").is_dir():
        layout.faults.append(f"studies/: no such folder; {layouts.REMEDY}")
        return layout
    found = {path.name: path for path in _studies(folder / "studies", layout.faults)}
    layout.names = list(found)
    table = None if (folder / "masks").is_dir() else layouts.labelled(folder)
    if table is not None:
        _classify(layout, found, *table, options.class_names)
    elif (folder / "masks").is_dir():
        _with_masks(layout, found, folder / "masks")
    else:
        layout.cases = [layouts.Case(name, (path,), path) for name, path in found.items()]
    return layout


def _studies(folder: Path, faults: list[str]) -> Sequence[Path]:
    """Its folders; files beside them are named, because they may be a study that someone forgot to put into one."""
    loose = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    lost = [path for path in folder.iterdir() if path.is_symlink() and not path.exists()]
    faults += [f"studies/{path.name}: a link that leads nowhere; bring the study, or remove the link" for path in lost]
    lost = [path for path in folder.iterdir() if path.is_symlink() and not path.exists()]
    faults += [f"studies/{path.name}: a link that leads nowhere; bring the study, or remove the link" for path in lost]
    wrong = [path for path in loose if path.suffix.lower() not in layouts.IGNORED and dicom.is_dicom(path)]
    if wrong:
        faults.append(f"studies/: {len(wrong)} DICOM file(s) outside of a study's folder; put each study into its own")
    return layouts.folders_in(folder)


def _classify(
    layout: layouts.Layout, found: dict[str, Path], table: str, labels: dict[str, str], class_names: tuple[str, ...]
) -> None:
    layout.class_names = class_names or tuple(sorted({label for label in labels.values() if label}))
    layout.mask_values = ()
    if len(layout.class_names) < 2:
        layout.faults.append(
            f"{table}: {len(layout.class_names)} class(es) in the column 'label'; two are needed, or all classes in "
            "data.options.class_names"
        )
    known = list(layout.class_names)
    for name, path in found.items():
        label = labels.get(name)
        if label in known:
            layout.cases.append(layouts.Case(name, (path,), None, known.index(label)))
        elif label is None:
            layout.faults.append(f"{table}: no row for image '{name}'; add one")
        else:
            near = registry.nearest(label, known)
            layout.faults.append(
                f"{table}: id '{name}': label '{label}' stands for no class; classes: {', '.join(known)}{near}"
            )


def _with_masks(layout: layouts.Layout, found: dict[str, Path], folder: Path) -> None:
    masks: dict[str, Path] = {path.name: path for path in layouts.folders_in(folder)}
    for name, path in _mask_files(folder, layout.faults).items():
        if name in masks:
            layout.faults.append(f"masks/{path.name}: a folder of this name is there, too; keep one")
        masks[name] = path
    layout.faults += [
        f"studies/{name}: no mask masks/{name}.*; add it, or move the study away" for name in found if name not in masks
    ]
    layout.faults += [
        f"masks/{path.name}: no image studies/{name}/; add it, or move the mask away"
        for name, path in masks.items()
        if name not in found
    ]
    layout.cases = [layouts.Case(name, (path,), masks[name]) for name, path in found.items() if name in masks]


def _mask_files(folder: Path, faults: list[str]) -> dict[str, Path]:
    """Mask files by name; folders beside them hold DICOM-SEG and are taken before."""
    ignored: list[str] = []
    found = layouts.images_in(folder, ignored)
    faults += [fault for fault in ignored if ": a folder inside" not in fault]
    return found
