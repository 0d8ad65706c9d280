"""What a person sees while a run goes on."""

from __future__ import annotations

from rich.progress import Progress

from fedvfm.simulation.engines import live


def test_the_bar_of_an_arm_that_asks_a_cohort_comes_to_its_end() -> None:
    bar = Progress(disable=True)
    shown = live.Live(bar)
    shown("arm", name="federated", index=0, count=1, rounds=2, sites=8)
    for number in (1, 2):
        shown("round", arm="federated", round=number, rounds=2, sites=["east", "north"])
        for site in ("east", "north"):
            shown("step", arm="federated", round=number, phase="train", site=site, done=1, total=2)
            shown("reply", arm="federated", round=number, phase="train", site=site, loss=0.5)
    (arm,) = [task for task in bar.tasks if task.description.startswith("federated")]
    assert (arm.completed, arm.total) == (4, 4)
