"""The tables of engines, baselines and attacks."""

from __future__ import annotations

from fedvfm import registry

ENGINES = registry.Table(
    "engine",
    {
        "deployment": "fedvfm.simulation.engines.deployment:run",
        "in-process": "fedvfm.simulation.engines.in_process:run",
        "ray": "fedvfm.simulation.engines.ray:run",
    },
)

BASELINES = registry.Table(
    "baseline",
    {
        "classical": "fedvfm.simulation.baselines:classical_arm",
        "head-only": "fedvfm.simulation.baselines:head_only",
        "image-alone": "fedvfm.simulation.baselines:image_alone",
        "leave-one-out": "fedvfm.simulation.baselines:leave_one_out",
        "local-only": "fedvfm.simulation.baselines:local_only",
        "majority": "fedvfm.simulation.baselines:majority",
        "pooled": "fedvfm.simulation.baselines:pooled",
        "pooled-2x": "fedvfm.simulation.baselines:pooled_twice",
        "table-alone": "fedvfm.simulation.baselines:table_alone",
        "unet": "fedvfm.simulation.baselines:unet",
        "zero-shot": "fedvfm.simulation.baselines:zero_shot",
    },
)

ATTACKS = registry.Table(
    "attack",
    {
        "absent": "fedvfm.simulation.attacks:Absent",
        "backdoor": "fedvfm.simulation.attacks:Backdoor",
        "label-flip": "fedvfm.simulation.attacks:LabelFlip",
        "little-is-enough": "fedvfm.simulation.attacks:LittleIsEnough",
        "scaled": "fedvfm.simulation.attacks:Scaled",
        "sign-flip": "fedvfm.simulation.attacks:SignFlip",
    },
)
