"""What may be wrong with a machine, its files and its way to the other end; used by ``fedvfm doctor`` at both."""
