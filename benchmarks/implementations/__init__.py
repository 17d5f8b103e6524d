"""Implementations that `peers.py` compares: this package, and one file per peer."""
