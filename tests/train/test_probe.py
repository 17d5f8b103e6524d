"""The probe evaluation: it takes every real row once, names its layers, and chooses honestly."""

import jax
import numpy as np
import pytest

from vit_jax_zoo.evaluation.feature_probes import create_probe
from vit_jax_zoo.train.probe import FeatureEvaluation, collect_features
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


def evaluate(features_step, mesh, probe="linear", **fields):
  batches = {"fit_batches": lambda: Batches(0), "test_batches": lambda: Batches(1)}
  step = jax.jit(features_step)
  return FeatureEvaluation(
    step, **batches, mesh=mesh, name="probe", probe=create_probe(probe, **fields)
  )({})


def test_layers_are_probed_on_all_real_rows():
  mesh = create_mesh({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  report = evaluate(features, mesh)
  assert set(report.scores) == {
    "layer_0", "layer_1", "layer_2", "pixels", "best_layer", "accuracy", "strength",
  }  # fmt: skip
  assert report.scores["best_layer"] == 1
  assert report.scores["accuracy"] == report.scores["layer_1"] == report.scores["pixels"] > 0.9
  assert report.scores["layer_0"] < 0.6
  assert len(report.figures["depth"].axes) == 1


def test_features_of_one_kind_are_asked_as_the_probe_says():
  mesh = create_mesh({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  features_step = lambda _, batch: {"features": batch["image"]}  # noqa: E731
  report = evaluate(features_step, mesh, "few_shot", shots=(1, 5), seeds=(0,))
  assert set(report.scores) == {
    "accuracy", "1_shot", "1_shot_std", "5_shot", "5_shot_std",
  }  # fmt: skip
  assert report.scores["accuracy"] == report.scores["5_shot"] > 0.6
  assert not report.figures


def test_images_need_one_label_each():
  class Unlabelled(Batches):
    def __iter__(self):
      return ({"image": batch["image"], "mask": batch["mask"]} for batch in super().__iter__())

  mesh = create_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
  step = jax.jit(lambda _, batch: {"features": batch["image"]})
  with pytest.raises(ValueError, match="photos: features are probed with one label an image"):
    collect_features(step, {}, Unlabelled(0), mesh, "photos")
