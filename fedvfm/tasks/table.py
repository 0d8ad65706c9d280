"""The table of tasks."""

from __future__ import annotations

from fedvfm import registry

TABLE = registry.Table(
    "task",
    {
        "case-classification": "fedvfm.tasks.case_classification:CaseClassification",
        "classification": "fedvfm.tasks.classification:Classification",
        "detection": "fedvfm.tasks.detection:Detection",
        "segmentation": "fedvfm.tasks.segmentation:Segmentation",
    },
)
