"""TTSR's losses against the official code; the super-resolution task."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from tests.systems.ttsr.goldens import (
  TINY,
  WEIGHTS,
  NarrowTask,
  discriminator_params,
  nhwc,
  vgg_params,
)
from vit_jax_zoo.config import rename_fields
from vit_jax_zoo.systems.ttsr.losses import Discriminator, transferal_loss, wasserstein_loss
from vit_jax_zoo.systems.ttsr.model import SHARDING_RULES
from vit_jax_zoo.systems.ttsr.task import SuperResolution, exchange_references, to_pixels
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import LossContext
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.train_step import TrainingOptions, abstract_batch_of, build_program

# --- losses ------------------------------------------------------------------------------------


@functools.cache
def fn_fixture():
  folder = golden_folder("ttsr_fn_a")
  return (
    load_file(folder / "weights.safetensors"),
    dict(np.load(folder / "inputs.npz")),
    dict(np.load(folder / "outputs.npz")),
  )


def test_perceptual_loss_equals_official_code():
  weights, inputs, outputs = fn_fixture()
  task, vgg = NarrowTask(TINY), vgg_params(weights)
  sr, hr = nhwc(inputs["sr"]), nhwc(inputs["hr"])
  features = jax.jit(lambda x: task._vgg.apply({"params": vgg}, x))(sr)["relu5_1"]
  np.testing.assert_allclose(features, nhwc(outputs["vgg_relu5_1_sr"]), atol=1e-5)
  losses = jax.jit(task.perceptual_loss)(vgg, sr, hr)
  np.testing.assert_allclose(np.mean(losses), outputs["per_loss"][0], rtol=1e-5)
  np.testing.assert_allclose(np.mean(np.abs(sr - hr)), outputs["rec_l1"][0], rtol=1e-5)


def test_transferal_loss_equals_official_code():
  _, inputs, outputs = fn_fixture()
  features = tuple(nhwc(inputs[f"map_lv{i}"]) for i in (3, 2, 1))
  textures = tuple(nhwc(inputs[f"T_lv{i}"]) for i in (3, 2, 1))
  loss = np.mean(transferal_loss(features, textures))
  np.testing.assert_allclose(loss, outputs["tpl_l2_noS"][0], rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class FixedEpsilon(NarrowTask):
  """The task with the official code's interpolation factors for the gradient penalty."""

  epsilon: jax.Array | None = None

  def draw_epsilon(self, rng, count):
    return self.epsilon


