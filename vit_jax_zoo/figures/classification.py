"""Figures of classification; class names are in order, class numbers by default."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.errors import name_of, shorten
from vit_jax_zoo.figures import canvas
from vit_jax_zoo.figures.canvas import COLORS, QUIET, Image, Images, write_title

RIGHT, WRONG = COLORS[:2]
MAX_IMAGES = 24

Labels = Shaped[np.ndarray, "b ..."]  # class indices [b], or weights [b k]


def draw_batch(
  images: Images, labels: Labels | None = None, class_names: Sequence[str] = ()
) -> Figure:
  """Draws the first training images with their labels."""
  shown = min(len(images), MAX_IMAGES)
  height, width = images.shape[1:3]
  figure, axes, cell = _grid(images, shown)
  subtitle = f"{shown} of {len(images)} images, {width} × {height} pixels"
  write_title(figure, "Training batch", subtitle)
  for i, ax in enumerate(axes):
    _draw_image(ax, images[i])
    label = "" if labels is None else _describe(labels[i], class_names, int(12.5 * cell))
    ax.set_xlabel(label, fontsize=8.5, labelpad=4)
  return figure


def draw_predictions(
  images: Images, labels: Labels, predictions: Mapping[str, Any], class_names: Sequence[str] = ()
) -> Figure:
  """Draws images with the most likely class of `Classification.predict`, framed blue if correct."""
  shown = min(len(images), MAX_IMAGES)
  correct = np.asarray(predictions["correct"])[:shown, 0]
  figure, axes, cell = _grid(images, shown)
  write_title(figure, "Predictions", f"{int(correct.sum())} of {shown} correct")
  width, height = figure.get_size_inches()
  for inches, text, color in ((1.1, "✓ correct", RIGHT), (0.3, "✗ wrong", WRONG)):
    corner = (1 - inches / width, 1 - 0.2 / height)
    figure.text(*corner, text, ha="right", va="top", fontsize=9.5, color=color, weight="bold")
  for i, ax in enumerate(axes):
    best, probability = (predictions[key][i][0] for key in ("labels", "probabilities"))
    name = shorten(name_of(int(best), class_names), int(11.5 * cell) - 8)
    mark, color = ("✓", RIGHT) if correct[i] else ("✗", WRONG)
    _draw_image(ax, images[i], frame=color)
    ax.set_xlabel(f"{mark} {name} ({probability:.0%})", fontsize=9, color=color, weight="bold")
    if not correct[i]:
      truth = _describe(labels[i], class_names, 99).replace("\n", ", ")
      below = shorten(f"true: {truth}", int(13 * cell))
      units = {"xycoords": "axes fraction", "textcoords": "offset points"}
      ax.annotate(below, (0.5, 0), (0, -18), **units, ha="center", va="top", fontsize=8.5)
  return figure


def draw_ranking(image: Image, names: Sequence[str], probabilities: Sequence[float]) -> Figure:
  """Draws an image, and beside it a bar for each of the most likely classes, best first."""
  figure = Figure(figsize=(7.4, max(3.0, 0.42 * len(names) + 1.3)), dpi=110)
  left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
  figure.subplots_adjust(left=0.03, right=0.95, top=0.84, bottom=0.06, wspace=0.12)
  write_title(figure, shorten(names[0], 60), "")
  left.set_anchor("N")
  _draw_image(left, image)
  rows = np.arange(len(names))
  right.barh(rows, probabilities, height=0.36, color=[RIGHT] + ["#9DB9CC"] * (len(names) - 1))
  right.set(xlim=(0, 1.13), ylim=(len(names) - 0.5, -0.8), xticks=[], yticks=[])
  right.spines[["top", "right", "bottom"]].set_visible(False)
  right.spines["left"].set_color("#bbbbbb")
  for row, name, probability in zip(rows, names, probabilities, strict=True):
    right.text(0.012, row - 0.24, shorten(name, 40), fontsize=9, va="bottom")
    right.text(probability + 0.015, row, f"{probability:.1%}", fontsize=8.5, va="center")
  return figure


def draw_confusion(matrix: Integer[np.ndarray, "k k"], class_names: Sequence[str] = ()) -> Figure:
  """Draws fractions of class i (row) predicted as j; counts up to 20 classes, names up to 60."""
  classes = len(matrix)
  fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  side = float(np.clip(0.42 * classes, 3.2, 9.0))
  title = f"Confusion matrix: {int(np.trace(matrix))} of {int(matrix.sum())} correct"
  figure, ax = canvas.chart((side + 2.2, side + 1.7), title, "predicted", "label")
  image = ax.imshow(fractions, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
  for row, column in zip(*np.nonzero(matrix), strict=True) if classes <= 20 else ():
    style = {"ha": "center", "va": "center", "fontsize": 8}
    color = "white" if fractions[row, column] > 0.5 else "black"
    ax.text(column, row, str(matrix[row, column]), color=color, **style)
  ax.spines[:].set_visible(False)
  ax.tick_params(length=0, labelsize=8)
  if classes <= 60:
    names = [shorten(name_of(i, class_names), 18) for i in range(classes)]
    ax.set_xticks(range(classes), names, rotation=0 if max(map(len, names)) <= 3 else 90)
    ax.set_yticks(range(classes), names)
  bar = figure.colorbar(image, ax=ax, shrink=0.6, pad=0.02, format="{x:.0%}")
  bar.set_label("fraction of the row", fontsize=9)
  bar.ax.tick_params(labelsize=8)
  bar.outline.set_visible(False)  # pyrefly: ignore[not-callable]
  return figure


MAX_NAMED = 40  # more classes are sorted by size and not named


def draw_class_balance(
  counts: Mapping[str, Integer[np.ndarray, " k"]], class_names: Sequence[str] = ()
) -> Figure:
  """Draws a bar for each class, with a segment per split, the first of which is for training."""
  if not counts:
    raise ValueError("counts: no split to draw; expected at least one")
  split, first = next(iter(counts.items()))
  named = len(first) <= MAX_NAMED
  order = np.arange(len(first)) if named else np.argsort(-first, kind="stable")
  height = float(np.clip(0.27 * len(first), 0.7, 9.0)) if named else 5.0
  sizes = " to ".join(f"{size:,}" for size in np.unique([first.min(), first.max()]))
  title = f"Examples of each class\n{split}: {first.sum():,} in {len(first)} classes, {sizes} each"
  figure, ax = canvas.chart((7.2, height + 1.5), title, "examples", "")
  left = np.zeros(len(order))
  for i, (name, values) in enumerate(counts.items()):
    widths, style = values[order], {"color": COLORS[i % len(COLORS)], "label": name}
    if named:
      ax.barh(range(len(order)), widths, left=left, height=0.72, **style)
    else:  # thousands of bars would take minutes
      ax.fill_betweenx(range(len(order)), left, left + widths, step="mid", linewidth=0, **style)
    left = left + widths
  if named:
    totals, bars = [f"{total:,.0f}" for total in left], list[Any](ax.containers)
    ax.bar_label(bars[-1], totals, padding=4, fontsize=8, color=QUIET)
    names = [shorten(name_of(i, class_names), 24) for i in range(len(first))]
    ax.set_yticks(range(len(first)), names)
    ax.margins(x=0.1)
  else:
    ax.set_yticks([])
    ax.set_ylabel(f"{len(first)} classes, the largest first", fontsize=9)
  ax.set_ylim(len(first) - 0.4, -0.6)
  ax.spines["left"].set_visible(False)
  ax.tick_params(labelsize=8.5, length=0)
  if len(counts) > 1:
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(counts), fontsize=8.5, frameon=0)
  return figure


def _grid(images: Images, count: int) -> tuple[Figure, list[Axes], float]:
  """Returns a figure, `count` cells with two lines of text below, and their side in inches."""
  if not count:
    raise ValueError("images: none; expected at least one")
  cell = 1.45 if max(images.shape[1:3]) < canvas.SMALL else 2.0
  columns = min(count, 8 if cell < 2 and count > 12 else 6)
  text, margin, head, side = 0.42, 0.25, 0.75, 0.88 * cell  # inches
  width = max(columns * cell, 4.2) + 2 * margin
  height = -(-count // columns) * (cell + text) + head + margin
  figure = Figure(figsize=(width, height), dpi=110)
  left, top = (width - columns * cell) / 2, height - head - side
  places = [(left + i % columns * cell, top - i // columns * (cell + text)) for i in range(count)]
  return figure, [canvas.add_axes(figure, *place, side, side) for place in places], cell


def _draw_image(ax: Axes, image: Image, frame: str = "#bbbbbb") -> None:
  canvas.show_image(ax, image)
  ax.spines[:].set(visible=True, color=frame, linewidth=1.0 if frame == "#bbbbbb" else 3.0)


def _describe(label: Any, class_names: Sequence[str], length: int) -> str:
  weights = np.asarray(label)
  if weights.ndim == 0:
    return shorten(name_of(int(weights), class_names), length)
  heaviest = [int(i) for i in np.argsort(-weights, kind="stable")[:2] if weights[i] > 0]
  if not heaviest:
    return "no label"
  if len(heaviest) == 1 or np.all(weights[weights > 0] == 1):
    return "\n".join(shorten(name_of(i, class_names), length) for i in heaviest)
  fractions, names = weights / weights.sum(), {i: name_of(i, class_names) for i in heaviest}
  return "\n".join(f"{fractions[i]:.0%} {shorten(name, length - 4)}" for i, name in names.items())
