"""Folders that transformers opens."""
