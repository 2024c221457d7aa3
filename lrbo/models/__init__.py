"""A model, and the map of its layers."""
