"""Datalists of MONAI and the Medical Segmentation Decathlon: ``dataset.json`` lists images with their labels.

``training = [{image, label[, patient][, fold]}]``, ``validation`` of the same form (its cases are the split "val", with
``data.options.fold`` too, which deals out those of ``training``; that both say the same case's part is a fault),
``labels = {"0": "background", "1": "tumour"}``. A label is a mask's file, or in classification a class's name or
number. ``test`` and ``testing`` list images without truth and are not read. A NIfTI of four axes holds the channels
that ``modality`` names, in their order.

Source: Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 13, 2022 (its dataset.json);
    MONAI, ``monai.data.load_decathlon_datalist``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors, registry
from fedvfm.data import defect, formats
from fedvfm.data.sources import layouts, patients
from fedvfm.data.volumes import nifti

PARTS = {"training": None, "validation": "val"}
NUMBER = re.compile(r"\d{1,9}", re.ASCII)


def collect(folder: Path, options: layouts.Options) -> layouts.Layout:
    """The cases of ``dataset.json``. With ``data.options.fold = N`` those of fold N in ``training`` are for testing."""
    layout = layouts.Layout("datalist", ())
    settings = layouts.read_json(folder / "dataset.json", layout.faults, "a datalist")
    if layout.faults:
        return layout
    layout.class_names = options.class_names or _class_names(settings, layout.faults)
    layout.mask_values, layout.named = tuple(range(len(layout.class_names))), not options.class_names
    layout.channels = layouts.channel_names(settings)
    if _is_first_nnunet(folder, settings):
        layout.faults.append(
            defect.DATASET_JSON.fault(
                "dataset.json: nnU-Net's version 1 (it lists CASE, the files are CASE_0000): "
                "nnUNetv2_convert_old_nnUNet_dataset converts it to version 2, which is read"
            )
        )
        return layout
    found: dict[str, layouts.Case] = {}
    listed: set[tuple[Path, ...]] = set()
    for part, split in PARTS.items():
        entries = settings.get(part, [])
        if not isinstance(entries, list):
            layout.faults.append(defect.DATASET_JSON.fault(f"dataset.json: '{part}' is no list"))
            continue
        for number, entry in enumerate(entries, 1):
            where = f"dataset.json: {part} {number}"
            case = _case(folder, entry, where, layout)
            if case is not None:
                split_of = _split(entry, split, options.fold, where, layout.faults)
                name = case.name if case.name not in found else layouts.relative(case.images[:1], folder)
                if case.images in listed or name in found:
                    layout.faults.append(defect.NAME_TWICE.fault(f"{where}: an image that is listed twice; keep one"))
                listed.add(case.images)
                found[name] = layouts.Case(name, case.images, case.mask, case.label, case.patient, split_of)
    if options.fold is not None and not any(case.split == "test" for case in found.values()):
        layout.faults.append(
            defect.DATASET_JSON.fault(f"dataset.json: no case of fold {options.fold}; see data.options.fold")
        )
    kinds = {case.mask is None for case in found.values()}
    if len(kinds) > 1:
        layout.faults.append(
            defect.DATASET_JSON.fault("dataset.json: some labels are masks and some are classes; keep one kind")
        )
    layout.cases = list(found.values())
    layout.left += _unlisted(folder, settings, layout.cases)
    return layout


def _is_first_nnunet(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the images of the list are there with channel numbers only, as in nnU-Net's version 1."""
    entries = settings.get("training")
    first = entries[0] if isinstance(entries, list) and entries else None
    name = first.get("image") if isinstance(first, dict) else None
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or (folder / name).exists():
        return False
    path = folder / name
    return path.with_name(f"{formats.stem(path)}_0000{formats.ending(path)}").exists()


def _unlisted(folder: Path, settings: Mapping[str, Any], cases: Sequence[layouts.Case]) -> list[str]:
    """Images that lie beside listed ones and stand in no list."""
    listed = {nifti.file_of(file) for case in cases for file in (*case.images, case.mask) if file is not None}
    for part in (*PARTS, "test", "testing"):
        entries = settings.get(part)
        for entry in entries if isinstance(entries, list) else ():
            names = entry.get("image") if isinstance(entry, dict) else entry
            given = names if isinstance(names, list) else [names]
            listed |= {folder / name for name in given if isinstance(name, str)}
    folders = {nifti.file_of(image).parent for case in cases for image in case.images[:1]}
    beside = sorted(path for where in folders for path in where.iterdir())
    return [
        f"{layouts.relative([path], folder)}: not listed in dataset.json"
        for path in beside
        if path not in listed and formats.ending(path) and not path.name.startswith(".")
    ]


