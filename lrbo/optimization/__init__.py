"""Ask, tell, save, continue."""
