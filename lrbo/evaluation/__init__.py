"""What a finished model costs and can do."""
