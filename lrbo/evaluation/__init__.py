"""A number with its unit and its token count."""
