"""The R-CNN task: losses, padding, micro-batches, detections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax_zoo.config import rename_fields
from vit_jax_zoo.metrics.detection import DetectionEvaluator
from vit_jax_zoo.ops.boxes import pairwise_iou
from vit_jax_zoo.systems.rcnn.boxes import CONVENTIONS, DetectionLimits, choose_detections
from vit_jax_zoo.systems.rcnn.model import RCNN
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import LossContext

FIELDS = {
  "num_classes": 4, "rpn_batch_size_per_image": 32, "box_batch_size_per_image": 16,
  "box_detections_per_img": 6, "rpn_inside_only": False, "box_score_thresh": 0.0,
}  # fmt: skip


def make_model(**fields):
  return RCNN(
    **{
      "num_classes": 4,
      "backbone": {"blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 4), "stem_width": 8},
      "levels": ("c2", "c3"),
      "width": 8,
      "anchor_sizes": (16, 24, 32),
      "proposals": {"pre_nms_top_n": 40, "post_nms_top_n": 12},
      "canonical_size": 28,
      "canonical_stride": 8,
      "pool_size": 3,
      "mask_pool_size": 3,
      "box_head": {"width": 16},
      "mask_head": {"width": 8, "num_convs": 1},
      **fields,
    }
  )


def make_batch(seed=0, rows=4, side=48, targets=3):
  rng = np.random.default_rng(seed)
  boxes = np.concatenate(
    [rng.uniform(0.3, 0.7, (rows, targets, 2)), rng.uniform(0.3, 0.6, (rows, targets, 2))], axis=2
  )
  return {
    "image": rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8),
    "image_size": np.array([[side, side], [side - 8, side - 16]] * (rows // 2), np.int32),
    "boxes_cxcywh": boxes.astype(np.float32),
    "labels": rng.integers(0, 4, (rows, targets)).astype(np.int32),
    "is_target": np.arange(targets)[None] < np.array([2, 1, 0, 3])[:rows, None],
    "masks": rng.random((rows, targets, side, side)) < 0.5,
  }


def loss_context(task, batch, seed=0):
  return LossContext(
    rng=jax.random.key(seed), step=jnp.int32(0), normalizers=task.normalizers(batch)
  )


@pytest.fixture(scope="module")
def task():
  return create_task("instance_detection", make_model(), **FIELDS)


@pytest.fixture(scope="module")
def variables(task):
  return jax.jit(task.init)(jax.random.key(1), make_batch())


@pytest.fixture(scope="module")
def gradient(task):
  def loss(params, variables, batch, context):
    output = task.loss({**variables, "params": params}, batch, context)
    return output.loss, output

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(gradient, task, variables, batch):
  # With a mask in every batch, all tests share one compiled program.
  batch = {"mask": np.ones(len(batch["image"]), bool), **batch}
  context = loss_context(task, batch)
  (_, output), grads = gradient(variables["params"], variables, batch, context)
  return output, grads


def test_losses_sum_to_total_and_reach_every_module(task, variables, gradient):
  output, grads = run(gradient, task, variables, make_batch())
  values = {name: float(mean.compute()) for name, mean in output.metrics.items()}
  parts = ("objectness_loss", "anchor_box_loss", "class_loss", "box_loss", "mask_loss")
  np.testing.assert_allclose(values["loss"], sum(values[p] for p in parts), rtol=1e-5)
  assert all(values[p] > 0 for p in parts)
  # Untrained: chance level.
  np.testing.assert_allclose(values["objectness_loss"], np.log(2), atol=0.05)
  np.testing.assert_allclose(values["class_loss"], np.log(5), atol=0.3)
  assert 0 <= values["proposal_recall"] <= 1
  for part in ("backbone", "neck", "proposal_head", "box_head", "box_outputs", "mask_head"):
    sizes = [np.abs(g).max() for g in jax.tree.leaves(grads[part])]
    assert np.isfinite(sizes).all()
    assert max(sizes) > 0, part


def test_loss_ignores_padding(task, variables, gradient):
  batch = make_batch()
  noisy = {k: v.copy() for k, v in batch.items()}
  for row, (height, width) in enumerate(batch["image_size"]):
    noisy["image"][row, height:] = 255
    noisy["image"][row, :, width:] = 0
  padding = ~batch["is_target"]
  noisy["boxes_cxcywh"][padding] = np.nan
  noisy["labels"][padding] = 99
  noisy["masks"][padding] = True
  one, _ = run(gradient, task, variables, batch)
  other, _ = run(gradient, task, variables, noisy)
  np.testing.assert_array_equal(one.loss, other.loss)


def test_loss_ignores_padded_rows(task, variables, gradient):
  batch = {**make_batch(), "mask": np.array([True, True, False, False])}
  other = {k: v.copy() for k, v in batch.items()}
  other["image"][2:] = 0
  other["is_target"][2:] = True
  one, _ = run(gradient, task, variables, batch)
  two, _ = run(gradient, task, variables, other)
  np.testing.assert_allclose(one.loss, two.loss, rtol=1e-6)
  assert float(one.metrics["loss"].count) == 2


def test_losses_without_objects_are_finite(task, variables, gradient):
  batch = {**make_batch(), "is_target": np.zeros((4, 3), bool)}
  output, grads = run(gradient, task, variables, batch)
  values = {name: float(mean.total) for name, mean in output.metrics.items()}
  assert values["anchor_box_loss"] == values["box_loss"] == values["mask_loss"] == 0
  assert values["objectness_loss"] > 0
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_loss_of_invalid_label_is_nan(task, variables, gradient):
  batch = make_batch()
  batch["labels"][0, 0] = 4
  assert np.isnan(run(gradient, task, variables, batch)[0].loss)


jitted_iou = jax.jit(pairwise_iou)


def test_detections_are_padded_and_in_original_pixels(task, variables):
  batch, compiled = make_batch(), jax.jit(task.predict)

  def predict(variables, batch):
    return jax.tree.map(np.asarray, compiled(variables, batch))

  detections = predict(variables, batch)
  assert detections["boxes_xyxy"].shape == (4, 6, 4)
  assert detections["box_masks"].shape == (4, 6, 6, 6)
  assert detections["labels"].dtype == jnp.int32
  scaled = predict(variables, {**batch, "original_size": 2 * batch["image_size"]})
  np.testing.assert_allclose(scaled["boxes_xyxy"], 2 * detections["boxes_xyxy"], rtol=1e-6)
  assert (np.diff(detections["scores"]) <= 0).all()
  for row, (height, width) in enumerate(batch["image_size"]):
    assert (np.asarray(detections["boxes_xyxy"][row]) <= np.tile([width, height], 2) + 1e-4).all()
    assert not detections["scores"][row][~detections["is_object"][row]].any()
    overlap = np.asarray(jitted_iou(*[detections["boxes_xyxy"][row]] * 2)) - np.eye(6)
    for label in range(4):
      own = detections["is_object"][row] & (detections["labels"][row] == label)
      assert (overlap[np.ix_(own, own)] <= task.box_nms_thresh + 1e-5).all()


jitted = jax.jit(choose_detections, static_argnames=("limits", "convention"))


def test_perfect_predictions_have_ap_of_one():
  batch = make_batch(targets=3)
  row = 3
  size = jnp.asarray(batch["image_size"][row])
  center, sides = np.split(batch["boxes_cxcywh"][row], 2, axis=1)
  scale = np.asarray(size)[::-1]
  boxes = np.concatenate([center - sides / 2, center + sides / 2], axis=1) * np.tile(scale, 2)
  boxes = np.clip(boxes, 0, np.tile(scale, 2))
  proposals = jnp.asarray(np.concatenate([boxes, boxes + 1]), jnp.float32)
  labels = np.tile(batch["labels"][row], 2)
  logits = jnp.where(jax.nn.one_hot(labels, 5) > 0, jnp.r_[[9.0] * 3, [6.0] * 3][:, None], 0.0)
  boxes, scores, labels, _ = jitted(
    logits, jnp.zeros((6, 5, 4)), proposals, jnp.ones(6, bool), size,
    limits=DetectionLimits(detections_per_img=5), convention=CONVENTIONS["torchvision"],
  )  # fmt: skip
  evaluator = DetectionEvaluator(4)
  one = {k: v[row : row + 1] for k, v in batch.items()}
  found = {"boxes_xyxy": boxes, "scores": scores, "labels": labels}
  evaluator.add(one, {k: np.asarray(v)[None] for k, v in found.items()})
  assert evaluator.result()["box_ap50"] > 0.99


@pytest.mark.multidevice
def test_loss_and_predictions_trace_on_mesh(task, variables):
  """Traces the per-device loops without compiling them."""
  batch = make_batch()
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    loss = jax.jit(lambda v, b: task.loss(v, b, loss_context(task, b)).loss)
    assert jax.eval_shape(loss, variables, batch).shape == ()
    assert jax.eval_shape(jax.jit(task.predict), variables, batch)["scores"].shape == (4, 6)


@pytest.mark.multidevice
@pytest.mark.slow
def test_losses_and_gradients_on_devices_equal_single_device(task, variables, gradient):
  batch = make_batch()
  output, grads = run(gradient, task, variables, batch)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    many, many_grads = run(gradient, task, everywhere, split)
  assert many.metrics.keys() == output.metrics.keys()
  for name, mean in output.metrics.items():
    np.testing.assert_allclose(many.metrics[name].total, mean.total, rtol=1e-4, err_msg=name)
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(many_grads), strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_micro_batch_losses_sum_to_batch_loss():
  """With every candidate sampled, nothing is random, and all images have equally many."""
  everything = {
    "rpn_batch_size_per_image": 10_000,
    "rpn_positive_fraction": 1.0,
    "box_batch_size_per_image": 15,
  }
  everything |= {"box_positive_fraction": 1.0, "box_fg_iou_thresh": 0.0}
  model = make_model(mask_head=None)
  task = create_task("instance_detection", model, **{**FIELDS, **everything})
  batch = make_batch(rows=2)
  batch = {k: np.concatenate([v[:1], v[:1]]) for k, v in batch.items()}
  batch["image"][1] = batch["image"][1, ::-1]
  variables = jax.jit(task.init)(jax.random.key(1), batch)
  normalizers = task.normalizers(batch)

  def losses(batch):
    context = LossContext(rng=jax.random.key(0), step=jnp.int32(0), normalizers=normalizers)
    output = task.loss(variables, batch, context)
    return {name: mean.total for name, mean in output.metrics.items()}, output.loss

  whole, loss = jax.jit(losses)(batch)
  half = jax.jit(losses)
  parts = [half({k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
  assert abs(parts[0][1] - parts[1][1]) > 1e-6
  np.testing.assert_allclose(parts[0][1] + parts[1][1], loss, rtol=1e-4)
  for name in ("objectness_loss", "anchor_box_loss", "class_loss", "loss"):
    np.testing.assert_allclose(parts[0][0][name] + parts[1][0][name], whole[name], rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_losses_are_near_float32(task, variables, gradient):
  """Losses are float32, and near those in float32, though other boxes are sampled."""
  batch = make_batch()
  exact, _ = run(gradient, task, variables, batch)
  rough_task = create_task("instance_detection", make_model(dtype="bfloat16"), **FIELDS)
  half = jax.jit(rough_task.loss)(variables, batch, loss_context(rough_task, batch))
  assert half.loss.dtype == jnp.float32
  for name in ("objectness_loss", "anchor_box_loss", "class_loss", "loss"):
    one, other = exact.metrics[name].compute(), half.metrics[name].compute()
    np.testing.assert_allclose(other, one, rtol=0.1, err_msg=name)


@pytest.mark.slow
def test_jit_equals_eager(task, variables):
  batch = {k: v[:1] for k, v in make_batch().items()}
  context = loss_context(task, batch)
  eager = task.loss(variables, batch, context)
  jitted = jax.jit(task.loss)(variables, batch, context)
  for name, mean in eager.metrics.items():
    np.testing.assert_allclose(jitted.metrics[name].total, mean.total, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rpn_fg_iou_thresh": 1.5}, "rpn_fg_iou_thresh: 1.5"),
    ({"box_batch_size_per_image": 0}, "box_batch_size_per_image"),
    ({"box_smooth_l1_beta": -1.0}, "box_smooth_l1_beta: -1.0"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    create_task("instance_detection", make_model(), **{**FIELDS, **fields})


def test_num_classes_unlike_model_raises(variables):
  task = create_task("instance_detection", make_model(), **{**FIELDS, "num_classes": 7})
  with pytest.raises(ValueError, match="num_classes: 4 in the model"):
    jax.eval_shape(lambda: task.loss(variables, make_batch(), loss_context(task, make_batch())))


def test_old_config_fields_are_renamed_or_raise():
  old = {"task": {"anchor_high": 0.7}, "model": {"proposals": {"before_nms": 9, "least_side": 0.0}}}
  new = {"task": {"rpn_fg_iou_thresh": 0.7}, "model": {"proposals": {"pre_nms_top_n": 9}}}
  assert rename_fields(old) == new
  with pytest.raises(ValueError, match=r"config\.model\.proposals\.least_side: .*2\.0"):
    rename_fields({"model": {"proposals": {"least_side": 2.0}}})