def _class_names(settings: dict[str, Any], faults: list[errors.Fault]) -> tuple[str, ...]:
    """Names in the order of their numbers: numbers to names (the decathlon), or names to numbers."""
    labels = settings.get("labels")
    if isinstance(labels, dict) and labels and all(NUMBER.fullmatch(key) for key in labels):
        turned = {str(name): int(key) for key, name in labels.items()}
        if len(turned) < len(labels):
            faults.append(defect.DATASET_JSON.fault("dataset.json: two labels of one name; class names must differ"))
        return layouts.label_names({"labels": turned}, faults)
    return layouts.label_names(settings, faults)


def _case(folder: Path, entry: Any, where: str, layout: layouts.Layout) -> layouts.Case | None:
    if not isinstance(entry, dict) or "image" not in entry or "label" not in entry:
        layout.faults.append(defect.DATASET_JSON.fault(f"{where}: needs 'image' and 'label'"))
        return None
    layout.faults += [
        defect.DATASET_JSON.fault(
            f"{where}: '{key}' is not read; a datalist says a case's patient as 'patient' and its part by its list or "
            "'fold', and patients.csv (id,patient,split) says both"
        )
        for key in entry
        if key != "patient" and patients.spoken(key) in ("patient", "split")
    ]
    listed = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    images = [_inside(folder, one, where, layout.faults) for one in listed]
    label = entry["label"]
    if isinstance(label, list):
        layout.faults.append(
            defect.DATASET_JSON.fault(
                f"{where}: a list of {len(label)} labels; one mask with a number for each class is read, so join them"
            )
        )
        return None
    is_mask = isinstance(label, str) and label not in layout.class_names
    mask = _inside(folder, label, where, layout.faults) if is_mask else None
    number = None if is_mask else _number(label, where, layout)
    if not images or None in images or (mask is None and number is None):
        return None
    patient = entry.get("patient")
    paths = tuple(one for one in images if one is not None)
    return layouts.Case(
        formats.stem(paths[0]), _channels(paths, where, layout), mask, number, None if patient is None else str(patient)
    )


def _channels(paths: tuple[Path, ...], where: str, layout: layouts.Layout) -> tuple[Path, ...]:
    """The channels of one NIfTI of four axes, each as a path of its own; other files as they are.

    Without names nobody could tell channels from moments: such a file is refused when its header is read.
    """
    named = len(layout.channels)
    if len(paths) != 1 or named < 2 or formats.ending(paths[0]) not in nifti.ENDINGS:
        return paths
    try:
        axes = nifti.axes(paths[0])
    except errors.DataError:
        return paths  # told when its header is read
    if len(axes) == 4 and axes[3] == named:
        return tuple(paths[0] / str(number) for number in range(named))
    have = axes[3] if len(axes) == 4 else 1
    layout.faults.append(
        defect.CHANNELS_MISSING.fault(
            f"{where}: {have} channel(s) in the file, but 'modality' names {named}; correct one"
        )
    )
    return paths


def _inside(folder: Path, name: Any, where: str, faults: list[errors.Fault]) -> Path | None:
    """A listed file; a list must not make us read what lies elsewhere on this machine."""
    if not isinstance(name, str) or not name:
        faults.append(defect.DATASET_JSON.fault(f"{where}: {name!r} is no path"))
        return None
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        faults.append(defect.DATASET_JSON.fault(f"{where}: a path that leaves the folder; list paths below it"))
        return None
    if not (folder / path).exists():
        faults.append(defect.NOT_FOUND.fault(f"{where}: {path}: no such file; bring it, or remove the entry"))
        return None
    return folder / path


def _number(label: Any, where: str, layout: layouts.Layout) -> int | None:
    if isinstance(label, str):
        return layout.class_names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(layout.class_names):
        return label
    known: Sequence[str] = layout.class_names
    near = registry.nearest(str(label), list(known))
    layout.faults.append(
        defect.CLASS_UNKNOWN.fault(f"{where}: label {label!r} stands for no class; classes: {', '.join(known)}{near}")
    )
    return None


def _split(
    entry: Mapping[str, Any], given: str | None, fold: int | None, where: str, faults: list[errors.Fault]
) -> str | None:
    if fold is None:
        return given
    if given is not None:
        if "fold" in entry:
            faults.append(
                defect.DATASET_JSON.fault(
                    f"{where}: is in the list 'validation' and has a 'fold', and data.options.fold = {fold} would be a "
                    "second word on its part; take its fold away, move it into 'training', or leave the option out"
                )
            )
        return given
    if type(entry.get("fold")) is not int:
        faults.append(
            defect.DATASET_JSON.fault(
                f"{where}: no whole number as 'fold', but data.options.fold = {fold}; add it, or leave fold out"
            )
        )
    return "test" if entry.get("fold") == fold else "train"
