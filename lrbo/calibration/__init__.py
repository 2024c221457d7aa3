"""One pass over text gives all moments that any method needs."""
