"""Figures of attention."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from vit_jax_zoo.figures.attention import (
  draw_attention,
  draw_attention_distances,
  draw_filters,
  draw_heads,
  draw_mosaic,
  draw_position_similarity,
  principal_filters,
)
from vit_jax_zoo.figures.canvas import heat_map


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (80, 3)])
def test_attention_is_a_heat_map_over_the_image(side, channels):
  images = np.full((2, side, side, channels), 200, np.uint8)
  maps = np.zeros((2, 2, 2), np.float32)
  maps[:, 0, 1] = 0.3  # scaled to the maximum: full brightness
  figure = draw_attention(images, maps, ["7", "1"], subtitle="class token")
  assert isinstance(figure, Figure)
  assert [text.get_text() for text in figure.texts] == ["Attention", "class token"]
  assert [ax.get_xlabel() for ax in figure.axes] == ["", "7", "", "1", ""]
  above, below = (figure.axes[i].images[0].get_array() for i in (0, 1))
  assert np.all(above == 200)
  np.testing.assert_array_equal(below, heat_map(images[0], maps[0] / 0.3))
  bar = figure.axes[-1]
  assert [text.get_text() for text in bar.get_yticklabels()] == ["0", "largest"]
  assert bar.get_ylabel() == "attention"


@pytest.mark.parametrize("count", [1, 2, 8])
def test_images_aligned_with_title(count):
  figure = draw_attention(np.zeros((count, 8, 8, 3), np.uint8), np.ones((count, 2, 2), np.float32))
  figure.draw_without_rendering()
  inches = [ax.get_position().x0 * figure.get_figwidth() for ax in figure.axes]
  title = figure.texts[0].get_position()[0] * figure.get_figwidth()
  assert inches[0] == pytest.approx(title, abs=0.02)
  assert figure.axes[-1].get_position().x1 <= 1
  if count == 1:  # side by side
    assert inches[1] > inches[0]
  else:
    np.testing.assert_allclose(np.diff(inches[:-1:2]), 1.7, atol=0.05)


def test_one_image_keeps_its_size_and_shape():
  photo = np.zeros((300, 450, 3), np.uint8)
  figure = draw_attention(photo[None], np.ones((1, 2, 3), np.float32))
  figure.draw_without_rendering()
  for ax in figure.axes[:2]:
    extent = ax.get_window_extent()
    np.testing.assert_allclose([extent.width, extent.height], [450, 300], atol=1)


def test_no_image_raises():
  with pytest.raises(ValueError, match="images: none"):
    draw_attention(np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 2, 2), np.float32))


def test_mosaic_tile_positions():
  tiles = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
  ax = Figure().subplots()
  image = draw_mosaic(ax, tiles).get_array()
  # A pixel is drawn as 12 x 12; tiles are separated by one column or row.
  assert image.shape == (2 * 24 + 1, 3 * 24 + 2)
  middle = np.asarray(image)[6::25, 6::25]
  np.testing.assert_array_equal(middle, tiles[:, :, 0, 0])
  assert np.asarray(image)[24 + 1 + 18, 2 * 25 + 6] == tiles[1, 2, 1, 0]
  assert np.isnan(image.filled(np.nan)[24]).all()
  np.testing.assert_allclose(ax.get_yticks(), [11.5, 36.5])


def test_heads_scaled_to_own_maximum(monkeypatch):
  monkeypatch.setattr("vit_jax_zoo.figures.attention.MAX_LAYERS", 3)
  maps = np.random.default_rng(0).random((6, 3, 2, 2)).astype(np.float32)
  figure = draw_heads(np.zeros((8, 8, 1), np.uint8), maps)
  mosaic = figure.axes[1]
  assert [text.get_text() for text in mosaic.get_yticklabels()] == ["layer 1", "layer 3", "layer 6"]
  assert [text.get_text() for text in mosaic.get_xticklabels()] == ["head 1", "head 2", "head 3"]
  last = np.asarray(mosaic.images[0].get_array())[2 * 25 :, 2 * 25 :][6::12, 6::12]
  np.testing.assert_allclose(last, maps[5, 2] / maps[5, 2].max(), rtol=1e-6)
  figure.canvas.draw()


def test_position_tiles_every_second_if_many():
  table = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
  figure = draw_position_similarity(table, (3, 4))
  mosaic = figure.axes[0]
  assert (len(mosaic.get_yticks()), len(mosaic.get_xticks())) == (3, 4)
  step = 4 * 6 + 1  # a tile of 3 x 4 positions, each 6 pixels wide, plus the gap
  shown = np.asarray(mosaic.images[0].get_array())[2 * 19 :, 1 * step :][3:18:6, 3:24:6]
  norms = np.linalg.norm(table, axis=1)
  cosines = table @ table[9] / (norms * norms[9])  # with the patch in row 2, column 1
  np.testing.assert_allclose(shown, cosines.reshape(3, 4), rtol=1e-5)
  assert shown[2, 1] == pytest.approx(1)
  large = draw_position_similarity(np.ones((16 * 16, 2), np.float32), (16, 16))
  assert [text.get_text() for text in large.axes[0].get_xticklabels()][:3] == ["1", "3", "5"]
  figure.canvas.draw()


def test_distances_one_point_per_head():
  figure = draw_attention_distances(np.array([[1, 2], [3, 4], [5, 6]], np.float32))
  points = figure.axes[0].collections[0].get_offsets()
  np.testing.assert_array_equal(points, [[1, 1], [1, 2], [2, 3], [2, 4], [3, 5], [3, 6]])
  assert figure.axes[0].get_ylabel() == "mean distance, pixels"


def test_components_are_principal_directions():
  # Filters of 1 x 2 pixels and one channel: points at (+-3, 0) and (0, +-1) around (5, 5).
  points = np.array([[3, 0], [-3, 0], [0, 1], [0, -1]], np.float32) + 5
  kernel = points.T.reshape(1, 2, 1, 4)
  components, fractions = principal_filters(kernel)
  np.testing.assert_allclose(components.reshape(2, 2), [[1, 0], [0, 1]], atol=1e-6)
  np.testing.assert_allclose(fractions, [18 / 20, 2 / 20], rtol=1e-6)


def test_components_equal_covariance_eigenvectors():
  kernel = np.random.default_rng(0).normal(size=(2, 2, 3, 40)).astype(np.float32)
  components, fractions = principal_filters(kernel, count=5)
  values, vectors = np.linalg.eigh(np.cov(kernel.reshape(12, 40).astype(np.float64)))
  expected = vectors[:, ::-1].T[:5]
  alike = np.abs((components.reshape(5, 12) * expected).sum(axis=1))
  np.testing.assert_allclose(alike, 1, rtol=1e-4)
  np.testing.assert_allclose(fractions, values[::-1][:5] / values.sum(), rtol=1e-5)
  largest = np.abs(components.reshape(5, 12)).argmax(axis=1)
  assert (components.reshape(5, 12)[np.arange(5), largest] > 0).all()


def test_filters_drawn_around_gray():
  kernel = np.zeros((1, 1, 3, 2), np.float32)
  kernel[0, 0, :, 0], kernel[0, 0, :, 1] = [2, -2, 0], [0, 0, 1]
  figure = draw_filters(kernel)
  image = np.asarray(figure.axes[0].images[0].get_array())
  np.testing.assert_allclose(image[5, 5], [1, 0, 0.5])
  np.testing.assert_allclose(image[5, 30], [0.5, 0.5, 1])
  assert figure.texts[1].get_text() == "2 of 2, 1 × 1 pixels"
  wide = np.random.default_rng(0).normal(size=(4, 4, 64, 5)).astype(np.float32)
  draw_filters(wide, principal=True).canvas.draw()
