"""What a one-file HTML report is built from: the shell of a page, and charts. Knows nothing of what it shows."""
