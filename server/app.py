"""Opens the server wing: Flower loads ``app`` from here."""

from fedvfm.server.app import make_server_app

app = make_server_app([])
