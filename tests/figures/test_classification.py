"""Figures of classification."""

import time

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from vit_jax_zoo.figures.classification import (
  MAX_IMAGES,
  MAX_NAMED,
  RIGHT,
  WRONG,
  draw_batch,
  draw_class_balance,
  draw_confusion,
  draw_predictions,
)

NAMES = ("cat", "dog", "a very long name of a bird")


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def captions(figure):
  return [ax.get_xlabel() for ax in figure.axes]


def subtitle(figure):
  return figure.texts[1].get_text()


def test_batch_captions_are_labels(images):
  figure = draw_batch(images, np.array([0, 1, 2, 1, 0]), NAMES)
  assert isinstance(figure, Figure)
  assert figure.texts[0].get_text() == "Training batch"
  assert subtitle(figure) == "5 of 5 images, 8 × 8 pixels"
  assert captions(figure) == ["cat", "dog", "a very long name…", "dog", "cat"]
  assert figure.axes[0].images[0].get_interpolation() == "nearest"


def test_mixed_and_multiple_labels(images):
  labels = np.array([[0.75, 0.25, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0.5, 0.5]])
  figure = draw_batch(images, labels, NAMES)
  assert captions(figure) == [
    "75% cat\n25% dog",
    "dog\na very long name…",
    "cat",
    "no label",
    "50% dog\n50% a very long n…",
  ]


def test_correct_and_wrong_predictions_differ(images):
  predictions = {
    "labels": np.array([[0, 1], [1, 0], [0, 1], [1, 2], [0, 2]]),
    "probabilities": np.array([[0.9, 0.1]] * 5),
  }
  labels = np.array([0, 0, 0, 1, 1])
  predictions["correct"] = predictions["labels"] == labels[:, None]
  figure = draw_predictions(images, labels, predictions, NAMES)
  assert subtitle(figure) == "3 of 5 correct"
  assert captions(figure)[:2] == ["✓ cat (90%)", "✗ dog (90%)"]
  right, wrong = figure.axes[:2]
  assert right.spines["left"].get_edgecolor() != wrong.spines["left"].get_edgecolor()
  assert right.xaxis.label.get_color() == RIGHT
  assert wrong.xaxis.label.get_color() == WRONG
  assert [text.get_text() for text in wrong.texts] == ["true: cat"]
  assert not right.texts


def test_max_images_and_drawing_time():
  images = np.zeros((64, 224, 224, 1), np.uint8)
  start = time.perf_counter()
  figure = draw_batch(images, np.zeros(64, int))
  figure.canvas.draw()
  assert time.perf_counter() - start < 5  # 0.2 s on an idle core
  assert len(figure.axes) == MAX_IMAGES
  assert captions(figure)[0] == "0"
  assert figure.axes[0].images[0].get_interpolation() != "nearest"


def test_float_images_drawn_as_pixels(images):
  figure = draw_batch(images.astype(np.float32) + 0.2, np.zeros(5, int))
  np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), images[0])


def test_confusion_matrix_annotations():
  matrix = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
  figure = draw_confusion(matrix, NAMES)
  ax = figure.axes[0]
  assert ax.get_title(loc="left") == "Confusion matrix: 17 of 20 correct"
  assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog", "a very long name…"]
  assert [text.get_text() for text in ax.texts] == ["8", "2", "1", "9"]
  np.testing.assert_allclose(ax.images[0].get_array()[:2], [[0.8, 0.2, 0], [0.1, 0.9, 0]])


def test_many_classes_without_annotations():
  figure = draw_confusion(np.eye(100, dtype=int))
  assert not figure.axes[0].texts
  assert len(figure.axes[0].get_yticks()) < 100


def test_no_open_pyplot_figures(images):
  draw_batch(images, np.zeros(5, int))
  assert pyplot.get_fignums() == []


def test_no_image_raises():
  with pytest.raises(ValueError, match="images: none"):
    draw_batch(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, int))


def bars(figure):
  return [[bar.get_width() for bar in group] for group in figure.axes[0].containers]


def test_bar_per_class_part_per_split():
  counts = {"train": np.array([3, 8]), "test": np.array([1, 2])}
  figure = draw_class_balance(counts, ("ant", "bee"))
  assert bars(figure) == [[3, 8], [1, 2]]
  starts = [bar.get_x() for bar in figure.axes[0].containers[1]]
  assert starts == [3, 8]
  assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["ant", "bee"]
  assert [t.get_text() for t in figure.axes[0].texts] == ["4", "10"]
  assert "train: 11 in 2 classes, 3 to 8 each" in figure.axes[0].get_title(loc="left")


def test_many_classes_sorted_by_size():
  values = np.arange(MAX_NAMED + 1)
  figure = draw_class_balance({"train": values})
  (area,) = figure.axes[0].collections
  longest = {}
  for x, y in area.get_paths()[0].vertices:
    longest[round(y)] = max(x, longest.get(round(y), 0))
  assert longest[0] == values[-1]
  assert longest[MAX_NAMED] <= 1
  assert list(figure.axes[0].get_yticks()) == []
  assert "820 in 41 classes, 0 to 40 each" in figure.axes[0].get_title(loc="left")


def test_no_split_raises():
  with pytest.raises(ValueError, match="no split to draw"):
    draw_class_balance({})
