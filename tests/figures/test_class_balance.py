"""Figure of the class counts."""

import numpy as np
import pytest

from vit_jax_zoo.figures.classification import MAX_NAMED, draw_class_balance


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
