"""From an allocation to its score."""
