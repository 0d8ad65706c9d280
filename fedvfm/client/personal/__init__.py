"""What a site makes of the final adapter for itself: train on, choose, state what it gained."""
