"""``fedvfm data check``: whether this hospital's data and machine can take part. Nothing of it leaves the site."""
