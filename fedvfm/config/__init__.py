"""What people write: recipes, experiments, site and server files, their forms and their hours.

Scripts outside the package find here what they use most; inside it modules are imported.
"""

from __future__ import annotations

from fedvfm import registry

_LAZY = {
    "DataContract": "fedvfm.config.schema:DataContract",
    "Experiment": "fedvfm.config.schema:Experiment",
    "PolicyConfig": "fedvfm.config.schema:PolicyConfig",
    "Recipe": "fedvfm.config.schema:Recipe",
    "SiteConfig": "fedvfm.config.schema:SiteConfig",
    "SourceConfig": "fedvfm.config.schema:SourceConfig",
    "parse": "fedvfm.config.schema:parse",
    "read_toml": "fedvfm.config.schema:read_toml",
}

__all__ = [
    "DataContract",
    "Experiment",
    "PolicyConfig",
    "Recipe",
    "SiteConfig",
    "SourceConfig",
    "parse",
    "read_toml",
]

__getattr__ = registry.face(__name__, _LAZY)
