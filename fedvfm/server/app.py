"""The ServerApp: runs its jobs one after another on whatever Grid Flower hands it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedvfm import errors
from fedvfm.report import progress
from fedvfm.server.rounds import federation


def make_server_app(
    jobs: Sequence[federation.Job],
    observer: progress.Observer = progress.silent,
    drive: Callable[[federation.Federation], object] = federation.Federation.run,
) -> ServerApp:
    """A ServerApp that runs or resumes every job in order.

    Args:
        jobs: what to run.
        observer: told of progress.
        drive: runs one federation; whoever steers it between rounds hands in another.

    Raises (when run):
        ConfigError: if it was given no job; a federation of nothing must not look like a success.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if not jobs:
            raise errors.ConfigError(
                "server", ["this ServerApp was given no federation to run; use: fedvfm simulate EXPERIMENT"]
            )
        for index, job in enumerate(jobs):
            observer(
                "arm",
                name=job.name,
                index=index,
                count=len(jobs),
                rounds=job.locked.recipe.rounds,
                sites=len(job.train_sites),
            )
            drive(federation.Federation(job, grid, observer))

    return app