def test_discriminator_loss_and_gradient_penalty_equal_official_code():
  weights, inputs, outputs = fn_fixture()
  params, fake, real = discriminator_params(weights, 2), nhwc(inputs["sr"]), nhwc(inputs["hr"])
  epsilon = jnp.asarray(inputs["gp_epsilon"][0].reshape(-1))
  task = FixedEpsilon(TINY, adversarial_weight=1.0, epsilon=epsilon)
  batch = {"image": (real + 1) * 127.5}
  context = LossContext(jax.random.key(0), jnp.int32(0), {}, "discriminator", fake)

  def terms(params):
    losses, metrics = task._discriminator_terms(
      {"params": {"discriminator": params}}, batch, context
    )
    difference, penalty = metrics["score_difference"][0], metrics["gradient_penalty"][0]
    scores = task._discriminator.apply({"params": params}, fake)
    return jnp.mean(losses), (difference, penalty, scores)

  gradients, (difference, penalty, scores) = jax.jit(jax.grad(terms, has_aux=True))(params)
  fake, true = outputs["adv/d_fake"][:, 0], outputs["adv/d_real"][:, 0]
  np.testing.assert_allclose(scores, fake, rtol=1e-4)
  np.testing.assert_allclose(difference, fake - true, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(penalty, (outputs["adv/grad_norm"] - 1) ** 2, rtol=1e-4)
  np.testing.assert_allclose(10 * np.mean(penalty), outputs["adv/gp"][0], rtol=1e-5)
  for ours, theirs in (
    (gradients["conv1_1"]["kernel"].transpose(3, 2, 0, 1), outputs["adv/g_conv1.weight"]),
    (gradients["hidden"]["bias"], outputs["adv/g_fc1.bias"]),
    (gradients["score"]["kernel"].T, outputs["adv/g_fc2.weight"]),
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_gradient_penalty_of_constant_discriminator_is_finite():
  images = jnp.ones((2, 4, 4, 3))

  def loss(weight):
    score = functools.partial(lambda w, x: jnp.sum(w * x, axis=(1, 2, 3)), weight)
    return jnp.sum(wasserstein_loss(score, images, 0.5 * images, jnp.ones(2))[1])

  value, gradient = jax.value_and_grad(loss)(0.0)
  assert np.isclose(value, 2)
  assert np.isfinite(gradient)


# --- the task -----------------------------------------------------------------------------------


def tiny_batch(count=2, seed=0):
  rng = np.random.default_rng(seed)

  def random_images(height, width):
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)

  return {
    "low_res_image": random_images(3, 4),
    "upsampled_image": random_images(12, 16),
    "image": random_images(12, 16),
    "ref_image": random_images(8, 12),
    "blurred_ref_image": random_images(8, 12),
  }


class Scale:
  """A generator that scales the sum of the enlarged image and of the reference's mean colour."""

  variables: ClassVar = {"params": {"generator": {"scale": np.float32(0.4)}}}

  def init(self, rng, *images):
    return {"params": {"scale": jnp.ones(())}}

  def apply(self, variables, low_res, upsampled, reference, blurred):
    colour = jnp.mean(reference, axis=(1, 2), keepdims=True)
    cells = low_res.shape[:3]
    return {
      "image": variables["params"]["scale"] * (upsampled + colour),
      "hard_attention": jnp.zeros(cells, jnp.int32),
      "soft_attention": jnp.ones(cells),
    }


def scale_loss(batch):
  task = SuperResolution(Scale())
  context = LossContext(jax.random.key(0), jnp.int32(0), task.normalizers(batch), "generator")
  return jax.jit(task.loss)(Scale.variables, batch, context)


def test_reconstruction_loss_needs_one_optim_group_and_no_vgg():
  task, batch = create_task("super_resolution", Scale()), tiny_batch()
  assert [group.name for group in task.optim_groups] == ["generator"]
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  assert set(shapes) == {"params"}
  assert set(shapes["params"]) == {"generator"}
  output = scale_loss(batch)
  upsampled, reference, truth = (
    batch[name] / np.float32(127.5) - 1 for name in ("upsampled_image", "ref_image", "image")
  )
  image = 0.4 * (upsampled + reference.mean(axis=(1, 2), keepdims=True))
  expected = np.abs(image - truth).mean()
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
  assert set(output.metrics) == {"loss", "reconstruction_loss"}


def test_adversarial_loss_needs_two_optim_groups():
  task = create_task("super_resolution", Scale(), **WEIGHTS, begin_step=7)
  discriminator, generator = task.optim_groups
  assert (discriminator.name, discriminator.updates, discriminator.begin_step) == (
    "discriminator",
    2,
    7,
  )
  assert (generator.name, generator.updates, generator.begin_step) == ("generator", 1, 0)
  batch = {key: np.tile(x, (1, 8, 8, 1)) for key, x in tiny_batch(1).items()}
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  assert set(shapes) == {"params", "vgg"}
  assert set(shapes["params"]) == {"generator", "discriminator"}


class CountingTask(SuperResolution):
  """Records each trace of the generator."""

  _discriminator = Discriminator((2,), 4)
  generator_traces: ClassVar[list[bool]] = []

  def _generate(self, params, batch):
    self.generator_traces.append(True)
    return super()._generate(params, batch)


def test_discriminator_updates_share_generated_images():
  task, batch = CountingTask(Scale(), adversarial_weight=1.0), tiny_batch()
  sgd = {"name": "sgd", "learning_rate": 0.1}
  program = build_program(
    task,
    abstract_batch_of(batch, len(batch["image"])),
    TrainingOptions({"generator": sgd, "discriminator": sgd}, num_steps=2),
    mesh=sharding.create_mesh({"data": 1}, jax.devices()[:1]),
    rules=SHARDING_RULES,
  )
  with jax.set_mesh(program.mesh):
    jax.eval_shape(program.train_step, program.abstract_state, program.abstract_batch)
  assert task.discriminator_updates == 2
  # Once for the discriminator's updates, once for the generator's.
  assert CountingTask.generator_traces == [True, True]


def test_parameter_counts_of_discriminator_and_vgg_equal_published():
  task = SuperResolution(TINY)
  image = jnp.zeros((1, 160, 160, 3))
  for network, count in ((task._discriminator, 17_821_473), (task._vgg, 12_944_972 - 12)):
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_loss_ignores_padded_rows():
  batch, longer = tiny_batch(), tiny_batch(3, seed=9)
  longer = {key: np.concatenate([batch[key], value[:1]]) for key, value in longer.items()}
  longer["mask"] = np.array([True, True, False])
  a, b = scale_loss(batch), scale_loss(longer)
  np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
  assert float(b.metrics["reconstruction_loss"].count) == 2


def test_predictions_are_evaluated_and_drawn():
  task, batch = SuperResolution(TINY), tiny_batch()
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), shapes)
  predictions = jax.tree.map(np.asarray, jax.jit(task.predict)(variables, batch))
  assert predictions["image"].shape == (2, 12, 16, 3)
  assert predictions["image"].dtype == np.uint8
  evaluator = task.evaluator()
  evaluator.add(batch, predictions)
  assert task.best_metric in evaluator.result()
  assert set(task.figures(batch, predictions)) == {"super_resolution"}
  assert set(task.batch_figures(batch)) == {"batch"}


