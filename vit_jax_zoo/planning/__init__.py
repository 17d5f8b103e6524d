"""What a run would need on a machine that is not here: compiled, measured, compared."""
