"""Programs for images of many sizes."""

import numpy as np

from vit_jax_zoo.inference import base


def test_compiled_sizes_are_bounded(monkeypatch):
  monkeypatch.setattr(base, "MAX_PROGRAMS", 3)
  compiled = []

  def predict(variables, batch):
    compiled.append(batch["image"].shape[1])  # while tracing
    return batch["image"].sum() + variables

  run = base.jit_by_image_size(predict)
  for side in (1, 2, 3, 1, 2, 4, 2, 1, 4, 3):
    assert run(1, {"image": np.ones((1, side, 1, 3))}) == 3 * side + 1
  assert compiled == [1, 2, 3, 4, 3]  # 3 was used least recently


def test_pad_example_keeps_the_size_of_the_image():
  example = {"image": np.ones((5, 8, 3), np.float32)}
  padded = base.pad_example(example, lambda side: -(-side // 4) * 4)
  assert padded["image"].shape == (8, 8, 3)
  assert padded["image"].sum() == 5 * 8 * 3
  assert padded["image_size"].tolist() == [5, 8]
