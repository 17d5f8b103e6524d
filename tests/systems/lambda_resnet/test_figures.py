"""Figure of position lambdas."""

import numpy as np

from vit_jax_zoo.systems.lambda_resnet import figures


def test_lambdas_are_drawn_in_block_order_scaled_to_their_range(monkeypatch):
  monkeypatch.setattr(figures, "MAX_LAYERS", 2)
  norms = np.array([[1, 2], [3, 5]], np.float32)
  layers = {"c4_block10": norms, "c4_block9": 7 * norms, "c3_block1": np.ones((4, 4), np.float32)}
  figure = figures.draw_lambdas(np.full((8, 8, 1), 200, np.uint8), layers)
  assert [ax.get_xlabel() for ax in figure.axes] == ["", "c4 block9, 2 × 2", "c4 block10, 2 × 2"]
  image = figure.axes[1].images[0]
  np.testing.assert_array_equal(image.get_array(), 7 * norms)
  assert image.get_clim() == (7, 35)
