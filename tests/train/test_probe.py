"""The probe evaluation: it takes every real row once, names its layers, and chooses honestly."""

import jax
import numpy as np

from vit_jax_zoo.train.probe import LinearProbe
from vit_jax_zoo.train.sharding import create_mesh

ROWS, BATCH = 90, 40


class Batches:
  """Batches of random images whose label is the brightest of three pixels, the last one padded."""

  def __init__(self, seed):
    self.images = np.random.default_rng(seed).normal(0, 1, (ROWS, 3)).astype(np.float32)

  def __len__(self):
    return -(-ROWS // BATCH)

  def __iter__(self):
    for start in range(0, ROWS, BATCH):
      rows = self.images[start : start + BATCH]
      padding = np.full((BATCH - len(rows), 3), 1e6, np.float32)
      labels = np.concatenate([rows.argmax(1), np.full(len(padding), 7)])
      yield {
        "image": np.concatenate([rows, padding]),
        "label": labels.astype(np.int32),
        "mask": np.arange(BATCH) < len(rows),
      }


def features(variables, batch):
  x = batch["image"]
  noise = jax.random.normal(jax.random.key(0), x.shape)
  return {"layers": jax.numpy.stack([noise, x, x * 0.3 + noise], axis=1), "pixels": x}


def test_layers_are_probed_on_all_real_rows():
  mesh = create_mesh({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  evaluation = LinearProbe(jax.jit(features), lambda: Batches(0), lambda: Batches(1), mesh, "probe")
  report = evaluation({})
  assert set(report.scores) == {
    "layer_0", "layer_1", "layer_2", "pixels", "best_layer", "accuracy",
  }  # fmt: skip
  assert report.scores["best_layer"] == 1
  assert report.scores["accuracy"] == report.scores["layer_1"] == report.scores["pixels"] > 0.9
  assert report.scores["layer_0"] < 0.6
  assert len(report.figures["depth"].axes) == 1
