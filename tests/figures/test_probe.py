import numpy as np

from vit_jax_zoo.figures.curves import draw_probe


def test_accuracy_by_depth():
  figure = draw_probe([0.5, 0.9, 0.7], 1, [("pixels", 0.6)])
  (ax,) = figure.axes
  curve, best, level = ax.lines
  np.testing.assert_allclose(curve.get_ydata(), [50, 90, 70])
  np.testing.assert_allclose(best.get_xydata(), [[1, 90]])
  np.testing.assert_allclose(level.get_ydata(), [60, 60])
  texts = {text.get_text() for text in ax.texts}
  assert texts == {"layer 1, selected on validation: 90.0 %", "pixels: 60.0 %"}
