"""User-provided text in figures."""

import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from vit_jax_zoo.figures.attention import draw_attention, draw_filters
from vit_jax_zoo.figures.canvas import render
from vit_jax_zoo.figures.classification import draw_class_balance, draw_confusion, draw_ranking
from vit_jax_zoo.figures.curves import draw_shots

IMAGE = np.full((8, 8, 3), 200, np.uint8)
NAMES = ("a$_{b$", "$5 to $6", "猫")


def text_boxes(figure):
  """Returns the window extents of a rendered figure's texts."""
  render(figure)
  renderer = figure.canvas.get_renderer()
  texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
  return {text.get_text(): text.get_window_extent(renderer) for text in texts}


def test_class_names_not_mathtext_missing_glyphs_drawn():
  figures = (
    draw_confusion(np.eye(3, dtype=np.int64), NAMES),
    draw_class_balance({"train": np.array([3, 2, 1])}, NAMES),
    draw_ranking(IMAGE, NAMES, (0.5, 0.3, 0.2)),
    draw_attention(IMAGE[None], np.ones((1, 2, 2), np.float32), NAMES[:1]),
  )
  for figure in figures:
    pixels = render(figure)
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)
    assert "a$_{b$" in text_boxes(figure)


def test_log_ticks_plain_numbers():
  figure = draw_shots({"digits": ((1, 5, 25), (0.3, 0.5, 0.7), (0.1, 0.1, 0.1))}, title="Shots")
  assert not [text for text in text_boxes(figure) if "$" in text]


def test_accuracy_band_within_0_and_100():
  figure = draw_shots({"photos": ((1, 5, 25), (0.1, 1.0, 0.0), (0.4, 0.2, 0.0))}, title="Shots")
  (band,) = figure.axes[0].collections
  heights = band.get_paths()[0].vertices[:, 1]
  assert (heights.min(), heights.max()) == (0, 100)
  bottom, top = figure.axes[0].get_ylim()
  assert -5 < bottom <= 0 < 100 <= top < 110


@pytest.mark.parametrize("chance", [0.87, 0.95, 1.0])
def test_high_probability_label_beside_bar(chance):
  figure = draw_ranking(IMAGE, ["cat", "dog"], [chance, 1 - chance])
  number = text_boxes(figure)[f"{chance:.1%}"]
  assert number.x0 > figure.axes[1].patches[0].get_window_extent().x1
  assert number.x1 < figure.bbox.x1


@pytest.mark.parametrize("size", [(8, 8, 3, 48), (4, 4, 3, 3)])
def test_filter_titles_inside_figure(size):
  kernel = np.random.default_rng(0).normal(size=size).astype(np.float32)
  for principal in (True, False):
    figure = draw_filters(kernel, principal=principal)
    assert max(box.x1 for box in text_boxes(figure).values()) < figure.bbox.x1


def test_long_captions_do_not_overlap():
  long = "great white shark, white shark, man-eater, Carcharodon carcharias"
  figure = draw_attention(
    np.repeat(IMAGE[None], 3, axis=0), np.ones((3, 2, 2), np.float32), [long] * 3
  )
  render(figure)
  captions = [ax.xaxis.label.get_window_extent() for ax in figure.axes[1:-1:2]]
  assert all(left.x1 < right.x0 for left, right in itertools.pairwise(captions))
