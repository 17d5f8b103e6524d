"""Attention maps of the pyramid's levels, by query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.systems.fpt.figures import attention_rows, pad_batch, target_centers
from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer
from vit_jax_zoo.tasks import create_task


def random_batch(rows):
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (rows, 32, 48, 3), dtype=np.uint8),
    "image_size": np.array([[32, 24]] * rows, np.int32),
    "boxes_cxcywh": np.array([[[0.5, 0.25, 0.2, 0.2]]] * rows, np.float32),
    "labels": np.zeros((rows, 1), np.int32),
    "is_target": np.arange(rows)[:, None] < 1,
  }


def attention_intermediates(fine, coarse, rows=2):
  """Returns intermediates of a transformer: attention maps of two levels, and between them."""
  rng = np.random.default_rng(0)

  def entry(queries, keys):
    return {"weights": (jnp.asarray(rng.random((rows, np.prod(queries), np.prod(keys)))),)}

  return {
    "self_0": entry(fine, fine), "self_1": entry(coarse, coarse), "ground_0_1": entry(fine, coarse),
    "self_0_output": (jnp.zeros((rows, *fine, 4)),),
    "self_1_output": (jnp.zeros((rows, *coarse, 4)),),
  }  # fmt: skip


class FakeDetector:
  """A detector whose `propose` returns only attention maps."""

  level_names, size_multiple = ("p2", "p3"), 1

  def __init__(self, neck_class):
    self.neck_class = neck_class

  def apply(self, variables, images, size, *, method, mutable):
    assert (len(images), len(size), method, mutable) == (3, 3, "propose", ["intermediates"])
    return None, {"intermediates": {"neck": attention_intermediates((8, 12), (4, 6), rows=3)}}


def test_attention_rows_are_those_of_query_position():
  intermediates = attention_intermediates((4, 6), (2, 3))
  positions = jnp.asarray([[0.5, 0.5], [1.0, 0.0]])  # rows 2 and 3 of 4, columns 3 and 0 of 6
  result = attention_rows(intermediates, positions)
  for name, weights in (("0", "self_0"), ("0 1", "ground_0_1")):
    rows = np.asarray(intermediates[weights]["weights"][0])
    shape = result[name].shape[1:]
    np.testing.assert_allclose(result[name][0], rows[0, 2 * 6 + 3].reshape(shape), rtol=1e-6)
    np.testing.assert_allclose(result[name][1], rows[1, 3 * 6].reshape(shape), rtol=1e-6)
  assert result["0 1"].shape == result["1"].shape == (2, 2, 3)
  in_window = {**intermediates, "ground_0_1": {"weights": (jnp.zeros((2, 4, 6, 9)),)}}
  assert set(attention_rows(in_window, positions)) == {"0", "1"}


def test_target_centers_are_relative_to_padded_image():
  batch = random_batch(2)
  image_only = {key: batch[key] for key in ("image", "image_size")}
  np.testing.assert_allclose(target_centers(image_only), [[0.5, 0.25]] * 2)
  np.testing.assert_allclose(target_centers(batch), [[0.25, 0.25], [0.5, 0.25]])
  np.testing.assert_allclose(target_centers({"image": batch["image"]}), [[0.5, 0.5]] * 2)


def test_explain_draws_three_images_or_raises():
  task = create_task("instance_detection", FakeDetector(FeaturePyramidTransformer), num_classes=3)
  explanation = jax.device_get(jax.jit(task.explain)({}, random_batch(4)))
  assert len(explanation["image"]) == 3
  shapes = {"0": (3, 8, 12), "1": (3, 4, 6), "0 1": (3, 4, 6)}
  assert {name: x.shape for name, x in explanation["levels"].items()} == shapes
  figure = task.draw_explanation(explanation).images["levels"]
  titles = [ax.get_title() for ax in figure.axes[:4]]
  assert titles == ["query: ring", "p2: 8x12", "p3: 4x6", "p2: 8x12 at p3: 4x6"]
  assert len(figure.axes) == 3 * 4 + 1  # and a colour bar
  with pytest.raises(ValueError, match="attention maps of 65x64"):
    attention_rows({"self_0_output": (jnp.zeros((1, 65, 64, 1)),)}, jnp.zeros((1, 2)))
  with pytest.raises(ValueError, match="the model's neck"):
    create_task("instance_detection", FakeDetector(object), num_classes=3).explain(
      {}, random_batch(1)
    )


def test_pad_batch_rescales_positions():
  batch = {**random_batch(1), "query_position": np.array([[0.75, 0.5]], np.float32)}
  padded = pad_batch(batch, 40)
  assert padded["image"].shape == (1, 40, 80, 3)
  np.testing.assert_allclose(np.asarray(padded["query_position"]) * [40, 80], [[24, 24]])
  np.testing.assert_allclose(np.asarray(target_centers(padded)) * [40, 80], [[8, 12]])
  alone = pad_batch({"image": batch["image"]}, 40)
  np.testing.assert_array_equal(alone["image_size"], [[32, 48]])
