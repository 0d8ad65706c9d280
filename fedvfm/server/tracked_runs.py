"""A federation's recipes for trackers: ``python -m fedvfm.server.tracked_runs SETTINGS STATE`` is a tracker's process.

It reads files alone. What a site's policy keeps back never came here; what did come goes to a tracker as means over
sites, and under the names of sites where the coordinator's people asked for that.
"""

from __future__ import annotations

from pathlib import Path

from fedvfm.server import state_folder
from fedvfm.tracking import base, follower, values


class Recipes:
    """The recipes that were the present one since this process began.

    Args:
        folder: the server's state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[str, base.Run] = {}

    def __call__(self) -> list[base.Run]:
        """Those there are now."""
        where = state_folder.open_state(self._folder)
        recipe, name = where.about.recipe, where.about.federation
        if recipe not in self._runs:
            parameters = {"hash": recipe, **values.parameters(where.lock().recipe.model_dump(mode="json"))}
            short = recipe[:12]
            folder = where.run_path(recipe)
            self._runs[recipe] = base.Run(f"{name}, recipe {short}", folder, f"{name}/{short}", parameters)
        return [run for run in self._runs.values() if run.folder.is_dir()]


if __name__ == "__main__":
    settings, place = follower.arguments()
    follower.follow(settings, Recipes(place))
