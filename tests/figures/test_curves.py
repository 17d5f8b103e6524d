"""Training curves: values and steps."""

import numpy as np
import pytest

from vit_jax_zoo.figures.curves import draw_metrics

ROWS = [
  {"step": 50, "train/loss": 2.0, "train/nats": 1.0},
  {"step": 100, "train/loss": 1.0, "test/loss": 1.5, "test/accuracy": 0.5},
]


def test_train_and_test_curves_share_axes():
  figure = draw_metrics(ROWS, ["loss", "accuracy"])
  losses, accuracies = figure.axes
  lines = {line.get_label(): line.get_xydata() for line in losses.lines}
  np.testing.assert_array_equal(lines["train"], [[50, 2.0], [100, 1.0]])
  np.testing.assert_array_equal(lines["test"], [[100, 1.5]])
  assert accuracies.get_title() == "accuracy"
  figure.canvas.draw()


def test_unknown_key_raises():
  with pytest.raises(ValueError, match="'psnr'"):
    draw_metrics(ROWS, ["psnr"])
