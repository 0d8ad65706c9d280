"""What people write: recipes, experiments, site and server files, their forms and their hours."""
