"""One paper, one file; `registry` finds them by name."""
