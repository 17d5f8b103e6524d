"""Non-maximum suppression against the greedy definition, on difficult boxes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.systems.rcnn.boxes import (
  cell_anchors,
  clip_boxes,
  decode_boxes,
  grid_anchors,
  non_max_suppression,
  top_k,
)


def area(box):
  return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def overlap(a, b):
  common = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
  union = area(a) + area(b) - common
  return common / union if union > 0 else 0


def greedy(boxes, scores, threshold, valid, groups, inclusive):
  """Greedy suppression in order of score; of equal scores, the first box comes first."""
  keep = np.zeros(len(boxes), bool)
  for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
    rivals = [j for j in np.flatnonzero(keep) if groups[i] == groups[j]]
    values = [overlap(boxes[i], boxes[j]) for j in rivals]
    beaten = any(v >= threshold if inclusive else v > threshold for v in values)
    keep[i] = valid[i] and not beaten
  return keep


@functools.lru_cache
def compiled_nms(threshold, inclusive):
  return jax.jit(functools.partial(non_max_suppression, threshold=threshold, inclusive=inclusive))


def check_nms(boxes, scores, threshold=0.5, inclusive=False, valid=None, groups=None):
  boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
  valid = np.ones(len(boxes), bool) if valid is None else np.asarray(valid)
  groups = np.zeros(len(boxes), np.int32) if groups is None else np.asarray(groups, np.int32)
  got = compiled_nms(threshold, inclusive)(
    jnp.asarray(boxes), jnp.asarray(scores), valid=jnp.asarray(valid), groups=jnp.asarray(groups)
  )
  np.testing.assert_array_equal(got, greedy(boxes, scores, threshold, valid, groups, inclusive))
  return np.asarray(got)


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_nms_of_random_boxes_equals_greedy(seed, inclusive):
  rng = np.random.default_rng(seed)
  start = rng.integers(0, 12, (40, 2))
  size = rng.integers(0, 8, (40, 2))  # integers: many ties, equal boxes and empty boxes
  boxes = np.concatenate([start, start + size], axis=1)
  scores = rng.integers(0, 10, 40) / 10
  keep = check_nms(boxes, scores, 0.5, inclusive, rng.random(40) < 0.8, rng.integers(0, 2, 40))
  assert 0 < keep.sum() < 40


def test_nms_of_chain_keeps_every_second_box():
  # Each box suppresses the next one: the largest number of iterations.
  boxes = [[i, 0, i + 3, 1] for i in range(40)]
  keep = check_nms(boxes, np.linspace(1, 0.1, 40), threshold=0.45)
  np.testing.assert_array_equal(keep, np.arange(40) % 2 == 0)


def test_nms_keeps_box_at_threshold_unless_inclusive():
  boxes = [[0, 0, 2, 1], [0, 0, 1, 1]] * 20
  scores = np.linspace(1, 0.5, 40)
  assert list(np.flatnonzero(check_nms(boxes, scores, 0.5, inclusive=False))) == [0, 1]
  assert list(np.flatnonzero(check_nms(boxes, scores, 0.5, inclusive=True))) == [0]


def test_nms_of_huge_empty_and_inverted_boxes():
  boxes = np.zeros((40, 4))
  boxes[:3] = [[0, 0, 1e6, 1e6], [10, 10, 1e6, 1e6], [5, 5, 5, 5]]
  boxes[3:5] = [[9, 9, 3, 3], [0, 0, 1e6, 1e6]]
  keep = check_nms(boxes, np.linspace(1, 0.1, 40))
  assert list(keep[:5]) == [True, False, True, True, False]
  assert keep[5:].all()  # empty boxes overlap nothing


def test_nms_drops_invalid_boxes_and_nan_scores():
  boxes = np.tile([0, 0, 4, 4], (40, 1))
  assert not check_nms(boxes, np.ones(40), valid=np.zeros(40, bool)).any()
  keep = compiled_nms(0.5, False)(
    jnp.asarray(boxes, jnp.float32), jnp.full(40, jnp.nan).at[7].set(0.2),
    valid=jnp.ones(40, bool), groups=jnp.zeros(40, jnp.int32),
  )  # fmt: skip
  assert list(np.flatnonzero(keep)) == [7]


def test_nms_equals_official_code(load_golden):
  _, inputs, outputs = load_golden("fpt_det_a")
  boxes, scores = inputs["nms_in"][:, :4] + np.float32([0, 0, 1, 1]), inputs["nms_in"][:, 4]
  keep = compiled_nms(0.5, True)(boxes, scores)
  np.testing.assert_array_equal(np.flatnonzero(keep), outputs["nms_keep_0.5"])


def test_proposals_of_one_level_equal_official_code(load_golden):
  config, inputs, outputs = load_golden("fpt_det_a")
  options = config["proposals"]
  cell = cell_anchors(16, options["anchor_size"], (0.5, 1, 2), convention="detectron")
  anchors = grid_anchors(cell, inputs["prop_scores"].shape[2:], (16, 16))

  @jax.jit
  def propose(scores, deltas, size):
    best, index = jax.lax.top_k(scores, options["pre_nms"])
    boxes = clip_boxes(decode_boxes(deltas[index], anchors[index]), size, min_size=1)
    keep = non_max_suppression(boxes, best, options["nms"], inclusive=True)
    chosen, exists = top_k(best, keep, options["post_nms"])
    return boxes[chosen], best[chosen], exists

  for image in range(2):
    scores = inputs["prop_scores"][image].transpose(1, 2, 0).reshape(-1)
    deltas = inputs["prop_deltas"][image].transpose(1, 2, 0).reshape(-1, 4)
    boxes, best, exists = map(
      np.asarray, propose(scores, deltas, inputs["prop_im_info"][image, :2])
    )
    rows = outputs["prop_rois"][:, 0] == image
    assert exists.sum() == rows.sum()
    expected = outputs["prop_rois"][rows, 1:] + [0, 0, 1, 1]
    np.testing.assert_allclose(boxes[exists], expected, atol=1e-3)
    np.testing.assert_array_equal(best[exists], outputs["prop_probs"][rows, 0])


def test_top_k_skips_disallowed():
  scores = jnp.asarray([0.1, 0.9, 0.5, 0.9, 0.7])
  keep = jnp.asarray([True, True, False, True, True])
  index, exists = top_k(scores, keep, 3)
  assert list(index) == [1, 3, 4]
  assert exists.all()
  index, exists = top_k(scores, keep, 7)
  assert list(index[:4]) == [1, 3, 4, 0]
  assert list(exists) == [True] * 4 + [False] * 3
