"""The papers' claims in miniature: `python -m benchmarks.claims.detr`, one module per paper."""
