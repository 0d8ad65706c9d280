"""Where samples come from, how they become virtual hospitals, and how pixels become what a backbone takes."""
