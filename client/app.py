"""Opens the client wing: Flower loads ``app`` from here."""

from fedvfm.client.app import make_client_app, no_site

app = make_client_app(no_site)
