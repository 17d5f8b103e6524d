import numpy as np
import pytest

from vit_jax_zoo.systems.igpt import figures as samples


def image_data(ax):
  return ax.images[0].get_array()


def test_completions_figure_has_prefix_completions_and_original(monkeypatch):
  monkeypatch.setattr(samples, "MAX_COMPLETED", 2)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
  completions = rng.integers(0, 256, (3, 2, 4, 4, 3), dtype=np.uint8)
  prefix_lengths = np.array([8, 0, 6])
  figure = samples.draw_completions(images, prefix_lengths, completions)
  axes = np.array(figure.axes).reshape(2, 4)
  for row in range(2):
    np.testing.assert_array_equal(image_data(axes[row, 1]), completions[row, 0])
    np.testing.assert_array_equal(image_data(axes[row, 2]), completions[row, 1])
    np.testing.assert_array_equal(image_data(axes[row, 3]), images[row])
  np.testing.assert_array_equal(image_data(axes[0, 0])[:2], images[0, :2])
  np.testing.assert_array_equal(image_data(axes[0, 0])[2:], np.full((2, 4, 3), samples.MISSING))
  texts = [text.get_text() for ax in axes[0] for text in ax.texts]
  assert texts == ["given", "completed by the model", "original"]
  assert "2 images, 2 draws of each" in [text.get_text() for text in figure.texts]
  one = samples.draw_completions(images[:1], prefix_lengths[:1], completions[:1, :1])
  assert "one image, one draw" in [text.get_text() for text in one.texts]
  boxes = [ax.get_position() for ax in figure.axes]
  assert all(0 <= b.x0 < b.x1 <= 1 and 0 <= b.y0 < b.y1 <= 1 for b in boxes)


def test_keep_pixels_ends_within_row():
  image = np.full((2, 3, 3), 7, np.uint8)
  prefix = samples.keep_pixels(image, 4)
  np.testing.assert_array_equal((prefix == 7).all(-1), [[True] * 3, [True, False, False]])
  assert (image == 7).all()


def test_draw_images_fills_grid(monkeypatch):
  monkeypatch.setattr(samples, "MAX_SAMPLES", 6)
  images = np.random.default_rng(0).integers(0, 256, (7, 5, 5, 3)).astype(np.float32)
  figure = samples.draw_images(images)
  assert len(figure.axes) == 6
  np.testing.assert_array_equal(image_data(figure.axes[4]), images[4])
  bottoms = [ax.get_position().y0 for ax in samples.draw_images(images[:6], columns=3).axes]
  assert bottoms[0] == bottoms[2] > bottoms[3] == bottoms[5]
  with pytest.raises(ValueError, match="images: none"):
    samples.draw_images(images[:0])
