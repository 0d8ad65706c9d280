"""Training in jobs of a cluster, through a shared folder: the compute node has no socket, no key and no policy."""
