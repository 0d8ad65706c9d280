"""``python -m fedvfm.cli``: the same entry point as the command ``fedvfm``."""

from fedvfm.cli import main

main.main()
