"""From text to the moments of what layers read and of their gradients."""
