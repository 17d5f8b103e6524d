"""The training loop and its parts; it knows tasks by their protocol and no model."""
