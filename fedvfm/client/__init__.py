"""The client wing: what runs at a site.

Scripts outside the package find here what they use most; inside it modules are imported.
"""

from __future__ import annotations

from fedvfm import registry

_LAZY = {
    "model": "fedvfm.model.adapted_model",
}

__all__ = [
    "model",
]

__getattr__ = registry.face(__name__, _LAZY)
