"""Two sides of every comparison that `peers.py` drives: ours, and one small file a peer."""
