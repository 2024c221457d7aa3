"""All methods answer one question: which factors, ordered by importance."""
