"""The client wing: what runs at a site."""
