"""The dense auxiliary loss: predictions of the heads for the encoder's tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems.detr.tiny import Echo
from vit_jax_zoo.systems.detr.losses import (
  covering_target,
  dense_auxiliary_loss,
  token_centers,
)
from vit_jax_zoo.systems.detr.model import Detr
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import LossContext

CLASSES = 3


def test_covering_target_is_smallest_box_around_point():
  boxes = jnp.array([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.3, 0.3], [0.25, 0.25, 0.1, 0.1]]])
  is_target = jnp.array([[True, True, False]])
  points = jnp.array([[[0.25, 0.25], [0.6, 0.25], [1.2, 0.25]]])
  assert covering_target(points, boxes, is_target).tolist() == [[1, 0, -1]]
  assert covering_target(points, boxes[:, :0], is_target[:, :0]).tolist() == [[-1, -1, -1]]


def test_cell_centers_are_relative_to_unpadded_image():
  batch = {"image": np.zeros((2, 8, 16, 3), np.uint8), "image_size": np.array([[8, 16], [4, 8]])}
  centers = np.asarray(token_centers(batch, (2, 4)))
  np.testing.assert_allclose(centers[0, :5, 0], [0.125, 0.375, 0.625, 0.875, 0.125])
  np.testing.assert_allclose(centers[0, [0, 4], 1], [0.25, 0.75])
  np.testing.assert_allclose(centers[1, :, 0], 2 * centers[0, :, 0])  # beyond 1 is padding
  np.testing.assert_allclose(centers[1, :, 1], 2 * centers[0, :, 1])


def perfect_example():
  """Two images of 2x2 cells, one target in the first cell; perfect predictions."""
  batch = {
    "image": np.zeros((2, 8, 8, 3), np.uint8),
    "boxes_cxcywh": np.full((2, 1, 4), 0.25, np.float32),
    "labels": np.array([[1], [0]], np.int32),
    "is_target": np.array([[True], [False]]),
  }
  dense_logits = np.zeros((2, 2, 2, CLASSES + 1), np.float32)
  dense_logits[..., CLASSES] = 50.0
  dense_logits[0, 0, 0] = 50.0 * np.eye(CLASSES + 1)[1]
  outputs = {
    "logits": np.zeros((2, 2, CLASSES + 1), np.float32),
    "boxes_cxcywh": np.full((2, 2, 4), 0.5, np.float32),
    "auxiliary_logits": np.zeros((0, 2, 2, CLASSES + 1), np.float32),
    "auxiliary_boxes_cxcywh": np.zeros((0, 2, 2, 4), np.float32),
    "dense_logits": dense_logits,
    "dense_boxes_cxcywh": np.full((2, 2, 2, 4), 0.25, np.float32),
  }
  return batch, outputs


@jax.jit
def dense_loss(batch, outputs, normalizers=None):
  task = create_task("detection", Echo(outputs), num_classes=CLASSES, dense_weight=1.0)
  normalizers = normalizers or task.normalizers(batch)
  context = LossContext(jax.random.key(0), jnp.int32(0), normalizers)
  return task.loss({"params": {}}, batch, context).metrics["dense_loss"]


def test_dense_loss_of_perfect_predictions_is_zero():
  batch, outputs = perfect_example()
  assert dense_loss(batch, outputs).compute() == pytest.approx(0, abs=1e-6)


def test_losses_are_float32_under_x64_and_strict_promotion():
  batch, outputs = perfect_example()
  with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
    assert dense_loss(batch, outputs).compute().dtype == jnp.float32


def test_dense_loss_weights_equal_query_loss_weights():
  batch, outputs = perfect_example()
  outputs["dense_boxes_cxcywh"][0, 0, 0, 0] = 0.35  # IoU .15 / .35; the enclosing box adds nothing
  expected = 5 * 0.1 + 2 * (1 - 0.15 / 0.35)
  assert dense_loss(batch, outputs).compute() == pytest.approx(expected / 2, rel=1e-5)
  outputs["dense_boxes_cxcywh"][0, 1, 1] = 0.9  # boxes of background cells do not count
  assert dense_loss(batch, outputs).compute() == pytest.approx(expected / 2, rel=1e-5)
  outputs["dense_boxes_cxcywh"][:] = 0.25
  outputs["dense_logits"][1] = 0.0
  chance = np.log(CLASSES + 1) / 2  # weighted mean over cells, then mean over images
  assert dense_loss(batch, outputs).compute() == pytest.approx(chance, rel=1e-5)


def test_dense_loss_ignores_padded_rows_and_sums_over_micro_batches():
  batch, outputs = perfect_example()
  outputs["dense_logits"][:] = np.random.default_rng(0).normal(size=outputs["dense_logits"].shape)
  whole = dense_loss(batch, outputs)
  normalizers = create_task("detection", Echo(outputs), num_classes=CLASSES).normalizers(batch)
  parts = []
  for i in range(2):
    rows = {k: v[i : i + 1] for k, v in batch.items()}
    own = {k: v[:, i : i + 1] if "auxiliary" in k else v[i : i + 1] for k, v in outputs.items()}
    parts.append(dense_loss(rows, own, normalizers))
  added = sum(part.total for part in parts)
  assert added == pytest.approx(float(whole.total), rel=1e-5)
  first = dense_loss({**batch, "mask": np.array([True, False])}, outputs)
  assert first.compute() == pytest.approx(float(parts[0].total), rel=1e-5)  # divided by 2, times 2


def test_dense_weight_without_dense_predictions_raises():
  with pytest.raises(ValueError, match=r"dense_weight.*dense_predictions"):
    dense_auxiliary_loss({}, perfect_example()[0], (1.0, 5.0, 2.0), 0.1)


def test_dense_weight_decays_linearly():
  batch, outputs = perfect_example()
  outputs["dense_logits"][:] = 0.0
  task = create_task(
    "detection", Echo(outputs), num_classes=CLASSES, dense_weight=2.0, dense_steps=8
  )
  plain = create_task("detection", Echo(outputs), num_classes=CLASSES)

  @jax.jit
  def dense_weight(step):
    context = LossContext(jax.random.key(0), step, task.normalizers(batch))
    output = task.loss({"params": {}}, batch, context)
    rest = plain.loss({"params": {}}, batch, context).loss
    return (output.loss - rest) / output.metrics["dense_loss"].compute()

  weights = [float(dense_weight(jnp.int32(step))) for step in (0, 2, 6, 8, 100)]
  np.testing.assert_allclose(weights, [2.0, 1.5, 0.5, 0.0, 0.0], atol=1e-5)
  with pytest.raises(ValueError, match="dense_steps"):
    create_task("detection", Echo(outputs), num_classes=CLASSES, dense_steps=0)


def test_dense_predictions_add_no_parameters():
  fields = {"num_classes": 3, "num_queries": 2, "width": 8, "num_heads": 2, "mlp_dim": 8}
  backbone = {"blocks": (1, 1, 1, 1), "widths": (2, 2, 2, 2), "stem_width": 2}
  fields |= {"encoder_depth": 1, "decoder_depth": 1, "backbone": backbone}
  images = jnp.zeros((1, 64, 96, 3))

  def run(**more):
    model = Detr(**fields, **more)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)

  outputs, variables = run(dense_predictions=True)
  assert outputs["dense_logits"].shape == (1, 2, 3, 4)
  assert outputs["dense_boxes_cxcywh"].shape == (1, 2, 3, 4)
  plain_outputs, plain = run()
  assert plain == variables
  assert set(outputs) - set(plain_outputs) == {"dense_logits", "dense_boxes_cxcywh"}
