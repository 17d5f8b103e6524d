"""Figures of label maps: class colors, padding, class names."""

import numpy as np
import pytest

from vit_jax_zoo.systems.fpt.figures import color_labels, draw_label_maps, label_color


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  truth = np.kron(rng.integers(0, 3, (3, 4, 6)), np.ones((1, 10, 10))).astype(np.uint8)
  truth[:, :3] = 255
  return {
    "image": rng.integers(0, 256, (3, 40, 60, 3), dtype=np.uint8),
    "label_map": truth,
    "image_size": np.array([[40, 60], [20, 50], [40, 60]]),
    "mask": np.array([True, True, False]),
  }


def images_of(figure):
  return [np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images]


def legend_names(figure):
  return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_label_figure_without_predictions(batch):
  """Covers padded rows, padded borders and the legend."""
  figure = draw_label_maps(batch, ("sky", "sea"))
  images = images_of(figure)
  assert [image.shape for image in images] == [(40, 60, 3)] * 2 + [(20, 50, 3)] * 2
  np.testing.assert_array_equal(images[1][5, 5], label_color(int(batch["label_map"][0, 5, 5])))
  assert legend_names(figure) == ["sky", "sea", "2"]


def test_label_figure_with_predictions_marks_errors(batch):
  """Covers the four columns: wrong pixels are red, the fraction of correct ones is the label."""
  predicted_labels = batch["label_map"].copy()
  predicted_labels[:, 20:] = (predicted_labels[:, 20:] + 1) % 3
  figure = draw_label_maps(batch, predicted=predicted_labels)
  image, _, predicted, wrong = images_of(figure)[:4]
  np.testing.assert_array_equal(image, batch["image"][0])
  np.testing.assert_array_equal(predicted[30, 30], label_color(int(predicted_labels[0, 30, 30])))
  assert wrong[30, 30].tolist() == [220, 30, 30]
  assert wrong[0, 0].tolist() != [220, 30, 30]  # ignored
  assert figure.axes[3].get_title() == f"errors: {17 / 37:.1%} correct"


def test_label_colors_are_distinct():
  """No two of ADE20K's 150 classes have similar colors."""
  colors = np.array([label_color(label) for label in range(150)])
  distances = np.abs(colors[:, None] - colors[None]).sum(axis=-1)
  assert distances[np.triu_indices(150, 1)].min() > 2
  assert distances[:20, :20][np.triu_indices(20, 1)].min() > 15


def test_ignored_pixels_are_striped():
  image = color_labels(np.full((12, 12), 255, np.int64))
  assert set(np.unique(image)) == {190, 215}
