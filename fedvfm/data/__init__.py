"""Where samples come from, how they become virtual hospitals, and how pixels become what a backbone takes.

Scripts outside the package find here what they use most; inside it modules are imported.
"""

from __future__ import annotations

from fedvfm import registry

_LAZY = {
    "decoding": "fedvfm.data.volumes.dicom_pixels",
    "geometry": "fedvfm.data.volumes.geometry",
    "slices": "fedvfm.data.volumes.slices",
}

__all__ = [
    "decoding",
    "geometry",
    "slices",
]

__getattr__ = registry.face(__name__, _LAZY)
