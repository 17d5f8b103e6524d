"""Linen blocks that two or more models share."""
