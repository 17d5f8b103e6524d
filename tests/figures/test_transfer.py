"""Figures of transfer suites: values, colors, legends."""

import numpy as np
import pytest

from vit_jax_zoo.figures.curves import draw_accuracies, draw_shots


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
