"""Mixup and CutMix: hand-computed mixtures, expectations, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.ops.mixup import Mixing, mix_examples

ALL_ROWS = np.ones(6, bool)


@pytest.fixture(scope="module")
def examples():
  rng = np.random.default_rng(0)
  return rng.random((6, 10, 12, 3), np.float32), np.eye(6, dtype=np.float32)


jitted = jax.jit(mix_examples, static_argnames=("mixing", "draws"))


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
  images, targets = mix(examples, Mixing(mixup_alpha=0.8), draws=draws)
  weights = np.diag(targets)
  assert (np.ptp(weights) == 0) == (draws == 1)
  np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
  for i in range(6):
    assert targets[i, i - 1] == pytest.approx(1 - weights[i], abs=1e-6)
    expected = weights[i] * examples[0][i] + (1 - weights[i]) * examples[0][i - 1]
    np.testing.assert_allclose(images[i], expected, rtol=1e-5)


def test_mixup_weights_folded_beta(examples):
  _, targets = many(examples, Mixing(mixup_alpha=0.2), 2000)
  weights = np.diagonal(targets, axis1=1, axis2=2)
  assert weights.min() >= 0.5
  # E[max(a, 1 - a)] of Beta(0.2, 0.2), by an independent sample.
  beta = np.random.default_rng(0).beta(0.2, 0.2, 400_000)
  assert weights.mean() == pytest.approx(np.maximum(beta, 1 - beta).mean(), abs=0.005)
  assert (weights > 0.99).mean() == pytest.approx((np.abs(beta - 0.5) > 0.49).mean(), abs=0.02)


@pytest.mark.parametrize("draws", [1, 6])
def test_cutmix_labels_are_pixel_fractions(examples, draws):
  images, targets = mix(examples, Mixing(cutmix_alpha=1.0), seed=4, draws=draws)
  for i in range(6):
    own = (images[i] == examples[0][i]).all(axis=-1)
    other = (images[i] == examples[0][i - 1]).all(axis=-1)
    assert (own ^ other).all()
    assert own.mean() == pytest.approx(targets[i, i], abs=1e-6)
    assert other.mean() == pytest.approx(targets[i, i - 1], abs=1e-6)
    rows, columns = other.any(axis=1), other.any(axis=0)
    np.testing.assert_array_equal(other, rows[:, None] & columns)  # a box


def test_cutmix_box_area_distribution(examples):
  _, targets = many(examples, Mixing(cutmix_alpha=1.0))
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
  mixing = Mixing(mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.6, cutmix_fraction=0.25)
  images, targets = many(examples, mixing)
  untouched = (images == examples[0]).all(axis=(2, 3, 4))
  pure = ((images == examples[0]) | (images == np.roll(examples[0], 1, axis=0))).all(axis=(2, 3, 4))
  assert untouched.mean() == pytest.approx(0.4, abs=0.05)  # plus a few empty boxes
  assert (pure & ~untouched).mean() == pytest.approx(0.15, abs=0.04)
  labels = targets.mean(axis=0)  # every example has weight 1 in total
  np.testing.assert_allclose(labels.sum(axis=0), 1, atol=0.05)


@pytest.mark.parametrize("mixing", [Mixing(mixup_alpha=0.8), Mixing(cutmix_alpha=1.0)])
def test_padding_not_mixed(examples, mixing):
  mask = np.array([True, True, True, True, False, False])
  images = np.where(mask[:, None, None, None], examples[0], np.nan).astype(np.float32)
  mixed, targets = mix((images, examples[1]), mixing, seed=4, mask=mask)
  np.testing.assert_array_equal(mixed[0], images[0])  # its neighbour is padding
  np.testing.assert_array_equal(targets[[0, 4, 5]], np.eye(6)[[0, 4, 5]])
  assert np.isfinite(mixed[:4]).all()
  assert (mixed[1:4] != images[1:4]).any(axis=(1, 2, 3)).all()


def test_is_on():
  assert not Mixing().is_on
  assert not Mixing(mixup_alpha=0).is_on
  assert not Mixing(mixup_alpha=0.2, probability=0).is_on
  assert Mixing(cutmix_alpha=1).is_on


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mixup_alpha": -0.2}, "mixup_alpha: -0"),
    ({"probability": 2.0}, "mix_probability"),
    ({"cutmix_fraction": -1}, "cutmix_fraction"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    Mixing(**fields)
