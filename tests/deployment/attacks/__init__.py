"""Attacks on a federation, each a small program that speaks HTTP over TLS through the real public port.

``fleet`` a node of Flower's protocol that can lie . ``updates`` what a malicious site answers, one lie a round .
``strangers`` requests of whoever reaches the port . ``hostile`` what a coordinator that was taken over asks of a site .
``locals`` what another user of the machine reaches . ``bundles`` app bundles with code in them . ``ours`` all of it
against fedvfm . ``stock`` the same against Flower as it comes . ``table`` both beside each other.
"""
