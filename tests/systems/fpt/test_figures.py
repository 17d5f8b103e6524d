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


def pictures(figure):
  return [np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images]


def names(figure):
  return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_truth_alone(batch):
  """Guards rows of padding, padded borders and the legend."""
  figure = draw_label_maps(batch, ("sky", "sea"))
  shown = pictures(figure)
  assert [picture.shape for picture in shown] == [(40, 60, 3)] * 2 + [(20, 50, 3)] * 2
  np.testing.assert_array_equal(shown[1][5, 5], label_color(int(batch["label_map"][0, 5, 5])))
  assert names(figure) == ["sky", "sea", "2"]


def test_predictions_beside_ground_truth(batch):
  """Guards the four columns: wrong pixels are red, and the share of right ones is said."""
  found = batch["label_map"].copy()
  found[:, 20:] = (found[:, 20:] + 1) % 3
  figure = draw_label_maps(batch, predicted=found)
  image, _, guess, wrong = pictures(figure)[:4]
  np.testing.assert_array_equal(image, batch["image"][0])
  np.testing.assert_array_equal(guess[30, 30], label_color(int(found[0, 30, 30])))
  assert wrong[30, 30].tolist() == [220, 30, 30]
  assert wrong[0, 0].tolist() != [220, 30, 30]  # does not count
  assert figure.axes[3].get_xlabel() == f"{17 / 37:.1%} correct"


def test_colours_differ():
  """Guards the palette: no two of ADE20K's 150 classes look quite alike."""
  colors = np.array([label_color(label) for label in range(150)])
  distances = np.abs(colors[:, None] - colors[None]).sum(axis=-1)
  assert distances[np.triu_indices(150, 1)].min() > 2
  assert distances[:20, :20][np.triu_indices(20, 1)].min() > 15


def test_pixels_that_do_not_count_are_striped():
  """Guards that they are not taken for a class."""
  picture = color_labels(np.full((12, 12), 255, np.int64))
  assert set(np.unique(picture)) == {190, 215}
