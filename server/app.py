"""``flwr run .``: Flower loads ``app`` from here for a local simulation; a coordinator runs ``fedvfm server start``."""

from fedvfm.simulation.engines.flower_run import make_server_app

app = make_server_app()
