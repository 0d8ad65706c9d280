"""The public side of the server: proxy, nginx, SuperLink, refused requests."""
