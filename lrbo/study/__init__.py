"""The folder that is the truth of a search."""
