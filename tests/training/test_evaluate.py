"""Feature evaluation: uses each valid row once, reports layers, selects the best layer."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from tests.training import toy
from vit_jax_zoo.metrics.feature_probes import create_probe
from vit_jax_zoo.training.evaluate import collect_features, probe_features
from vit_jax_zoo.training.sharding import create_mesh
from vit_jax_zoo.training.train_step import abstract_batch_of, build_evaluation

ROWS, BATCH = 90, 40


class Batches:
  """Random images whose label is the brightest of three pixels; the last batch is padded."""

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


@dataclasses.dataclass(frozen=True)
class Probed(toy.Regression):
  """A task with these features, and no parameters."""

  features_step: Any = None
  feature_views: int = 1

  def init(self, rng, batch):
    return {"params": {}}

  def features(self, variables, batch):
    return self.features_step(variables, batch)


def evaluate(features_step, mesh, probe="linear", views=1, **fields):
  task = Probed(features_step=features_step, feature_views=views)
  batch = abstract_batch_of(next(iter(Batches(0))), BATCH)
  program = build_evaluation(task, batch, mesh=mesh, rules=())
  batches = lambda to_fit=False: Batches(0 if to_fit else 1)  # noqa: E731
  probe = create_probe(probe, **fields)
  return probe_features({"params": {}}, program=program, batches=batches, name="x", probe=probe)


def test_layers_probed_without_padding():
  mesh = create_mesh({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  report = evaluate(features, mesh)
  assert set(report.scores) == {
    "layer_0", "layer_1", "layer_2", "pixels", "best_layer", "accuracy", "strength",
  }  # fmt: skip
  assert report.scores["best_layer"] == 1
  assert report.scores["accuracy"] == report.scores["layer_1"] == report.scores["pixels"] > 0.9
  assert report.scores["layer_0"] < 0.6
  assert len(report.figures["depth"].axes) == 1


def test_single_feature_without_layers():
  mesh = create_mesh({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  features_step = lambda _, batch: {"features": batch["image"]}  # noqa: E731
  report = evaluate(features_step, mesh, "few_shot", shots=(1, 5), seeds=(0,))
  assert set(report.scores) == {
    "accuracy", "1_shot", "1_shot_std", "5_shot", "5_shot_std",
  }  # fmt: skip
  assert report.scores["accuracy"] == report.scores["5_shot"] > 0.6
  assert not report.figures


def test_missing_labels_raise():
  class Unlabelled(Batches):
    def __iter__(self):
      return ({"image": batch["image"], "mask": batch["mask"]} for batch in super().__iter__())

  mesh = create_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
  step = jax.jit(lambda _, batch: {"features": batch["image"]})
  with pytest.raises(ValueError, match=r"'photos': .*label"):
    collect_features(step, {}, Unlabelled(0), mesh, "photos")


def test_views_only_for_test_images():
  has_view = []

  def features(variables, batch):
    has_view.append("view" in batch)
    x = batch["image"]
    view = batch["view"][:, None] if "view" in batch else 0
    return {"features": jax.numpy.where(view == 1, -x, x)}  # the second view has the opposite label

  mesh = create_mesh({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  assert evaluate(features, mesh, views=3).scores["accuracy"] > 0.9  # majority of 2 to 1
  assert has_view == [False, True]  # traced once each
  step = jax.jit(features)
  found = collect_features(step, {}, Batches(1), mesh, "views", views=2)
  assert found.features["features"].shape == (ROWS, 2, 3)
  np.testing.assert_array_equal(found.features["features"][:, 0], Batches(1).images)
  np.testing.assert_array_equal(found.features["features"][:, 1], -Batches(1).images)
  assert len(found.labels) == ROWS


def test_concatenated_layers_reported():
  mesh = create_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
  report = evaluate(features, mesh, concatenate=3)
  assert report.scores["concatenated"] > 0.9
  assert report.scores["accuracy"] == report.scores["layer_1"]  # still the best single layer's
  labels = [text.get_text() for text in report.figures["depth"].axes[0].texts]
  assert any(label.startswith("concatenated: ") for label in labels)
