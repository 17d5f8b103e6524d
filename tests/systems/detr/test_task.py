"""The detection task: official losses, padding and order of targets, micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.half_precision import bfloat16_errors
from tests.systems.detr.tiny import Echo, TinyDetector
from tests.variables import random_variables
from vit_jax_zoo.config import rename_fields
from vit_jax_zoo.data.sources.base import DatasetInfo
from vit_jax_zoo.metrics.detection import DetectionEvaluator
from vit_jax_zoo.systems.detr.losses import mask_losses
from vit_jax_zoo.systems.detr.panoptic import PanopticEvaluator, QueryMaskEvaluator
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import LossContext

OFFICIAL = {
  "class_loss": "loss_ce",
  "box_loss": "loss_bbox",
  "giou_loss": "loss_giou",
  "mask_loss": "loss_mask",
  "dice_loss": "loss_dice",
}


def loss_context(task, batch):
  return LossContext(rng=jax.random.key(0), step=jnp.int32(0), normalizers=task.normalizers(batch))


def official_example(load_golden):
  """Model outputs and a batch from the official criterion's fixture."""
  config, inputs, outputs = load_golden("detr_fn_a")
  predictions = {
    "logits": inputs["logits"][-1],
    "boxes_cxcywh": inputs["boxes"][-1],
    "auxiliary_logits": inputs["logits"][:-1],
    "auxiliary_boxes_cxcywh": inputs["boxes"][:-1],
    "mask_logits": inputs["pred_masks"],
  }
  batch = {
    "image": np.zeros((4, *inputs["tgt_masks"].shape[2:], 3), np.uint8),
    "boxes_cxcywh": inputs["tgt_boxes"],
    "labels": inputs["tgt_labels"].astype(np.int32),
    "is_target": inputs["tgt_valid"],
    "masks": inputs["tgt_masks"].astype(bool),
  }
  return config, predictions, batch, outputs


def test_losses_and_gradients_equal_official_code(load_golden):
  config, predictions, batch, expected = official_example(load_golden)

  def loss(predictions):
    task = create_task("detection", Echo(predictions), num_classes=config["num_classes"])
    output = task.loss({"params": {}}, batch, loss_context(task, batch))
    return output.loss, output.metrics

  (total, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(predictions)
  np.testing.assert_allclose(total, expected["crit/total"][0], rtol=1e-5)
  for ours, theirs in OFFICIAL.items():
    for suffix in ("", "_0", "_1"):
      if f"crit/{theirs}{suffix}" in expected:
        value = expected[f"crit/{theirs}{suffix}"][0]
        np.testing.assert_allclose(metrics[ours + suffix].compute(), value, rtol=1e-5)
  error = 100 * metrics["class_error"].compute()
  np.testing.assert_allclose(error, expected["crit/class_error"][0], rtol=1e-5)
  cardinality = metrics["cardinality_error"].compute()
  np.testing.assert_allclose(cardinality, expected["crit/cardinality_error"][0], rtol=1e-6)

  def close(got, wanted):
    np.testing.assert_allclose(got, wanted, atol=1e-6 * np.abs(wanted).max() + 1e-8, rtol=1e-4)

  close(gradients["logits"], expected["grad_logits"][-1])
  close(gradients["auxiliary_logits"], expected["grad_logits"][:-1])
  close(gradients["boxes_cxcywh"], expected["grad_boxes"][-1])
  close(gradients["auxiliary_boxes_cxcywh"], expected["grad_boxes"][:-1])
  close(gradients["mask_logits"], expected["grad_pred_masks"])


@pytest.mark.parametrize("targets", [0, 9])
def test_losses_without_objects_are_finite(load_golden, targets):
  config, predictions, batch, expected = official_example(load_golden)
  for key in ("boxes_cxcywh", "labels", "is_target", "masks"):
    batch[key] = batch[key][:, :targets]
  batch["is_target"] = np.zeros_like(batch["is_target"])
  task = create_task("detection", Echo(predictions), num_classes=config["num_classes"])

  def loss(predictions):
    output = type(task)(Echo(predictions), task.num_classes).loss(
      {"params": {}}, batch, loss_context(task, batch)
    )
    return output.loss, output.metrics

  gradients, metrics = jax.jit(jax.grad(loss, has_aux=True))(predictions)
  np.testing.assert_allclose(
    metrics["class_loss"].compute(), expected["crit_empty/loss_ce"][0], rtol=1e-5
  )
  assert metrics["box_loss"].compute() == metrics["giou_loss"].compute() == 0
  assert metrics["mask_loss"].compute() == metrics["dice_loss"].compute() == 0
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def make_batch(seed=0, rows=4, targets=5, side=8):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8),
    "image_size": rng.integers(3, side + 1, (rows, 2)).astype(np.int32),
    "boxes_cxcywh": rng.uniform(0.2, 0.6, (rows, targets, 4)).astype(np.float32),
    "labels": rng.integers(0, 4, (rows, targets)).astype(np.int32),
    "is_target": np.arange(targets)[None] < np.array([3, 0, 5, 1])[:rows, None],
  }


