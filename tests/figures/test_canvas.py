"""Users' text fits into figures."""

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


def boxes(figure):
  """The texts of a figure as it was rendered, and where each of them stands."""
  render(figure)
  renderer = figure.canvas.get_renderer()
  texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
  return {text.get_text(): text.get_window_extent(renderer) for text in texts}


def test_names_of_classes_are_no_formulas_and_may_have_no_glyphs():
  figures = (
    draw_confusion(np.eye(3, dtype=np.int64), NAMES),
    draw_class_balance({"train": np.array([3, 2, 1])}, NAMES),
    draw_ranking(IMAGE, NAMES, (0.5, 0.3, 0.2)),
    draw_attention(IMAGE[None], np.ones((1, 2, 2), np.float32), NAMES[:1]),
  )
  for figure in figures:
    pixels = render(figure)
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)
    assert "a$_{b$" in boxes(figure)


def test_ticks_of_a_logarithm_are_plain_numbers():
  figure = draw_shots({"digits": ((1, 5, 25), (0.3, 0.5, 0.7), (0.1, 0.1, 0.1))}, title="Shots")
  assert not [text for text in boxes(figure) if "$" in text]


def test_no_accuracy_lies_below_none_or_above_all():
  figure = draw_shots({"photos": ((1, 5, 25), (0.1, 1.0, 0.0), (0.4, 0.2, 0.0))}, title="Shots")
  (band,) = figure.axes[0].collections
  heights = band.get_paths()[0].vertices[:, 1]
  assert (heights.min(), heights.max()) == (0, 100)
  bottom, top = figure.axes[0].get_ylim()
  assert -5 < bottom <= 0 < 100 <= top < 110


@pytest.mark.parametrize("chance", [0.87, 0.95, 1.0])
def test_a_sure_prediction_has_its_number_beside_the_bar(chance):
  figure = draw_ranking(IMAGE, ["cat", "dog"], [chance, 1 - chance])
  number = boxes(figure)[f"{chance:.1%}"]
  assert number.x0 > figure.axes[1].patches[0].get_window_extent().x1
  assert number.x1 < figure.bbox.x1


@pytest.mark.parametrize("size", [(8, 8, 3, 48), (4, 4, 3, 3)])
def test_titles_of_filters_are_not_cut_off(size):
  kernel = np.random.default_rng(0).normal(size=size).astype(np.float32)
  for principal in (True, False):
    figure = draw_filters(kernel, principal=principal)
    assert max(box.x1 for box in boxes(figure).values()) < figure.bbox.x1


def test_long_captions_do_not_run_into_each_other():
  long = "great white shark, white shark, man-eater, Carcharodon carcharias"
  figure = draw_attention(
    np.repeat(IMAGE[None], 3, axis=0), np.ones((3, 2, 2), np.float32), [long] * 3
  )
  render(figure)
  captions = [ax.xaxis.label.get_window_extent() for ax in figure.axes[3:]]
  assert all(left.x1 < right.x0 for left, right in itertools.pairwise(captions))
