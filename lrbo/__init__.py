"""Compress language models by feature-based low-rank factorization, ranks found by search."""

__version__ = "0.1.0"
