"""One file per command: from checked values to a result."""
