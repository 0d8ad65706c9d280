"""The check as one JSON document with stable keys. It names no file, no folder and no patient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from fedvfm.client.readiness import check
from fedvfm.data import bags
from fedvfm.data.partition import splits as splitting
from fedvfm.data.readiness import dataset, finding

FORMAT = 1
"""Raised when a key changes its meaning or goes away; new keys may come at any time."""


def build(made: check.Checked) -> dict[str, Any]:
    """The whole document. Parts that were not looked at are None."""
    recipe, seen = made.own.recipe, made.seen
    return {
        "format": FORMAT,
        "version": metadata.version("fedvfm"),
        "site": made.own.site.name,
        "ready": made.ready,
        "exit_code": made.exit_code,
        "counts": {name: sum(one.severity == name for one in made.findings) for name in finding.SEVERITIES},
        "recipe": None if recipe is None else {"hash": recipe.hash, "backbone": _backbone(recipe.backbone.name)},
        "data": None if seen is None else _data(seen),
        "images": None if seen is None or not seen.found.rows else _images(seen),
        "masks": None if seen is None or not seen.segmentation or not seen.found.rows else _masks(seen),
        "machine": made.facts.get("machine"),
        "training_step": made.facts.get("training_step"),
        "findings": [one.as_json() for one in made.findings],
    }


def _backbone(name: str) -> str:
    """A backbone's name; of a local folder its last part."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name


def _data(seen: dataset.Looked) -> dict[str, Any]:
    patients = seen.patients()
    images = [image for image in bags.images_of(seen.samples) if not image.without_image]
    return {
        "source": seen.info.name,
        "note": seen.info.note,
        "task": seen.info.task,
        "classes": list(seen.classes),
        "samples": len(seen.samples),
        "read": len(seen.found.rows),
        "unusable": len(seen.found.failures),
        "limited": seen.limited,
        "patients": len(patients) if patients else None,
        "images": len(images),
        "volumes": len({one.part.volume for one in images if one.part is not None}),
        "splits": {name: len(seen.splits.get(name, ())) for name in splitting.SPLITS},
        "per_class": dict(zip(seen.classes, seen.class_counts(), strict=True)),
        "read_s": round(seen.found.seconds, 3),
    }


def _images(seen: dataset.Looked) -> dict[str, Any]:
    found, rows = seen.found, seen.found.rows
    stacked = seen.contract is not None and seen.contract.stack > 1
    units = [row.units for row in rows if row.units is not None]
    spacings = [row.spacing for row in rows if row.spacing is not None]
    return {
        "height": spread([row.size[0] for row in rows]),
        "width": spread([row.size[1] for row in rows]),
        "sizes": common([f"{row.size[0]} x {row.size[1]}" for row in rows]),
        "colour": 0 if stacked else sum(row.colour for row in rows),
        "spacing_mm": None
        if not spacings
        else {"row": spread([one[0] for one in spacings]), "column": spread([one[1] for one in spacings])},
        "spacing_unknown": len(rows) - len(spacings),
        "orientations": common([row.orientation or "unknown" for row in rows]),
        "units": None
        if not units
        else {"low": _short(min(low for low, _ in units)), "high": _short(max(high for _, high in units))},
        "intensity": {
            "low": round(min(row.low for row in rows), 4),
            "high": round(max(row.high for row in rows), 4),
            "mean": round(found.mean, 4),
            "std": round(found.std, 4),
            "p01": round(found.percentile(0.01), 4),
            "p50": round(found.percentile(0.5), 4),
            "p99": round(found.percentile(0.99), 4),
            "histogram": [int(count) for count in found.histogram],
        },
    }


def _masks(seen: dataset.Looked) -> dict[str, Any]:
    rows, pixels = seen.found.rows, seen.found.class_pixels
    total = max(1, int(pixels.sum()))
    return {
        "empty": sum(row.classes <= {0} for row in rows),
        "full": sum(0 not in row.classes for row in rows),
        "pixel_share": {name: float(f"{int(n) / total:.4g}") for name, n in zip(seen.classes, pixels, strict=True)},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, middle and largest value."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    return {"min": _short(ordered[0]), "median": _short(middle), "max": _short(ordered[-1])}


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def common(values: Sequence[str], most: int = 12) -> Mapping[str, int]:
    """How often each value occurs, the most frequent first; the rest together as "other"."""
    counted = Counter(values).most_common()
    shown = dict(counted[:most])
    rest = sum(count for _, count in counted[most:])
    return {**shown, "other": rest} if rest else shown
