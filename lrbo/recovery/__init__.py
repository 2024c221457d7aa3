"""What a little training gives back to a compressed model."""
