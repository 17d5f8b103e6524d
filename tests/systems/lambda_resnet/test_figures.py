"""Figure of position lambdas."""

import numpy as np

from vit_jax_zoo.figures.canvas import heat_map
from vit_jax_zoo.systems.lambda_resnet import model


def test_lambdas_are_drawn_in_block_order_scaled_to_their_range(monkeypatch):
  monkeypatch.setattr(model, "MAX_LAYERS", 2)
  norms = np.array([[1, 2], [3, 5]], np.float32)
  layers = {"c4_block10": norms, "c4_block9": 7 * norms, "c3_block1": np.ones((4, 4), np.float32)}
  image = np.full((8, 8, 1), 200, np.uint8)
  figure = model.draw_lambdas(image, layers)
  labels = [ax.get_xlabel() for ax in figure.axes]
  assert labels == ["", "c4 block9, 2 × 2\n7 to 35", "c4 block10, 2 × 2\n1 to 5", ""]
  for ax in figure.axes[1:3]:
    scaled = (norms - 1) / 4
    np.testing.assert_array_equal(ax.images[0].get_array(), heat_map(image, scaled))
