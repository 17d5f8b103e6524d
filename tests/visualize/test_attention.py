"""Pictures of attention: the numbers behind them, and what stands in them."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from vit_jax_zoo.visualize.attention import (
  attention_distances,
  attention_rollout,
  draw_attention,
  draw_attention_distances,
  draw_heads,
  draw_position_similarity,
  position_similarity,
)


def random_maps(*shape):
  weights = np.random.default_rng(0).random(shape).astype(np.float32)
  return weights / weights.sum(axis=-1, keepdims=True)


def test_rollout_multiplies_the_maps_from_the_last_layer_to_the_first():
  weights = random_maps(3, 2, 4, 5, 5)
  rollout = attention_rollout(weights)
  one, two, three = (0.5 * w.mean(axis=1) + 0.5 * np.eye(5) for w in weights)
  np.testing.assert_allclose(rollout, three @ two @ one, rtol=1e-5)
  np.testing.assert_allclose(rollout.sum(axis=-1), 1, rtol=1e-5)


def test_rollout_of_tokens_that_see_themselves_alone_is_the_identity():
  weights = np.broadcast_to(np.eye(4, dtype=np.float32), (2, 1, 3, 4, 4))
  np.testing.assert_array_equal(attention_rollout(weights)[0], np.eye(4))


def test_rollout_follows_a_chain():
  # Without residual: layer 2 looks from 0 to 1, layer 1 from 1 to 2, so 0 comes from 2.
  first, second = np.eye(3, dtype=np.float32)[[0, 2, 1]], np.eye(3, dtype=np.float32)[[1, 1, 2]]
  weights = np.stack([first, second])[:, None, None]
  np.testing.assert_array_equal(attention_rollout(weights, residual=0.0)[0, 0], [0, 0, 1])


def test_distance_of_local_and_of_uniform_heads():
  grid, count = (2, 3), 6
  local = np.eye(count)
  even = np.full((count, count), 1 / count)
  right = np.eye(count)[[1, 2, 2, 4, 5, 5]]  # the neighbour on the right; the last stay
  weights = np.stack([local, even, right]).astype(np.float32)[None, None]
  distances = attention_distances(weights, grid, patch_size=16.0)
  y, x = np.divmod(np.arange(count), 3)
  mean = np.hypot(y[:, None] - y, x[:, None] - x).mean()
  np.testing.assert_allclose(distances, [[0, 16 * mean, 16 * 4 / 6]], rtol=1e-5)


def test_distance_leaves_the_class_token_out():
  patches = random_maps(2, 1, 3, 4, 4)
  weights = np.full((2, 1, 3, 5, 5), 0.3, np.float32)
  weights[..., 1:, 1:] = 0.7 * patches
  np.testing.assert_allclose(
    attention_distances(weights, (2, 2)), attention_distances(patches, (2, 2)), rtol=1e-5
  )


def test_a_grid_that_is_too_large_is_named():
  with pytest.raises(ValueError, match=r"4 tokens, but the grid \(3, 3\) has 9"):
    attention_distances(random_maps(1, 1, 1, 4, 4), (3, 3))
  with pytest.raises(ValueError, match=r"4 positions, but the grid \(3, 3\) has 9"):
    position_similarity(np.ones((4, 8), np.float32), (3, 3))


def test_similarity_is_the_cosine_of_patches():
  table = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
  similarity = position_similarity(table, (2, 3))
  a, b = table[1 + 4], table[1 + 2]  # patches (1, 1) and (0, 2), behind the class token
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert similarity[1, 1, 0, 2] == pytest.approx(cosine, rel=1e-5)
  np.testing.assert_allclose(similarity.reshape(6, 6).diagonal(), 1, rtol=1e-5)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (80, 3)])
def test_attended_places_stay_light_and_others_get_dark(side, channels):
  images = np.full((2, side, side, channels), 200, np.uint8)
  maps = np.zeros((2, 2, 2), np.float32)
  maps[:, 0, 1] = 0.3  # scaled to the maximum: fully lit
  figure = draw_attention(images, maps, ["7", "1"], title="Where", subtitle="class token")
  assert isinstance(figure, Figure)
  assert [text.get_text() for text in figure.texts] == ["Where", "class token"]
  assert [ax.get_xlabel() for ax in figure.axes] == ["", "", "7", "1"]
  above, below = (figure.axes[i].images[0].get_array() for i in (0, 2))
  assert np.all(above == 200)
  assert np.all(below[0, -1] == 200)
  assert np.all(below[-1, 0] == 0)


def test_without_an_image_there_is_one_line():
  with pytest.raises(ValueError, match="there is no image to draw"):
    draw_attention(np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 2, 2), np.float32))


def test_heads_are_in_their_places():
  weights = random_maps(6, 3, 5, 5)
  figure = draw_heads(np.zeros((8, 8, 1), np.uint8), weights, (2, 2), query=0, max_layers=3)
  assert len(figure.axes) == 3 * 4
  rows = [figure.axes[4 * i] for i in range(3)]
  assert [ax.get_ylabel() for ax in rows] == ["layer 1", "layer 3", "layer 6"]
  assert [ax.get_title() for ax in figure.axes[:4]] == ["", "head 1", "head 2", "head 3"]
  last = figure.axes[-1].images[0].get_array()
  np.testing.assert_array_equal(last, weights[5, 2, 0, 1:].reshape(2, 2))


def test_positions_have_a_tile_each_and_of_many_every_second():
  table = np.random.default_rng(0).normal(size=(1 + 12, 4)).astype(np.float32)
  figure = draw_position_similarity(table, (3, 4))
  tiles = [ax for ax in figure.axes if ax.images]
  assert len(tiles) == 12
  shown = tiles[4 * 2 + 1].images[0].get_array()
  np.testing.assert_allclose(shown, position_similarity(table, (3, 4))[2, 1])
  assert shown[2, 1] == pytest.approx(1)
  large = draw_position_similarity(np.ones((16 * 16, 2), np.float32), (16, 16))
  assert len([ax for ax in large.axes if ax.images]) == 64
  figure.canvas.draw()


def test_distances_have_a_point_for_each_head():
  figure = draw_attention_distances(np.array([[1, 2], [3, 4], [5, 6]], np.float32))
  points = figure.axes[0].collections[0].get_offsets()
  np.testing.assert_array_equal(points, [[1, 1], [1, 2], [2, 3], [2, 4], [3, 5], [3, 6]])
  assert figure.axes[0].get_ylabel() == "mean distance, pixels"
