"""What the commands do, from checked values to a result; `cli` only reads and prints."""
