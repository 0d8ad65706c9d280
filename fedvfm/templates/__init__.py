"""Files that a person starts from, with every key explained; see :mod:`fedvfm.templates.drafts`."""
