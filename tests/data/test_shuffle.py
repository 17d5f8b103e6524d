import numpy as np
import pytest

from vit_jax_zoo.data.shuffle import RandomNumbers, shuffled_index


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_epochs_different_permutations(count):
  order = [shuffled_index(i, count, seed=5) for i in range(3 * count)]
  epochs = [order[i : i + count] for i in range(0, 3 * count, count)]
  assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
  if count > 2:
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("count", [1 << 16, (1 << 16) + 1, 70_000])
def test_large_sets_shuffled(count):
  order = np.array([shuffled_index(i, count, seed=5) for i in range(count)])
  assert np.array_equal(np.sort(order), np.arange(count))
  assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.02
  near = np.abs(np.diff(order)) < count / 100
  assert near.mean() == pytest.approx(0.02, abs=0.002)


def test_order_depends_on_seed():
  one, other = ([shuffled_index(i, 50, seed) for i in range(50)] for seed in (0, 1))
  assert one != other


def test_random_numbers_depend_on_seed_and_index():
  numbers = RandomNumbers(3)
  first = numbers.at(10).random(5).tolist()
  numbers.at(11).integers(7, size=3, dtype=np.uint8)  # leaves half a 64-bit word in the buffer
  assert numbers.at(10).random(5).tolist() == first
  assert RandomNumbers(3).at(10).random(5).tolist() == first
  assert RandomNumbers(4).at(10).random(5).tolist() != first


def test_random_numbers_independent():
  numbers = RandomNumbers(0)
  drawn = np.array([numbers.at(i).random(4) for i in range(5000)])
  assert np.abs(drawn.mean(0) - 0.5).max() < 0.02
  neighbours = np.corrcoef(np.concatenate([drawn[1:], drawn[:-1]], axis=1).T)
  assert np.abs(neighbours - np.eye(8)).max() < 0.06
