"""What travels between coordinator and sites, and how its numbers are coded."""
