"""What an adapter is for, once it exists."""
