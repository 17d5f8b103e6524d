"""Functions from arrays to matplotlib figures."""
