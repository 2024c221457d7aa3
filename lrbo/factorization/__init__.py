"""From one layer to every option of it, ordered by importance."""