@pytest.fixture(scope="module")
def task():
  return create_task("detection", TinyDetector(), num_classes=4)


@pytest.fixture(scope="module")
def variables(task):
  return random_variables(task.init, make_batch())


@pytest.fixture(scope="module")
def value_and_grad(task):
  """`value_and_grad(params, batch, normalizers)`, compiled once for each shape."""

  def loss(params, batch, normalizers):
    context = LossContext(jax.random.key(0), jnp.int32(0), normalizers)
    output = task.loss({"params": params}, batch, context)
    return output.loss, output.metrics

  compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def run(params, batch, normalizers):
    # With a mask in every batch, more tests share a program.
    return compiled(params, {"mask": np.ones(len(batch["image"]), bool), **batch}, normalizers)

  return run


def assert_same(left, right, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def test_loss_ignores_order_of_targets(task, variables, value_and_grad):
  batch = make_batch()
  (expected, _), gradient = value_and_grad(variables["params"], batch, task.normalizers(batch))
  order = np.random.default_rng(1).permuted(np.tile(np.arange(5), (4, 1)), axis=1)
  moved = dict(batch)
  for key in ("labels", "is_target"):
    moved[key] = np.take_along_axis(batch[key], order, axis=1)
  moved["boxes_cxcywh"] = np.take_along_axis(batch["boxes_cxcywh"], order[..., None], axis=1)
  (got, _), other = value_and_grad(variables["params"], moved, task.normalizers(moved))
  assert got == expected
  assert_same(gradient, other, rtol=0, atol=0)


@pytest.mark.parametrize("padding_value", [0.0, np.nan])
def test_loss_ignores_padded_targets(task, variables, value_and_grad, padding_value):
  batch = make_batch()
  batch["boxes_cxcywh"] = np.where(
    batch["is_target"][..., None], batch["boxes_cxcywh"], np.float32(padding_value)
  )
  expected, gradient = value_and_grad(variables["params"], batch, task.normalizers(batch))
  padded = dict(batch)
  padded["labels"] = np.pad(batch["labels"], ((0, 0), (2, 3)), constant_values=77)
  padded["is_target"] = np.pad(batch["is_target"], ((0, 0), (2, 3)))
  padded["boxes_cxcywh"] = np.pad(
    batch["boxes_cxcywh"], ((0, 0), (2, 3), (0, 0)), constant_values=padding_value
  )
  got, other = value_and_grad(variables["params"], padded, task.normalizers(padded))
  assert np.isfinite(got[0])
  assert_same((expected, gradient), (got, other), rtol=1e-6, atol=1e-7)


def test_loss_ignores_padded_rows(task, variables, value_and_grad):
  batch = {key: value[:2] for key, value in make_batch().items()}
  expected, gradient = value_and_grad(variables["params"], batch, task.normalizers(batch))
  padded = make_batch() | {"mask": np.arange(4) < 2}
  got, other = value_and_grad(variables["params"], padded, task.normalizers(padded))
  assert_same((expected[0], gradient), (got[0], other), rtol=1e-5, atol=1e-6)
  for name, metric in expected[1].items():
    np.testing.assert_allclose(metric.compute(), got[1][name].compute(), rtol=1e-5)


def test_loss_ignores_image_padding(task, variables, value_and_grad):
  batch = make_batch()
  expected, _ = value_and_grad(variables["params"], batch, task.normalizers(batch))
  noisy = batch["image"].copy()
  for image, (height, width) in zip(noisy, batch["image_size"], strict=True):
    image[height:], image[:, width:] = 255, 1
  batch["image"] = noisy
  got, _ = value_and_grad(variables["params"], batch, task.normalizers(batch))
  assert_same(expected, got, rtol=0, atol=0)


def test_micro_batch_losses_sum_to_batch_loss(task, variables, value_and_grad):
  batch = make_batch()
  normalizers = task.normalizers(batch)
  (loss, metrics), gradient = value_and_grad(variables["params"], batch, normalizers)
  parts = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
  results = [value_and_grad(variables["params"], part, normalizers) for part in parts]
  np.testing.assert_allclose(sum(result[0][0] for result in results), loss, rtol=1e-6)
  summed = jax.tree.map(lambda a, b: a + b, results[0][1], results[1][1])
  assert_same(summed, gradient, rtol=1e-4, atol=1e-6)
  for name, metric in metrics.items():
    merged = results[0][0][1][name].merge(results[1][0][1][name])
    np.testing.assert_allclose(merged.compute(), metric.compute(), rtol=1e-5)


def test_loss_with_more_objects_than_queries_is_finite(variables):
  task = create_task("detection", TinyDetector(num_queries=2), num_classes=4)
  batch = make_batch()
  normalizers = task.normalizers(batch)
  assert normalizers["boxes"] == 9  # every object counts
  assert normalizers["class_weight"] == pytest.approx(2 + 0.2 + 2 + 1.1)
  fresh = random_variables(task.init, batch)
  output = jax.jit(task.loss)(fresh, batch, loss_context(task, batch))
  assert np.isfinite(output.loss)


def test_loss_of_invalid_label_is_nan(task, variables, value_and_grad):
  batch = make_batch()
  batch["labels"][0, 2] = 4
  assert np.isnan(value_and_grad(variables["params"], batch, task.normalizers(batch))[0][0])
  batch["is_target"][0, 2] = False
  assert np.isfinite(value_and_grad(variables["params"], batch, task.normalizers(batch))[0][0])


def test_without_auxiliary_losses_only_last_layer_has_gradient(variables):
  task = create_task("detection", TinyDetector(), num_classes=4, auxiliary_losses=False)
  batch = make_batch()

  def loss(params):
    output = task.loss({"params": params}, batch, loss_context(task, batch))
    return output.loss, output.metrics

  gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  assert not any(name.endswith("_0") for name in metrics)
  assert np.abs(gradient["layer_0"]["kernel"]).max() == 0
  assert np.abs(gradient["layer_1"]["kernel"]).max() > 0


def test_predictions_equal_official_postprocessing(load_golden):
  config, _, outputs = load_golden("detr_a")
  predictions = {"logits": outputs["pred_logits"], "boxes_cxcywh": outputs["pred_boxes"]}
  task = create_task("detection", Echo(predictions), num_classes=config["num_classes"])
  batch = {
    "image": np.zeros((2, 160, 200, 3), np.uint8),
    "original_size": np.array(config["orig_target_sizes"], np.int32),
  }
  got = jax.jit(task.predict)({}, batch)
  np.testing.assert_allclose(got["scores"], outputs["post_scores"], atol=1e-6)
  np.testing.assert_array_equal(got["labels"], outputs["post_labels"])
  np.testing.assert_allclose(got["boxes_xyxy"], outputs["post_boxes"], rtol=1e-5, atol=1e-4)
  best = np.argmax(outputs["pred_logits"], axis=-1)
  np.testing.assert_array_equal(got["is_object"], best != config["num_classes"])


def test_evaluator_depends_on_mask_head_and_stuff_from():
  fields = {"num_classes": 4, "class_names": ["a", "b"], "per_class": True}
  boxes = create_task("detection", TinyDetector(), **fields)
  assert type(boxes.evaluator()) is DetectionEvaluator
  assert boxes.best_metric == "box_ap"
  instances = create_task("detection", TinyDetector(mask_head=True), **fields)
  assert type(instances.evaluator()) is QueryMaskEvaluator
  assert instances.best_metric == "mask_ap"
  panoptic = create_task("detection", TinyDetector(mask_head=True), **fields, stuff_from=2)
  evaluator = panoptic.evaluator()
  assert isinstance(evaluator, PanopticEvaluator)
  assert (evaluator.stuff_from, evaluator.class_names) == (2, ("a", "b"))
  assert panoptic.best_metric == "pq"
  with pytest.raises(ValueError, match=r"stuff_from.*mask_head"):
    create_task("detection", TinyDetector(), **fields, stuff_from=2).evaluator()


def test_masks_without_stuff_report_mask_ap():
  """The boxes are the image's halves; the first mask is right, the second covers the wrong half."""
  left = np.arange(8)[None] < np.full((8, 1), 4)
  masks = np.stack([left, ~left])[None]
  boxes = np.float32([[[0.25, 0.5, 0.5, 1], [0.75, 0.5, 0.5, 1]]])
  logits = np.float32([[[0, 9, 0], [0, 9, 0]]])  # both of class 1
  predictions = {
    "logits": logits,
    "boxes_cxcywh": boxes,
    "mask_logits": np.where(masks[:, [0, 0]], 9.0, -9.0).astype(np.float32),
  }
  task = create_task("detection", Echo(predictions), num_classes=2)
  batch = {
    "image": np.zeros((1, 8, 8, 3), np.uint8),
    "boxes_cxcywh": boxes,
    "labels": np.array([[1, 1]]),
    "is_target": np.ones((1, 2), bool),
    "masks": masks,
  }
  evaluator = task.evaluator()
  evaluator.add(batch, jax.device_get(jax.jit(task.predict)({}, batch)))
  scores = evaluator.result()
  assert scores["box_ap"] == pytest.approx(1)
  # One of two found, and a false positive of the same score: 51 of 101 recall points.
  assert scores["mask_ap"] == pytest.approx(51 / 101)


def test_figures_skip_padded_rows(task, variables):
  batch = make_batch() | {"mask": np.array([True, True, False, True])}
  predictions = {k: np.asarray(v) for k, v in jax.jit(task.predict)(variables, batch).items()}
  assert len(task.figures(batch, predictions)["predictions"].axes) == 8
  assert len(task.batch_figures(batch)["batch"].axes) == 3


@pytest.mark.multidevice
def test_loss_on_devices_equals_single_device(task, variables, value_and_grad):
  batch = make_batch()
  expected = value_and_grad(variables["params"], batch, task.normalizers(batch))
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), (jax.sharding.AxisType.Auto,) * 3)

  @jax.jit
  def run(params, batch):
    def loss(params):
      output = task.loss({"params": params}, batch, loss_context(task, batch))
      return output.loss, output.metrics

    return jax.value_and_grad(loss, has_aux=True)(params)

  with jax.set_mesh(mesh):
    placed = jax.device_put(batch, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    whole = jax.device_put(variables["params"], jax.NamedSharding(mesh, jax.P()))
    assert_same(run(whole, placed), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_classes": 0}, "num_classes"),
    ({"num_classes": 4, "giou_weight": -1.0}, "giou_weight"),
    ({"num_classes": 4, "score_threshold": 1.5}, "score_threshold"),
    ({"num_classes": 1, "class_names": ["a", "b"]}, "class_names: 2"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    create_task("detection", TinyDetector(), **fields)
  assert "\n" not in str(error.value)


def test_num_classes_unlike_model_raises(variables):
  task = create_task("detection", TinyDetector(), num_classes=91)
  with pytest.raises(ValueError, match="num_classes: 4 in the model, 91"):
    task.predict(variables, make_batch())


def test_mask_head_without_masks_raises(load_golden):
  config, predictions, batch, _ = official_example(load_golden)
  del batch["masks"]
  task = create_task("detection", Echo(predictions), num_classes=config["num_classes"])
  with pytest.raises(ValueError, match="masks: missing"):
    jax.eval_shape(lambda b: task.loss({"params": {}}, b, loss_context(task, b)), batch)


def test_mask_losses_bfloat16_gradients_are_near_float32():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(1, 20, 8, 8)), jnp.float32)
  masks = jnp.asarray(rng.random((1, 20, 32, 32)) < 0.3)
  query_of_target = jnp.asarray(rng.permutation(20)[None])
  losses = functools.partial(mask_losses, masks=masks, query_of_target=query_of_target)
  assert max(bfloat16_errors(lambda x: sum(losses(x)), logits)) < 0.01


def test_check_data_warns_of_more_objects_than_queries():
  task = create_task("detection", TinyDetector(), num_classes=3)
  count = task.model.num_queries
  assert not task.check_data(DatasetInfo("x", 1, max_objects=count))
  (line,) = task.check_data(DatasetInfo("x", 1, max_objects=count + 1))
  assert "num_queries" in line


def test_old_config_fields_are_renamed_or_raise():
  old = {"model": {"name": "m", "pre_norm": False}, "task": {"cell_weight": 1.0}}
  assert rename_fields(old) == {"model": {"name": "m"}, "task": {"dense_weight": 1.0}}
  with pytest.raises(ValueError, match=r"config\.model\.pre_norm: .*True"):
    rename_fields({"model": {"pre_norm": True}})
