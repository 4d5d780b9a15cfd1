"""What the package carries so that everything works offline: a small language model and the corpus every Python user has."""