def test_wrong_references_are_rolled_by_half_batch():
  batch = tiny_batch(5)
  batch["mask"] = np.array([True, True, True, True, False])
  exchanged = exchange_references(batch)
  for key in ("ref_image", "blurred_ref_image"):
    np.testing.assert_array_equal(exchanged[key][:4], batch[key][[2, 3, 0, 1]])
  assert set(exchanged) == set(batch)
  one = {key: value[:1] for key, value in batch.items()}
  np.testing.assert_array_equal(exchange_references(one)["ref_image"], one["ref_image"])
  task, pair = SuperResolution(Scale(), wrong_references=True), tiny_batch()
  outputs = jax.jit(task.predict)(Scale.variables, pair)
  swapped = pair | {key: pair[key][::-1] for key in ("ref_image", "blurred_ref_image")}
  expected = jax.jit(task.predict)(Scale.variables, swapped)["image"]
  np.testing.assert_array_equal(outputs["wrong_reference_image"], expected)
  assert np.any(outputs["image"] != expected)


def test_to_pixels_rounds_like_official_code():
  values = jnp.array([-1.2, -1.0, 0.0, 0.999, 1.0, 1.5]).reshape(1, 1, 6, 1)
  np.testing.assert_array_equal(to_pixels(values).reshape(-1), [0, 0, 128, 255, 255, 255])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"perceptual_weight": -1.0}, "perceptual_weight"),
    ({"begin_step": -1}, "begin_step"),
    ({"discriminator_updates": 0}, "discriminator_updates"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    SuperResolution(TINY, **fields)


def test_old_config_fields_are_renamed_or_raise():
  old = {"task": {"adversarial_kind": "wasserstein", "critic_updates": 2}}
  assert rename_fields(old) == {"task": {"discriminator_updates": 2}}
  with pytest.raises(ValueError, match=r"config\.task\.transferal_kind: .*'l1'"):
    rename_fields({"task": {"transferal_kind": "l1"}})
