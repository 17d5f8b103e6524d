import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from tests.variables import random_variables
from vit_jax_zoo.config import rename_fields
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.tasks import base, create_task


class Pixelwise(nn.Module):
  """Logits of every second pixel from its color alone."""

  num_classes: int = 3
  auxiliary: bool = False

  @nn.compact
  def __call__(self, images, *, train=False):
    logits = nn.Dense(self.num_classes, name="head")(images[:, ::2, ::2])
    self.sow("intermediates", "images", images)
    return {"logits": logits, **({"auxiliary_logits": 2 * logits} if self.auxiliary else {})}


def make_task(**fields):
  auxiliary = fields.pop("auxiliary", False)
  return create_task(
    "semantic_segmentation", Pixelwise(auxiliary=auxiliary), num_classes=3, **fields
  )


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  labels = rng.integers(3, size=(3, 6, 8)).astype(np.uint8)
  labels[0, :2], labels[1, :, 5:] = 255, 255
  return {
    "image": rng.integers(256, size=(3, 6, 8, 3)).astype(np.uint8),
    "image_size": np.array([[6, 8], [6, 5], [6, 8]], np.int32),
    "label_map": labels,
    "mask": np.array([True, True, False]),
  }


def make_loss(task):
  """Returns `loss(variables, batch, normalizers)`, compiled once for each shape."""
  compiled = jax.jit(task.loss)

  def loss(variables, batch, normalizers=None):
    normalizers = normalizers or task.normalizers(batch)
    context = base.LossContext(jax.random.key(0), jnp.asarray(0), normalizers)
    return compiled(variables, batch, context)

  return loss


def loss_of(task, variables, batch):
  return make_loss(task)(variables, batch)


def upsample(logits, size):
  """Bilinear upsampling in numpy: pixel centers aligned, edges repeated, one axis at a time."""
  for axis, new in zip((1, 2), size, strict=True):
    old = logits.shape[axis]
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(position).astype(int)
    fraction = (position - low).reshape([-1 if i == axis else 1 for i in range(4)])
    high = np.minimum(low + 1, old - 1)
    logits = np.take(logits, low, axis) * (1 - fraction) + np.take(logits, high, axis) * fraction
  return logits


def reference_losses(task, variables, batch):
  """Cross-entropy in numpy of each labelled pixel in the rows that are not padding."""
  pixels = (batch["image"] / 255 - task.image_mean) / task.image_std
  pixels[1, :, 5:] = 0  # the padding
  head = variables["params"]["head"]
  logits = upsample(
    pixels[:, ::2, ::2] @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), (6, 8)
  )
  labelled = (batch["label_map"] != 255) & batch["mask"][:, None, None]
  chosen = np.take_along_axis(logits, np.minimum(batch["label_map"], 2)[..., None].astype(int), -1)
  losses = np.log(np.exp(logits).sum(-1)) - chosen[..., 0]
  return losses[labelled], (logits.argmax(-1) == batch["label_map"])[labelled], logits


def test_loss_is_mean_over_labelled_pixels(batch):
  task = make_task()
  variables = random_variables(task.init, batch)
  losses, right, logits = reference_losses(task, variables, batch)
  out = loss_of(task, variables, batch)
  assert float(out.loss) == pytest.approx(losses.mean(), rel=1e-5)
  assert float(out.metrics["loss"].compute()) == pytest.approx(losses.mean(), rel=1e-5)
  assert float(out.metrics["pixel_accuracy"].compute()) == pytest.approx(right.mean())
  assert float(out.metrics["loss"].count) == 32 + 30
  predictions = jax.jit(task.predict)(variables, batch)
  np.testing.assert_array_equal(predictions["label_map"], logits.argmax(-1))
  probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(predictions["confidence"], probabilities.max(-1), atol=1e-5)


def test_class_weighted_loss_is_weighted_mean_and_sums_over_micro_batches(batch):
  task = make_task(class_weights=(1.0, 0.5, 4.0))
  variables = random_variables(task.init, batch)
  losses, _, _ = reference_losses(task, variables, batch)
  labelled = (batch["label_map"] != 255) & batch["mask"][:, None, None]
  weights = np.array([1.0, 0.5, 4.0])[batch["label_map"][labelled]]
  expected = np.sum(weights * losses) / weights.sum()  # as torch's CrossEntropyLoss(weight=...)
  loss = make_loss(task)
  out = loss(variables, batch)
  assert float(out.loss) == pytest.approx(expected, rel=1e-5)
  assert float(out.metrics["loss"].compute()) == pytest.approx(expected, rel=1e-5)
  parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
  part_losses = [float(loss(variables, x, task.normalizers(batch)).loss) for x in parts]
  assert sum(part_losses) == pytest.approx(expected, rel=1e-5)


def test_loss_sums_over_micro_batches_and_ignores_padding(batch):
  task = make_task(auxiliary=True)
  variables = random_variables(task.init, batch)
  loss = make_loss(task)
  whole = loss(variables, batch)
  normalizers = task.normalizers(batch)
  parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
  losses = [float(loss(variables, part, normalizers).loss) for part in parts]
  assert sum(losses) == pytest.approx(float(whole.loss), rel=1e-5)
  assert losses[2] == 0
  changed = {**batch, "image": batch["image"].copy(), "label_map": batch["label_map"].copy()}
  changed["image"][1, :, 5:] = 7
  changed["image"][2], changed["label_map"][2] = 9, 1
  assert float(loss(variables, changed).loss) == pytest.approx(float(whole.loss), rel=1e-6)


