"""One file for each part of the seed: that all of it works."""
