"""Federated statistics before training: what is asked, what a site answers, and what is proposed of it."""
