"""TPU planner: memory, traffic and a lower bound on the time of a training step."""
