import numpy as np

from vit_jax_zoo.systems.igpt import figures as samples


def test_completions_figure_has_prefix_completions_and_original(monkeypatch):
  monkeypatch.setattr(samples, "MAX_COMPLETED", 2)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
  completions = rng.integers(0, 256, (3, 2, 4, 4, 3), dtype=np.uint8)
  prefix_lengths = np.array([8, 0, 6])
  figure = samples.draw_completions(images, prefix_lengths, completions)
  (ax,) = figure.axes
  # A pixel is drawn as 6 x 6; pictures are separated by one column or row.
  drawn = np.pad(np.asarray(ax.images[0].get_array()), ((0, 1), (0, 1), (0, 0)))
  tiles = 255 * drawn.reshape(2, 25, 4, 25, 3).swapaxes(1, 2)[:, :, 3:24:6, 3:24:6]
  np.testing.assert_allclose(tiles[:, 1:3], completions[:2], atol=1e-3)
  np.testing.assert_allclose(tiles[:, 3], images[:2], atol=1e-3)
  np.testing.assert_allclose(tiles[0, 0, :2], images[0, :2], atol=1e-3)
  np.testing.assert_allclose(tiles[0, 0, 2:], np.full((2, 4, 3), samples.MISSING), atol=1e-3)
  labels = [text.get_text() for text in ax.get_xticklabels()]
  assert labels == ["given", "draw 1", "draw 2", "original"]
  assert "2 images, 2 draws of each" in [text.get_text() for text in figure.texts]
  one = samples.draw_completions(images[:1], prefix_lengths[:1], completions[:1, :1])
  assert "one image, one draw" in [text.get_text() for text in one.texts]


def test_keep_pixels_ends_within_row():
  image = np.full((2, 3, 3), 7, np.uint8)
  prefix = samples.keep_pixels(image, 4)
  np.testing.assert_array_equal((prefix == 7).all(-1), [[True] * 3, [True, False, False]])
  assert (image == 7).all()
