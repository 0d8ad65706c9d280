"""One epoch over cases whose vectors are kept: seconds, and the most memory that the process had.

    python benchmarks/case_epoch.py [--cases 200] [--slices 40] [--head mst]

The vectors are drawn, not computed: what is timed is an epoch after the first, in which the backbone has nothing left
to do. The head, the loss, AdamW and the steps are those of a real site, with the shapes of DINOv2-small. Processor
seconds are those of this process on one thread; on a machine that others use too the clock says more.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence

import numpy as np
import torch

from fedvfm.client.training import site as sites
from fedvfm.client.training import trainer
from fedvfm.config import schema
from fedvfm.data import sample as data
from fedvfm.data.partition import virtual_hospitals
from fedvfm.model import adapted_model, feature_cache

CACHE = 1 << 30


class Drawn:
    """A source of cases whose pixels nobody asks for."""

    info = data.SourceInfo("drawn", "classification", ("none", "lesion"), "CC0")

    def samples(self) -> Sequence[data.Sample]:
        """None: the hospital has its own."""
        return ()

    def read(self, sample: data.Sample) -> data.Pixels:
        """Not there: vectors are kept."""
        raise AssertionError("the vectors of every case are kept")


class Kept(sites.Site):
    """A site that draws the vectors of a case in place of computing them."""

    def _computed(self, model, pairs):  # type: ignore[no-untyped-def]
        rng = np.random.default_rng(len(pairs))
        return torch.from_numpy(rng.standard_normal((len(pairs), model.backbone.width)).astype(np.float32))


def main() -> None:
    """Time the second epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--slices", type=int, default=40)
    parser.add_argument("--head", default="mst")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    values = {
        "rounds": 3,
        "threads": 1,
        "backbone": {"name": "dinov2-small-imgfocus"},
        "adapter": {"kind": "head-only"},
        "task": {"kind": "case-classification", "head": chosen.head},
        "data": {"class_names": ["none", "lesion"], "views": 1, "augment": []},
        "optimiser": {"batch_size": 8, "learning_rate": 1e-3},
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    cases = tuple(
        data.Sample(f"case-{at}", at % 2, images=tuple(data.Sample(f"case-{at}-{k}") for k in range(chosen.slices)))
        for at in range(chosen.cases)
    )
    hospital = virtual_hospitals.Hospital("north", Drawn(), cases, (), cases[:1])
    site = Kept("north", hospital, cache=feature_cache.FeatureCache(CACHE), simulated=True)
    adapter, rows = model.initial(), []
    for number in (1, 2):
        wall, own = time.monotonic(), time.process_time()
        update = trainer.train(model, site, adapter, number)
        rows.append({"clock_s": time.monotonic() - wall, "processor_s": time.process_time() - own})
        adapter = update.state
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kept = site.cache.held / (1 << 20)
    shown = {key: round(value, 2) for key, value in rows[1].items()}
    print(json.dumps({"head": chosen.head, **shown, "peak_mib": round(peak, 1), "kept_mib": round(kept, 2)}))


if __name__ == "__main__":
    main()