def test_auxiliary_loss_is_weighted(batch):
  task = make_task(auxiliary=True, auxiliary_weight=0.5)
  variables = random_variables(task.init, batch)
  out = loss_of(task, variables, batch)
  plain = loss_of(make_task(), variables, batch)
  auxiliary = float(out.metrics["auxiliary_loss"].compute())
  assert float(out.loss) == pytest.approx(float(plain.loss) + 0.5 * auxiliary, rel=1e-5)


def test_loss_of_invalid_label_is_nan(batch):
  task = make_task()
  variables = random_variables(task.init, batch)
  batch["label_map"][0, 4, 4] = 3
  assert np.isnan(loss_of(task, variables, batch).loss)


def test_perfect_predictions_are_scored_and_drawn(batch):
  task = make_task(class_names=("sky", "sea", "sand"))
  evaluator = task.evaluator()
  perfect = {"label_map": np.where(batch["label_map"] == 255, 0, batch["label_map"])}
  evaluator.add(batch, perfect)
  scores = evaluator.result()
  assert scores[task.best_metric] == 1.0
  assert scores["pixel_accuracy"] == 1.0
  for figures in (task.batch_figures(batch), task.figures(batch, perfect)):
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert figures
  assert not task.weight_files
  assert make_task(backbone_file="a.pth").weight_files == {"*/backbone": "a.pth"}


class StrideFour(nn.Module):
  """Returns every fourth row and column, rounded up as by strided convolutions."""

  @nn.compact
  def __call__(self, images, *, train=False):
    weight = self.param("weight", nn.initializers.ones, ())
    return {"logits": weight * images[:, ::4, ::4]}


def test_predictions_of_odd_size_are_not_shifted():
  """Cropping the last rows and columns does not shift the other predictions."""
  task = create_task("semantic_segmentation", StrideFour(), num_classes=3)
  image = np.random.default_rng(0).integers(256, size=(1, 32, 40, 3)).astype(np.uint8)
  variables = {"params": {"weight": jnp.ones(())}}
  predict = jax.jit(task.predict)
  whole = predict(variables, {"image": image})["label_map"]
  part = predict(variables, {"image": image[:, :29, :38]})["label_map"]
  np.testing.assert_array_equal(part, whole[:, :29, :38])


@pytest.fixture(scope="module")
def tiny():
  """The task with a small network of the paper, its variables, and its loss with gradients."""
  model = create_model(
    "fpt_segmentation_r50", num_classes=3, width=8, kernel_sizes=(1, 3), window=3,
    dropout_rate=0.0,
    backbone={"blocks": (1, 1, 1, 1), "widths": (4, 4, 4, 4), "stem_width": 4},
  )  # fmt: skip
  task = create_task("semantic_segmentation", model, num_classes=3)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(256, size=(4, 32, 32, 3)).astype(np.uint8),
    "label_map": rng.integers(3, size=(4, 32, 32)).astype(np.uint8),
  }
  variables = random_variables(task.init, batch, small=["head"])

  @jax.jit
  def step(variables, batch):
    def loss(params):
      context = base.LossContext(
        rng=jax.random.key(0), step=jnp.asarray(0), normalizers=task.normalizers(batch)
      )
      output = task.loss({**variables, "params": params}, batch, context)
      return output.loss, output.model_state

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])

  return task, variables, batch, step


@pytest.mark.multidevice
@pytest.mark.slow
def test_loss_and_gradients_on_devices_equal_single_device(tiny):
  """Batch-norm statistics are those of the whole batch, over all devices."""
  _, variables, batch, step = tiny
  (value, state), grads = step(variables, batch)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    (many, many_state), many_grads = step(everywhere, split)
  np.testing.assert_allclose(many, value, rtol=1e-5)
  for one, other in ((state, many_state), (grads, many_grads)):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)


def test_bfloat16_loss_is_near_float32(tiny):
  task, variables, batch, _ = tiny
  exact = loss_of(task, variables, batch).loss
  half_task = dataclasses.replace(task, model=task.model.clone(dtype="bfloat16"))
  out = loss_of(half_task, variables, batch)
  assert out.loss.dtype == jnp.float32
  assert float(out.loss) == pytest.approx(float(exact), rel=0.02)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(out.model_state))


@pytest.mark.slow
def test_jit_equals_eager(tiny):
  task, variables, batch, _ = tiny
  context = base.LossContext(
    rng=jax.random.key(0), step=jnp.asarray(0), normalizers=task.normalizers(batch)
  )
  eager = task.loss(variables, batch, context)
  assert float(loss_of(task, variables, batch).loss) == pytest.approx(float(eager.loss), rel=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"auxiliary_weight": -1.0}, "auxiliary_weight: -"),
    ({"class_names": ("a",) * 4}, "class_names: 4 names"),
    ({"class_weights": (1.0, 2.0)}, "class_weights: 2 numbers"),
    ({"class_weights": (1.0, 2.0, -1.0)}, r"class_weights: .*negative"),
    ({"class_weights": (0.0, 0.0, 0.0)}, r"class_weights: .*negative"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    make_task(**fields)
  with pytest.raises(ValueError, match="num_classes: 256"):
    create_task("semantic_segmentation", Pixelwise(), num_classes=256)


def test_num_classes_unlike_model_raises(batch):
  task = create_task("semantic_segmentation", Pixelwise(num_classes=4), num_classes=3)
  variables = task.init(jax.random.key(0), batch)
  with pytest.raises(ValueError, match="num_classes: 4 in the model"):
    task.predict(variables, batch)


def test_old_config_fields_are_renamed():
  old = {"model": {"flavor": "paper", "neck_fields": {"flavor": "official"}}}
  new = {"model": {"variant": "paper", "neck_fields": {"variant": "official"}}}
  assert rename_fields(old) == new
  assert rename_fields({"model": {"transformer": {"ground_parts": 4}}}) == {
    "model": {"transformer": {}}
  }
