"""Files that survive a crash: atomic, private, locked; and chains of hashed lines."""
