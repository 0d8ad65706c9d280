"""Volumes and series: DICOM, NIfTI, NRRD, MetaImage, and where their voxels lie.

Scripts outside the package find here what they use most; inside it modules are imported.
"""

from __future__ import annotations

from fedvfm import registry

_LAZY = {
    "Volume": "fedvfm.data.volumes.volumes:Volume",
    "read_header": "fedvfm.data.volumes.volumes:read_header",
    "read_slice": "fedvfm.data.volumes.volumes:read_slice",
    "read_volume": "fedvfm.data.volumes.volumes:read_volume",
    "slice_of": "fedvfm.data.volumes.volumes:slice_of",
    "write_nifti": "fedvfm.data.volumes.volumes:write_nifti",
}

__all__ = [
    "Volume",
    "read_header",
    "read_slice",
    "read_volume",
    "slice_of",
    "write_nifti",
]

__getattr__ = registry.face(__name__, _LAZY)
