"""The colours of classes, in pictures for people and in files that other programs show."""

from __future__ import annotations

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#0072B2")
"""Foreground classes 1, 2, ... in order, then again from the first.

Source: Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind readers.
"""

SHADE = 0.02
"""How much darker each further round of the colours is: 37 rounds make 256 classes."""


def of(number: int) -> str:
    """The colour of foreground class ``number``, from 1."""
    return COLOURS[(number - 1) % len(COLOURS)]


def palette(classes: int) -> list[int]:
    """Red, green and blue of each class number, for a picture of numbers: the background black, no two alike, no grey.

    The first seven classes have their colours of :func:`of`; then these again, each time a little darker.
    """
    shown = [0, 0, 0]
    for number in range(1, classes):
        paler = 1.0 - SHADE * ((number - 1) // len(COLOURS))
        shown += [round(int(of(number)[at : at + 2], 16) * paler) for at in (1, 3, 5)]
    return shown
