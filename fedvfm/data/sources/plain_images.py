"""Images without labels, of a hospital of ``role = "unlabelled"``; masks and labels beside them are not looked at."""

from __future__ import annotations

from pathlib import Path

from fedvfm.data.sources import layouts, studies


def collect(folder: Path, options: layouts.Options) -> layouts.Layout:
    """The images of ``studies/`` (a DICOM folder each), ``cases/`` (a folder of images each), or ``images/``.

    Of several of these the first counts; without any the images of the folder itself.
    """
    layout = layouts.Layout("images", ())
    if (folder / "studies").is_dir():
        folders = studies.folders(folder / "studies", layout.faults)
        layout.left += layouts.beside(folder / "studies", folders, "studies/")
        layout.cases = [layouts.Case(path.name, (path,)) for path in folders]
        layout.names = [case.name for case in layout.cases]
    elif (folder / "cases").is_dir():
        _cases(layout, folder / "cases")
    else:
        where = layouts.folder_of(folder, layouts.IMAGE_FOLDERS, layout.faults) or folder
        images = layouts.images_in(where, layout.faults, deeper=where == folder)
        layout.left += layouts.beside(folder, [where]) if where != folder else []
        layout.cases = [layouts.Case(name, (path,)) for name, path in sorted(images.items())]
        layout.names = list(images)
    return layout


def _cases(layout: layouts.Layout, where: Path) -> None:
    folders = layouts.folders_in(where)
    layout.faults += layouts.lost(where, "cases/")
    layout.left += layouts.beside(where, folders, "cases/")
    layout.names = [path.name for path in folders]
    for path in folders:
        layout.cases += layouts.images_of_case(layout, path, None, "remove it")
