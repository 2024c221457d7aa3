"""From values to a finished model: the only room that knows all others."""
