"""From text to token windows."""
