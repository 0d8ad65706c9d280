"""Training and evaluation at a site."""
