"""Scores as the papers report them, computed on the host with numpy."""
