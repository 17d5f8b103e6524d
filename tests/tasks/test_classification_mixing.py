"""mixup and CutMix: hand-computed mixtures, padding, losses, meshes, figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks.test_classification import make_context
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.classification import Classification, mix_examples
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.train_step import TrainingOptions, abstract_batch_of, build_program

ALL_ROWS = np.ones(6, bool)


def mixing_task(**fields):
  return Classification(None, 6, **fields)


@pytest.fixture(scope="module")
def examples():
  rng = np.random.default_rng(0)
  return rng.random((6, 10, 12, 3), np.float32), np.eye(6, dtype=np.float32)


jitted = jax.jit(mix_examples, static_argnames=("task", "draws"))


def mix(examples, mixing, seed=0, mask=ALL_ROWS, draws=1):
  images, targets = (jnp.asarray(x) for x in examples)
  mixed = jitted(images, targets, jnp.asarray(mask), jax.random.key(seed), mixing, draws)
  return [np.asarray(x) for x in mixed]


def many(examples, mixing, count=400):
  """Mixes the same examples `count` times; returns images [n b h w c] and targets [n b k]."""
  images, targets = (jnp.asarray(x) for x in examples)

  def once(rng):
    return mix_examples(images, targets, jnp.asarray(ALL_ROWS), rng, mixing, draws=6)

  return [
    np.asarray(x) for x in jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(1), count))
  ]


@pytest.mark.parametrize("draws", [1, 6])
def test_mixup_label_weighted_sum_of_neighbours(examples, draws):
  images, targets = mix(examples, mixing_task(mixup_alpha=0.8), draws=draws)
  weights = np.diag(targets)
  assert (np.ptp(weights) == 0) == (draws == 1)
  np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
  for i in range(6):
    assert targets[i, i - 1] == pytest.approx(1 - weights[i], abs=1e-6)
    expected = weights[i] * examples[0][i] + (1 - weights[i]) * examples[0][i - 1]
    np.testing.assert_allclose(images[i], expected, rtol=1e-5)


def test_mixup_weights_folded_beta(examples):
  _, targets = many(examples, mixing_task(mixup_alpha=0.2), 2000)
  weights = np.diagonal(targets, axis1=1, axis2=2)
  assert weights.min() >= 0.5
  # E[max(a, 1 - a)] of Beta(0.2, 0.2), by an independent sample.
  beta = np.random.default_rng(0).beta(0.2, 0.2, 400_000)
  assert weights.mean() == pytest.approx(np.maximum(beta, 1 - beta).mean(), abs=0.005)
  assert (weights > 0.99).mean() == pytest.approx((np.abs(beta - 0.5) > 0.49).mean(), abs=0.02)


@pytest.mark.parametrize("draws", [1, 6])
def test_cutmix_labels_are_pixel_fractions(examples, draws):
  images, targets = mix(examples, mixing_task(cutmix_alpha=1.0), seed=4, draws=draws)
  for i in range(6):
    own = (images[i] == examples[0][i]).all(axis=-1)
    other = (images[i] == examples[0][i - 1]).all(axis=-1)
    assert (own ^ other).all()
    assert own.mean() == pytest.approx(targets[i, i], abs=1e-6)
    assert other.mean() == pytest.approx(targets[i, i - 1], abs=1e-6)
    rows, columns = other.any(axis=1), other.any(axis=0)
    np.testing.assert_array_equal(other, rows[:, None] & columns)  # a box


def test_cutmix_box_area_distribution(examples):
  _, targets = many(examples, mixing_task(cutmix_alpha=1.0))
  weights = np.diagonal(targets, axis1=1, axis2=2)
  # Boxes of the published algorithm, drawn one by one.
  rng, expected = np.random.default_rng(0), []
  for _ in range(4000):
    side = np.sqrt(1 - rng.beta(1, 1))
    area = 1
    for length in (10, 12):
      extent, center = int(length * side), rng.integers(length)
      begin, end = np.clip([center - extent // 2, center + (extent + 1) // 2], 0, length)
      area *= end - begin
    expected.append(1 - area / 120)
  assert weights.mean() == pytest.approx(np.mean(expected), abs=0.025)
  assert weights.std() == pytest.approx(np.std(expected), abs=0.025)


def test_mixing_frequencies(examples):
  mixing = mixing_task(mixup_alpha=1.0, cutmix_alpha=1.0, mix_probability=0.6, cutmix_fraction=0.25)
  images, targets = many(examples, mixing)
  untouched = (images == examples[0]).all(axis=(2, 3, 4))
  pure = ((images == examples[0]) | (images == np.roll(examples[0], 1, axis=0))).all(axis=(2, 3, 4))
  assert untouched.mean() == pytest.approx(0.4, abs=0.05)  # plus a few empty boxes
  assert (pure & ~untouched).mean() == pytest.approx(0.15, abs=0.04)
  labels = targets.mean(axis=0)  # every example has weight 1 in total
  np.testing.assert_allclose(labels.sum(axis=0), 1, atol=0.05)


@pytest.mark.parametrize("mixing", [mixing_task(mixup_alpha=0.8), mixing_task(cutmix_alpha=1.0)])
def test_padding_not_mixed(examples, mixing):
  mask = np.array([True, True, True, True, False, False])
  images = np.where(mask[:, None, None, None], examples[0], np.nan).astype(np.float32)
  mixed, targets = mix((images, examples[1]), mixing, seed=4, mask=mask)
  np.testing.assert_array_equal(mixed[0], images[0])  # its neighbour is padding
  np.testing.assert_array_equal(targets[[0, 4, 5]], np.eye(6)[[0, 4, 5]])
  assert np.isfinite(mixed[:4]).all()
  assert (mixed[1:4] != images[1:4]).any(axis=(1, 2, 3)).all()


def test_mixes():
  assert not mixing_task().mixes
  assert not mixing_task(mixup_alpha=0).mixes
  assert not mixing_task(mixup_alpha=0.2, mix_probability=0).mixes
  assert mixing_task(cutmix_alpha=1).mixes


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mixup_alpha": -0.2}, "mixup_alpha: -0"),
    ({"mix_probability": 2.0}, "mix_probability"),
    ({"cutmix_fraction": -1}, "cutmix_fraction"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    mixing_task(**fields)


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (16, 4, 4, 3), dtype=np.uint8),
    "label": rng.integers(0, 7, 16).astype(np.int32),
  }


class Linear:
  """A model whose logits are the first pixels."""

  def init(self, rng, images, *, train=False):
    return {"params": {}}

  def apply(self, variables, images, *, train=False, rngs=None, mutable=False):
    outputs = {"logits": images.reshape(images.shape[0], -1)[:, :7]}
    return (outputs, {}) if mutable is not False else outputs


def log_softmax(x):
  return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("soft", [False, True])
def test_loss_of_mixture_by_hand(batch, soft):
  """The mixing weight is random: the loss occurs on a grid of weights."""
  task = create_task(
    "classification", Linear(), num_classes=7, mixup_alpha=1.0, label_smoothing=0.1
  )
  one_hot = np.eye(7, dtype=np.float32)[batch["label"]]
  given = batch | ({"label": 0.5 * one_hot + 0.5 / 7} if soft else {})
  context = make_context(task, given)
  loss = float(jax.jit(task.loss)({}, given, context).loss)
  images = batch["image"] / np.float32(127.5) - 1
  targets = np.asarray(given["label"] if soft else one_hot)
  targets = 0.9 * targets + 0.1 / 7
  candidates = []
  for weight in np.linspace(0.5, 1, 2001):
    mixed = weight * images + (1 - weight) * np.roll(images, 1, axis=0)
    labels = weight * targets + (1 - weight) * np.roll(targets, 1, axis=0)
    logits = mixed.reshape(16, -1)[:, :7]
    candidates.append(-(labels * log_softmax(logits)).sum() / 16)
  assert min(abs(np.array(candidates) - loss)) < 1e-4
  assert abs(candidates[-1] - loss) > 1e-3  # the examples are mixed


def test_no_alphas_no_random_numbers(batch, tiny_classifier):
  def operations(**fields):
    task = create_task("classification", tiny_classifier(), num_classes=7, **fields)
    variables = task.init(jax.random.key(0), batch)
    return str(
      jax.make_jaxpr(lambda v: task.loss(v, batch, make_context(task, batch)).loss)(variables)
    )

  plain = operations()
  assert "random_bits" not in plain
  assert operations(mixup_alpha=None, cutmix_alpha=0.0) == plain
  assert operations(mixup_alpha=0.2, mix_probability=0.0) == plain
  assert "random_bits" in operations(mixup_alpha=0.2)


def test_every_example_has_weight_one(batch):
  """A constant prediction has loss log 7 per example, mixed or not, padded or not."""
  task = create_task("classification", Linear(), num_classes=7, cutmix_alpha=1.0)
  blank = batch | {
    "image": np.full_like(batch["image"], 99),
    "mask": np.arange(16) < 11,
  }
  output = jax.jit(task.loss)({}, blank, make_context(task, blank))
  assert float(output.loss) == pytest.approx(np.log(7), rel=1e-6)
  assert float(output.metrics["loss"].count) == 11


def test_prediction_not_mixed(batch, tiny_classifier):
  plain = create_task("classification", tiny_classifier(), num_classes=7)
  mixing = create_task("classification", tiny_classifier(), num_classes=7, mixup_alpha=0.5)
  variables = plain.init(jax.random.key(0), batch)
  left, right = plain.predict(variables, batch), mixing.predict(variables, batch)
  np.testing.assert_array_equal(left["loss"], right["loss"])


def train(task, batch, mesh, devices):
  mesh = sharding.create_mesh(mesh, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    program = build_program(
      task,
      abstract_batch_of(batch, 16),
      TrainingOptions(
        optimizer={"name": "sgd", "learning_rate": 0.1},
        num_steps=3,
        accumulation_steps=2,
      ),
      mesh=mesh,
      rules=((".*", "fsdp"),),
    )
    state, losses = program.initial_state(0), []
    for _ in range(2):
      state, metrics = program.train_step(state, sharding.to_global(batch, mesh))
      losses.append(float(metrics["loss"].compute()))
  return losses


@pytest.mark.multidevice
@pytest.mark.slow
def test_mixing_independent_of_mesh(batch, tiny_classifier):
  task = create_task(
    "classification", tiny_classifier(), num_classes=7, mixup_alpha=0.8, cutmix_alpha=1.0
  )  # fmt: skip
  expected = train(task, batch, {"data": 1}, 1)
  got = train(task, batch, {"data": 2, "fsdp": 4}, 8)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_micro_batches_mixed_internally(batch):
  """Two micro-batches of one class each are unmixed; each has half of the loss."""
  task = create_task("classification", Linear(), num_classes=7, mixup_alpha=1.0)
  pure = batch | {
    "image": np.where(np.arange(16)[:, None, None, None] % 2, 40, 200).astype(np.uint8)
    * np.ones((1, 4, 4, 3), np.uint8),
    "label": np.arange(16, dtype=np.int32) % 2,
  }
  context = make_context(task, pure)
  parts = [{k: v[i::2] for k, v in pure.items()} for i in range(2)]
  loss = jax.jit(task.loss)
  outputs = [loss({}, part, context) for part in parts]
  assert sum(float(o.loss) for o in outputs) == pytest.approx(np.log(7), rel=1e-6)
  assert all(float(o.loss) == pytest.approx(np.log(7) / 2, rel=1e-6) for o in outputs)


def test_batch_figure_shows_mixtures(batch, tiny_classifier):
  fields = dict(num_classes=7, class_names=tuple("abcdefg"))
  plain = create_task("classification", tiny_classifier(), **fields)
  mixing = create_task("classification", tiny_classifier(), **fields, mixup_alpha=1.0)
  left, right = (
    [ax.get_xlabel() for ax in task.batch_figures(batch)["batch"].axes] for task in (plain, mixing)
  )
  assert not any("%" in label for label in left)
  assert sum("%" in label for label in right) > 8


def test_invalid_alpha_raises(tiny_classifier):
  with pytest.raises(ValueError, match="cutmix_alpha"):
    create_task("classification", tiny_classifier(), num_classes=7, cutmix_alpha=-1.0)


def test_label_out_of_range_gives_nan_loss(batch):
  task = create_task("classification", Linear(), num_classes=7, mixup_alpha=0.2)
  wrong = batch | {"label": jnp.where(jnp.arange(16) == 3, 7, batch["label"])}
  assert np.isnan(jax.jit(task.loss)({}, wrong, make_context(task, wrong)).loss)
