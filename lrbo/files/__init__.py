"""Files that are whole or not there, and what they say as typed records."""
