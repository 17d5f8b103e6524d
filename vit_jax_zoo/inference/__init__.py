"""Prediction for images: the protocol (`base`), and a predictor per task."""
