"""``flwr run .``: Flower loads ``app`` from here for a local simulation; a hospital runs ``fedvfm client start``."""

from fedvfm.simulation.engines.flower_run import make_client_app

app = make_client_app()
