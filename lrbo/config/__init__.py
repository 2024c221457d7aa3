"""From conf/ to values, and back to a command line."""
