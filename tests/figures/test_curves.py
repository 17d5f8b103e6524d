"""Figures of curves and bars: training, probes, transfer suites."""

import numpy as np
import pytest

from vit_jax_zoo.figures.curves import draw_accuracies, draw_metrics, draw_probe, draw_shots

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


def test_probe_accuracy_by_depth():
  figure = draw_probe([0.5, 0.9, 0.7], 1, [("pixels", 0.6)], "Probe")
  (ax,) = figure.axes
  curve, best, level = ax.lines
  np.testing.assert_allclose(curve.get_ydata(), [50, 90, 70])
  np.testing.assert_allclose(best.get_xydata(), [[1, 90]])
  np.testing.assert_allclose(level.get_ydata(), [60, 60])
  texts = {text.get_text() for text in ax.texts}
  assert texts == {"layer 1, selected on validation: 90.0 %", "pixels: 60.0 %"}


def test_bars_of_group_share_color():
  groups = {"pets": "natural", "eurosat": "specialized", "dtd": "natural"}
  figure = draw_accuracies(
    {"pets": 0.9, "eurosat": 0.5, "dtd": 0.7},
    title="VTAB",
    groups=groups,
    means={"natural": 0.8, "mean": 0.7},
  )
  (ax,) = figure.axes
  assert [bar.get_width() for bar in ax.patches] == pytest.approx([90, 50, 70])
  colors = [bar.get_facecolor() for bar in ax.patches]
  assert colors[0] == colors[2] != colors[1]
  assert ax.get_title(loc="left") == "VTAB, mean 70.0 %"
  assert [text.get_text() for text in figure.legends[0].texts] == ["natural 80.0", "specialized"]
  assert ax.yaxis_inverted()


def test_shots_with_standard_deviation():
  figure = draw_shots({"pets": ((1, 5), (0.4, 0.8), (0.1, 0.05))}, title="Few shots")
  (ax,) = figure.axes
  np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 40], [5, 80]])
  band = ax.collections[0].get_paths()[0].vertices[:, 1]
  assert (band.min(), band.max()) == pytest.approx((30, 85))
  assert [text.get_text() for text in ax.texts] == ["40.0", "80.0"]
