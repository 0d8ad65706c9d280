"""Volumes and series: DICOM, NIfTI, NRRD, where their voxels lie."""
