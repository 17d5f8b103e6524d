"""Assignment of boxes to ground truth, and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.systems.rcnn.boxes import (
  Assignment,
  Targets,
  assign_anchors,
  assign_proposals,
  sample_boxes,
)


def overlap(a, b):
  sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
  common = np.prod(np.maximum(sides, 0))
  union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common
  return common / union if union > 0 else 0


def targets_of(boxes, is_target, is_crowd=None):
  none = jnp.zeros(len(boxes), bool)
  return Targets(boxes, none.astype(int), is_target, none if is_crowd is None else is_crowd)


def assign_in_loop(anchors, targets, is_target, valid, high, low):
  """Assigns each anchor by definition, in a loop."""
  table = np.array([[overlap(a, t) for t in targets] for a in anchors], np.float32)
  table[:, ~is_target] = 0
  table[~valid] = 0
  best = table.max(axis=0)
  foreground, background = np.zeros((2, len(anchors)), bool)
  for i in np.flatnonzero(valid):
    is_best = any(table[i, j] == best[j] > 0 for j in range(len(targets)))
    foreground[i] = table[i].max() >= high or is_best
    background[i] = table[i].max() < low and not is_best
  return foreground, background, table.argmax(axis=1)


def test_anchor_assignment_with_ties_equals_definition():
  rng = np.random.default_rng(0)
  grid = np.stack(np.meshgrid(np.arange(0, 24, 4), np.arange(0, 24, 4)), -1).reshape(-1, 2)
  anchors = np.concatenate([np.concatenate([grid, grid + s], 1) for s in (4, 8)]).astype(np.float32)
  valid = np.all(anchors <= 24, axis=1)
  assign = jax.jit(assign_anchors, static_argnums=(3, 4))
  counts = np.zeros(2, int)
  for _ in range(20):
    low = rng.integers(0, 12, (5, 2)) * 2
    targets = np.concatenate([low, low + rng.integers(0, 6, (5, 2)) * 2], 1).astype(np.float32)
    is_target = rng.random(5) < 0.7
    got = assign(anchors, targets_of(targets, is_target), valid, 0.7, 0.3)
    foreground, background, target = assign_in_loop(anchors, targets, is_target, valid, 0.7, 0.3)
    np.testing.assert_array_equal(got.foreground, foreground)
    np.testing.assert_array_equal(got.background, background)
    np.testing.assert_array_equal(got.target[foreground], target[foreground])
    counts += [foreground.sum(), background.sum()]
  assert counts.min() > 20


@pytest.mark.parametrize("count", [0, 3])
def test_assignment_without_targets_is_background(count):
  anchors = jnp.asarray([[0.0, 0, 4, 4], [4, 4, 8, 8]])
  targets = targets_of(jnp.broadcast_to(anchors[:1], (count, 4)), jnp.zeros(count, bool))
  assign = jax.jit(assign_anchors, static_argnums=(3, 4))
  got = assign(anchors, targets, jnp.ones(2, bool), 0.7, 0.3)
  assert got.background.all()
  assert not got.foreground.any()
  valid = jnp.asarray([True, False])
  got = jax.jit(assign_proposals, static_argnums=3)(anchors, targets, valid, 0.5)
  assert list(got.background) == [True, False]


def test_proposals_inside_crowds_are_ignored():
  proposals = jnp.asarray(
    [
      [0, 0, 10, 10],
      [0, 0, 10, 5],
      [0, 0, 10, 4.9],
      [20, 20, 24, 24],
      [18, 20, 24, 24],
      [0, 0, 0, 0],
    ],
    jnp.float32,
  )
  targets = jnp.asarray([[0, 0, 10, 10], [20, 20, 40, 40]], jnp.float32)
  crowd = jnp.asarray([False, True])
  assign = jax.jit(assign_proposals, static_argnums=3)
  got = assign(proposals, targets_of(targets, ~crowd, crowd), jnp.arange(6) < 6, 0.5)
  assert list(got.foreground) == [True, True, False, False, False, False]
  assert list(got.background) == [False, False, True, False, True, True]  # 4/6 inside the crowd
  plain = assign(proposals, targets_of(targets, ~crowd), jnp.arange(6) < 4, 0.5)
  assert list(plain.background) == [False, False, True, True, False, False]


draw_compiled = jax.jit(sample_boxes, static_argnums=(2, 3))


def draw_sample(seed, foreground, background, count=8, share=0.25):
  assignment = Assignment(
    jnp.asarray(foreground), jnp.asarray(background), jnp.zeros(len(foreground), jnp.int32)
  )
  return map(np.asarray, draw_compiled(jax.random.key(seed), assignment, count, share))


def test_sample_is_uniform_without_repeats_and_foreground_first():
  foreground = np.arange(30) < 10
  background = np.arange(30) >= 14
  counts = np.zeros(30, int)
  for seed in range(200):
    index, exists, is_foreground = draw_sample(seed, foreground, background)
    assert exists.all()
    assert list(is_foreground) == [True] * 2 + [False] * 6
    assert foreground[index[:2]].all()
    assert background[index[2:]].all()
    assert len(set(index)) == 8
    counts[index] += 1
  assert counts[10:14].sum() == 0
  # Expected 200 x 2 / 10 and 200 x 6 / 16, 40 and 75 each; the bounds are six standard deviations.
  assert abs(counts[:10] - 40).max() < 36
  assert abs(counts[14:] - 75).max() < 42


@pytest.mark.parametrize(
  ("foreground", "background", "expected"),
  [(1, 20, (1, 7)), (20, 3, (2, 3)), (0, 0, (0, 0)), (5, 0, (2, 0)), (0, 30, (0, 8))],
)
def test_sample_with_few_candidates_is_padded(foreground, background, expected):
  rank = np.arange(30)
  _, exists, is_foreground = draw_sample(
    0, rank < foreground, (rank >= foreground) & (rank < foreground + background)
  )
  assert (is_foreground.sum(), (exists & ~is_foreground).sum()) == expected
  assert list(exists) == sorted(exists, reverse=True)
  assert list(is_foreground) == sorted(is_foreground, reverse=True)


def test_sample_of_fewer_boxes_than_count_takes_all():
  index, exists, _ = draw_sample(3, np.array([True, False, False]), np.array([False, True, True]))
  assert index.shape == (8,)
  assert sorted(index[exists]) == [0, 1, 2]
