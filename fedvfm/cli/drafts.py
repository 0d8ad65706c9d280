"""``client init``, ``server init-config``, ``recipe new``, ...: commented files to start from. Thin."""

from __future__ import annotations

import contextlib
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedvfm import errors

if TYPE_CHECKING:
    from fedvfm.client.gate import policy

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]

SITE = Path("site.toml")
MASKS = ("segmentation", "detection")
"""Tasks that learn from masks, whose first class is the background."""
Target = Annotated[
    str,
    typer.Option(help="class, ordinal, multi-label, regression, survival or cox; of the last four --classes: columns."),
]
EXAMPLES = {True: "background,lesion", False: "normal,abnormal"}
"""Class names of a recipe that was told none, with a background and without."""


def site(
    name: Annotated[str, typer.Option(help="This hospital's name in the federation, as its invite says it.")] = "north",
    path: Annotated[Path | None, typer.Option(help="Folder with the images.")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of that folder; recognised where it is left out.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file; must not exist.")] = SITE,
    as_json: Json = False,
) -> None:
    """Write a commented site.toml; as it stands it accepts nothing. Asks nothing."""
    from fedvfm.templates import drafts

    text, kind = _site(name, path, layout, output)
    written = drafts.write(output, text)
    if as_json:
        print(json.dumps({"file": str(written), "name": name, "layout": kind}, indent=2))
        return
    about = f"site {name}, layout {kind}" if kind else f"site {name}"
    print(f"{written}: {about}; next: fedvfm data check {written} --recipe INVITE.json")


def _site(name: str, path: Path | None, layout: str | None, output: Path) -> tuple[str, str | None]:
    """A hospital's file and the layout of its folder; a note where none is known."""
    from fedvfm.templates import drafts

    # The file is read from where it lies.
    images = path if path is None or output.absolute().parent == Path.cwd() else path.absolute()
    kind = layout if layout is not None or path is None else drafts.recognised(str(path))
    if path is not None and kind is None:
        why = "no known layout in it; set data.options.layout" if path.expanduser().is_dir() else "no such folder yet"
        print(f"note: {path}: {why}", file=sys.stderr)
    return drafts.site(name, None if images is None else str(images), kind), kind


@dataclass(frozen=True)
class Accepting:
    """A hospital's file that accepts one recipe, before it is written.

    Attributes:
        file: where it will lie.
        policy: its ``[policy]``, for a person to read first.
    """

    file: Path
    text: str
    policy: str

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Write it; where what it is for fails, it is not there."""
        from fedvfm.templates import drafts

        drafts.write(self.file, self.text)
        try:
            yield
        except BaseException:
            self.file.unlink()
            raise


def accepting(name: str, path: Path, file: Path, facts: policy.Facts) -> Accepting:
    """A site.toml for this folder, whose policy accepts this recipe and no more.

    Raises:
        ConfigError: for a recipe with a privacy mechanism: its budget is for a person to say.
        OutputInUse: if the file exists.
    """
    from fedvfm.client.gate import policy
    from fedvfm.templates import drafts

    if facts.mechanism != policy.NO_PRIVACY:
        why = (
            f"the recipe has the privacy mechanism '{facts.mechanism}', and what this site's data may spend is for you"
        )
        raise errors.ConfigError("--path", [f"{why} to say: fedvfm client init, then [privacy] in {file}"])
    drafts.require_free(file)
    text = _site(name, path, None, file)[0].replace(": as it stands here, everything is.", ".")
    allowed = policy.accepting(facts)
    return Accepting(file, text[: text.index("\n[policy]\n") + 1] + allowed, allowed)


def server(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file; must not exist.")] = Path("server.toml"),
    as_json: Json = False,
) -> None:
    """Write a commented server.toml, for 'server start --config': quorum and deadlines."""
    from fedvfm.templates import drafts

    written = drafts.write(output, drafts.server())
    line = f"{written}: every value in it is the default; use it with: fedvfm server start --config {written}"
    print(json.dumps({"file": str(written)}, indent=2) if as_json else line)


def recipe(
    classes: Annotated[
        str | None, typer.Option(help="Class names: background,lesion. In segmentation the background first.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="segmentation, detection, classification or case-classification.")
    ] = "segmentation",
    backbone: Annotated[
        str, typer.Option(help="A name of the table, a Hugging Face name or a folder.")
    ] = "dinov2-small-imgfocus",
    target: Target = "class",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file; must not exist.")] = Path("recipe.toml"),
    as_json: Json = False,
) -> None:
    """Write a commented recipe.toml that can be locked, with values that train well with its backbone."""
    from fedvfm.config import schema
    from fedvfm.model import locking
    from fedvfm.templates import drafts, target_draft

    target_draft.required(target, names_of(classes))
    names = names_of(EXAMPLES[task in MASKS] if classes is None else classes)
    values = target_draft.examples(target, names)
    text = drafts.recipe(task, backbone, names, values)
    checked = schema.parse(schema.Recipe, tomllib.loads(text), "recipe")
    try:
        faults, unchecked = locking.examine(checked)[1], ""
    except (errors.WeightsError, errors.MissingExtra) as error:
        faults, unchecked = [], str(error)
    if faults:
        raise errors.ConfigError("recipe new", faults)
    path = drafts.write(output, text)
    if unchecked:
        print(f"note: it was not checked against the backbone: {unchecked}", file=sys.stderr)
    if as_json:
        print(json.dumps({"file": str(path), "checked": not unchecked}, indent=2))
        return
    if classes is None:
        print(f"note: {', '.join(names)} are examples; write your own into data.class_names", file=sys.stderr)
    elif task in MASKS:
        print(f"the background is '{names[0]}'")
    if constants := [f"target.{key}" for key in values if key != "kind"]:
        print(f"note: {', '.join(constants)} are examples; write published ones for your columns", file=sys.stderr)
    print(f"{path}: next: fedvfm recipe lock {path}")


def names_of(given: str | None) -> list[str]:
    """Names between commas; none of an option that was left out."""
    return [part.strip() for part in (given or "").split(",") if part.strip()]


def survey(
    classes: Annotated[
        str | None, typer.Option(help="Class names: background,lesion. In segmentation the background first.")
    ] = None,
    task: Annotated[str, typer.Option(help="segmentation or classification.")] = "segmentation",
    modality: Annotated[str, typer.Option(help="CT, MR, ...: a code of DICOM; CT asks in Hounsfield units.")] = "any",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file; must not exist.")] = Path("survey.toml"),
    as_json: Json = False,
) -> None:
    """Write a commented survey.toml: which statistics the sites are asked for before anything is trained."""
    from fedvfm.survey import draft
    from fedvfm.templates import drafts

    names = names_of(EXAMPLES[task in MASKS] if classes is None else classes)
    path = drafts.write(output, draft.text(task, names, modality))
    if as_json:
        print(json.dumps({"file": str(path)}, indent=2))
        return
    if classes is None:
        print(f"note: {', '.join(names)} are examples; write your own into class_names", file=sys.stderr)
    print(f"{path}: next: fedvfm server survey {path}, or fedvfm survey EXPERIMENT --survey {path}")


def experiment(
    folder: Annotated[Path, typer.Argument(help="Folder with images, and masks or classes.")],
    classes: Annotated[
        str | None, typer.Option(help="Class names where the folder does not say them; the background first.")
    ] = None,
    target: Target = "class",
    backbone: Annotated[
        str, typer.Option(help="A name of the table, a Hugging Face name or a folder.")
    ] = "dinov2-small-imgfocus",
    task: Annotated[
        str | None,
        typer.Option(help="detection of masks, case-classification of volumes; left out, as the folder looks."),
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="Columns of the table that the head sees beside the images: age,crp,sex.")
    ] = None,
    sites: Annotated[
        int, typer.Option(min=0, help="Virtual hospitals, patients at random; 0: the folder's own, else up to 4.")
    ] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file; must not exist.")] = Path("experiment.toml"),
    as_json: Json = False,
) -> None:
    """Write an experiment for your own images: looks what lies in the folder, reads no pixels, asks nothing."""
    from fedvfm.report import quantity
    from fedvfm.runtime import extras
    from fedvfm.templates import drafts

    extras.require()
    seen = drafts.study(folder, names_of(classes), task, target, names_of(inputs))
    text = drafts.experiment(folder.absolute(), seen, backbone=backbone, sites=sites)
    written = drafts.write(output, text)
    partition = tomllib.loads(text)["partition"]
    number = partition.get("sites", seen.sites)
    if not seen.named:
        said = ", ".join(seen.classes)
        print(f"note: the folder does not name its classes; '{said}' are a guess, --classes says them", file=sys.stderr)
    constants = [f"target.{key}" for key in seen.target if key != "kind"]
    constants += [f"inputs.{key}" for key in seen.inputs if key != "numbers"]
    if constants:
        print(
            f"note: {', '.join(constants)} come from this folder's table; take published ones for a real federation, "
            "as a recipe tells them to everybody",
            file=sys.stderr,
        )
    if as_json:
        values = {"task": seen.task, "classes": seen.classes, "samples": seen.samples, "patients": seen.patients}
        print(json.dumps({"file": str(written), **values, "sites": number, "partition": partition["kind"]}, indent=2))
        return
    images, patients = quantity.of(seen.samples, "image"), quantity.of(seen.patients, "patient")
    print(f"{folder}: {seen.task}, {images} of {patients}")
    print(f"{written}: {number} hospitals, {partition['kind']}; next: fedvfm simulate {written}")
