"""Whether a hospital's data can take part: one pass over the pixels, and findings with remedies. Names no patient."""
