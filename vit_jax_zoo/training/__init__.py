"""Training loop and its parts; depends on the protocol of tasks, and on no model."""
