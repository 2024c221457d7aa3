"""What a layer can become, and what that costs."""
