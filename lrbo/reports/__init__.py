"""What a journal says, for people."""
