"""The check as one HTML file that asks the network for nothing, with example pictures of the hospital's own images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors, seeding
from fedvfm.client.readiness import check, document, outputs
from fedvfm.data import colours, overlay
from fedvfm.data.readiness import dataset, finding, survey
from fedvfm.report import charts, page
from fedvfm.storage import storage

PICTURES = 8
OPTION, HEAD = "--html", b"<!doctype html>"
STAYS = (
    "This page stays at the hospital. It names no file and no patient, but the example pictures are the hospital's own "
    "images, and text burned into an image shows in its picture."
)
STAYS_WITHOUT = "This page names no file and no patient and holds no picture. It was made without any network."
WORDS = {"blocker": "Blocker", "warning": "Warning", "note": "Note"}


def write(made: check.Checked, path: Path, *, with_pictures: bool = True) -> None:
    """Write the page for its owner's eyes alone (0600).

    Raises:
        OutputInUse: if another kind of file is there.
        StorageError: if the disk refuses.
    """
    outputs.require(path, OPTION, HEAD)
    shown = _pictures(made) if with_pictures else ""
    title = f"Readiness of {made.own.site.name}"
    storage.write_text(path, page.document(title, body(made, shown)), mode=0o600)


def body(made: check.Checked, shown: str) -> list[str]:
    """The page, part by part."""
    made_of = document.build(made)
    parts = {
        "findings": ("Findings", _findings(made.findings)),
        "data": ("Data", "" if made.seen is None else _data(made.seen, made_of)),
        "images": ("Images", "" if made_of["images"] is None else _images(made_of["images"])),
        "pictures": ("Example pictures", shown),
        "machine": ("This machine", _machine(made_of)),
    }
    sections = {key: page.section(key, title, inner) for key, (title, inner) in parts.items() if inner}
    links = "".join(f'<a href="#{key}">{page.text(parts[key][0])}</a>' for key in sections)
    return [
        *_head(made, made_of, shown),
        f'<nav aria-label="Sections">{links}</nav>',
        "<main>",
        *sections.values(),
        "</main>",
    ]


def _head(made: check.Checked, made_of: Mapping[str, Any], shown: str) -> list[str]:
    counts = made_of["counts"]
    verdict = "Ready" if made.ready else "Not ready"
    told = ", ".join(finding.number(counts[name], name) for name in finding.SEVERITIES)
    rows = [("Verdict", verdict, told)]
    if made_of["data"] is not None:
        data = made_of["data"]
        patients = "patients unknown" if data["patients"] is None else finding.number(data["patients"], "patient")
        rows.append(("Samples", f"{data['samples']:,}", patients))
        splits = data["splits"]
        rows.append(
            ("To train on", f"{splits['train']:,}", f"{splits['val']:,} to validate, {splits['test']:,} to test")
        )
        rows.append(("Not usable", f"{data['unusable']:,}", f"of {data['read'] + data['unusable']:,} looked at"))
    if made_of["training_step"] is not None:
        step = made_of["training_step"]
        rows.append(("Expected round", duration(step["round_s"]), f"{step['steps']:,} steps of {step['step_s']:.2f} s"))
    about = "Made at the hospital, without network; nothing of it was sent anywhere."
    return [
        f"<header><h1>Readiness of {page.text(made.own.site.name)}</h1>{page.paragraph(about, 'soft')}",
        page.paragraph(STAYS if shown else STAYS_WITHOUT, "note"),
        page.cards(rows),
        "</header>",
    ]


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _findings(found: Sequence[finding.Finding]) -> str:
    if not found:
        return page.paragraph("None.")
    head = ("severity", "problem", "why it matters", "remedy", "code")
    rows = [
        [
            WORDS[one.severity],
            one.problem + (f" ({one.where})" if one.where else ""),
            one.why,
            one.remedy,
            page.Markup(f"<code>{page.text(one.code)}</code>"),
        ]
        for one in found
    ]
    caption = "Samples are numbered from 1 in the order of the source; --files FILE lists which files they are."
    return page.table(head, rows, caption, words=(0, 1, 2, 3, 4))


def _data(seen: dataset.Looked, made_of: Mapping[str, Any]) -> str:
    data = made_of["data"]
    about = f"Source {data['source']}: {data['note']}. Task: {data['task']}."
    if data["limited"]:
        about += f" Only {data['read'] + data['unusable']:,} of {data['samples']:,} samples were looked at."
    kind = "samples with the class in their mask" if seen.segmentation else "samples"
    counts = [(name, float(count), f"{count:,}") for name, count in data["per_class"].items()]
    title = f"Classes: {kind}"
    chart = page.figure(charts.bars(counts, title=title), title) if counts else ""
    rows: list[list[page.Cell]] = [[name, count] for name, count in data["splits"].items()]
    splits = page.table(("split", "samples"), rows, "Splits; patients stay together.")
    return page.paragraph(about) + f'<div class="charts">{chart}{splits}</div>' + _mask_table(made_of)


def _mask_table(made_of: Mapping[str, Any]) -> str:
    masks = made_of["masks"]
    if masks is None:
        return ""
    rows: list[list[page.Cell]] = [[name, f"{share:.4g}"] for name, share in masks["pixel_share"].items()]
    caption = f"Share of all pixels. Empty masks: {masks['empty']:,}; masks without background: {masks['full']:,}."
    return page.table(("class", "share"), rows, caption)


def _images(images: Mapping[str, Any]) -> str:
    rows: list[list[page.Cell]] = [
        _spread("height, pixels", images["height"]),
        _spread("width, pixels", images["width"]),
    ]
    if images["units"] is not None:
        rows.append(
            ["intensity, units of the files", f"{images['units']['low']:g}", None, f"{images['units']['high']:g}"]
        )
    if images["spacing_mm"] is not None:
        rows += [_spread(f"{name} of a pixel, mm", images["spacing_mm"][name]) for name in ("row", "column")]
    sizes = page.table(("", "smallest", "median", "largest"), rows, "Sizes.")
    kinds = [[name, count] for name, count in images["orientations"].items()]
    turned = ""
    if images["orientations"].keys() - {"unknown"}:
        caption = "Orientation of the files: to where the axes run (R right, A front, S head, L, P, I the other way)."
        turned = page.table(("axes as stored", "samples"), kinds, caption)
    intensity = images["intensity"]
    bins = intensity["histogram"]
    total = max(1, sum(bins))
    points = [(float(at), count / total) for at, count in enumerate(bins)]
    title = "Share of pixels by intensity (64 bins from 0 to 1)"
    chart = charts.line(
        [charts.Series("all", points)], title=title, x_label="bin", y_label="share", from_edge=True, bounds=(0.0, 1.0)
    )
    caption = f"{title}; mean {intensity['mean']:.3f}, standard deviation {intensity['std']:.3f}."
    return f'<div class="charts">{page.figure(chart, caption)}<div>{sizes}{turned}</div></div>'


def _spread(name: str, values: Mapping[str, float]) -> list[page.Cell]:
    return [name, *(f"{values[key]:g}" for key in ("min", "median", "max"))]


def _machine(made_of: Mapping[str, Any]) -> str:
    machine, step = made_of["machine"], made_of["training_step"]
    if machine is None:
        return page.paragraph("Without a recipe nobody knows what training needs.")
    rows: list[list[page.Cell]] = [["device", machine["device_name"] or machine["device"], None]]
    rows.append(["precision", machine["precision"], None])
    for key, name in (("memory_mib", "memory, MiB"), ("disk_mib", "disk, MiB")):
        rows.append([name, f"{machine[key]['available']:,.0f} free", f"about {machine[key]['needed']:,.0f} needed"])
    if step is not None:
        rows += [
            ["first training step", duration(step["first_s"]), "files and kernels cold"],
            ["training step", duration(step["step_s"]), f"{step['steps']:,} in a round"],
            ["prediction of an image", duration(step["image_s"]), None],
            ["expected round", duration(step["round_s"]), "steps, and validation where the recipe asks for it"],
        ]
    return page.table(("", "here", ""), rows, "Estimates from shapes, times as measured.", words=(2,))


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(made: check.Checked) -> str:
    """Samples drawn at random, half of them with a mark where there are masks."""
    if made.seen is None or made.source is None:
        return ""
    rows = [row for row in made.seen.found.rows if not row.blank]
    if not rows:
        return ""
    rng = seeding.stream(made.own.site.split.seed, made.own.site.name, "readiness")
    order = [rows[int(at)] for at in rng.permutation(len(rows))]
    marked = [row for row in order if row.classes - {0}][: PICTURES // 2]
    chosen = [*marked, *(row for row in order if row not in marked)][:PICTURES]
    figures = [drawn for row in sorted(chosen, key=lambda row: row.number) if (drawn := _picture(made, made.seen, row))]
    marks = "; half of them, where possible, with a mark" if made.seen.segmentation else ""
    about = page.paragraph(f"Samples drawn at random{marks}.", "soft")
    return about + _key(made.seen) + f'<div class="samples">{"".join(figures)}</div>'


def _key(seen: dataset.Looked) -> str:
    if not seen.segmentation:
        return ""
    inner = "".join(
        f'<span style="background:{colours.of(number)}"></span>{page.text(name)}'
        for number, name in enumerate(seen.classes[1:], start=1)
    )
    return f'<p class="key">Classes:{inner}</p>'


def _picture(made: check.Checked, seen: dataset.Looked, row: survey.Row) -> str:
    """One sample: image, and the same with its mask."""
    if made.source is None:
        return ""
    try:
        pixels = made.source.read(row.sample)
    except errors.FedvfmError:
        return ""  # it was read a moment ago; the findings tell what is wrong with the folder
    where = f"sample {row.number}, {seen.split_of.get(row.number, 'no split')}"
    panels = [f"<span>{page.image(overlay.png(overlay.as_shown(pixels.image)), f'image of {where}')}</span>"]
    if pixels.mask is not None:
        png = overlay.png(overlay.drawn(pixels.image, pixels.mask))
        panels.append(f"<span>{page.image(png, f'mask of {where}')}</span>")
    label = "" if row.sample.label is None else f": {seen.classes[row.sample.label]}"
    caption = f"<figcaption>{page.text(where + label)}</figcaption>"
    return f'<figure class="sample">{caption}<div>{"".join(panels)}</div></figure>'
