"""The options of a trial, solved again on what the compressed model sees."""
