"""Figures of classification: training batch, predictions, ranking, confusion matrix.

Without `pyplot`. Correct and incorrect differ in colour (Okabe and Ito's palette for colour
blindness), mark and words.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer, Num, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.errors import name_of, shorten
from vit_jax_zoo.figures.canvas import write_title

RIGHT = "#0072B2"
WRONG = "#D55E00"
SMALL = 64  # pixels; smaller images are drawn without interpolation


def draw_batch(
  images: Num[np.ndarray, "b h w c"],
  labels: Shaped[np.ndarray, "b ..."],
  class_names: Sequence[str] = (),
  *,
  title: str = "Training batch",
  max_images: int = 24,
) -> Figure:
  """Draws images with their labels.

  Args:
    images: uint8, or floats in [0, 255]; 1 or 3 channels.
    labels: class indices [b], or weights [b k], of which the two largest classes are written, with
      their fractions if mixed.
    class_names: in order; class numbers by default.
    title: of the figure.
    max_images: maximum number of images.
  """
  shown = min(len(images), max_images)
  height, width = images.shape[1:3]
  cell = _cell_size(images)
  figure, axes = _grid(shown, cell)
  write_title(figure, title, f"{shown} of {len(images)} images, {width} × {height} pixels")
  for i, ax in enumerate(axes):
    _draw_image(ax, images[i])
    ax.set_xlabel(_describe(labels[i], class_names, int(12.5 * cell)), fontsize=8.5, labelpad=4)
  return figure


def draw_predictions(
  images: Num[np.ndarray, "b h w c"],
  labels: Shaped[np.ndarray, "b ..."],
  predictions: Mapping[str, Any],
  class_names: Sequence[str] = (),
  *,
  title: str = "Predictions",
  max_images: int = 24,
) -> Figure:
  """Draws images with the most likely class: framed blue if correct, else vermilion.

  Args:
    images: uint8, or floats in [0, 255]; 1 or 3 channels.
    labels: class indices [b], or weights [b k].
    predictions: of `Classification.predict`: `labels` [b r], best first, `probabilities` [b r],
      and `correct` [b r].
    class_names: in order; class numbers by default.
    title: of the figure.
    max_images: maximum number of images.
  """
  shown = min(len(images), max_images)
  correct = np.asarray(predictions["correct"])[:shown, 0]
  cell = _cell_size(images)
  figure, axes = _grid(shown, cell)
  write_title(figure, title, f"{int(correct.sum())} of {shown} correct")
  _write_legend(figure)
  for i, ax in enumerate(axes):
    best, chance = int(predictions["labels"][i][0]), float(predictions["probabilities"][i][0])
    name = shorten(name_of(best, class_names), int(11.5 * cell) - 8)
    mark, color = ("✓", RIGHT) if correct[i] else ("✗", WRONG)
    _draw_image(ax, images[i], frame=color)
    ax.set_xlabel(
      f"{mark} {name} ({chance:.0%})", fontsize=9, labelpad=4, color=color, weight="bold"
    )
    if not correct[i]:
      truth = _describe(labels[i], class_names, 99).replace("\n", ", ")
      below = shorten(f"true: {truth}", int(13 * cell))
      ax.annotate(
        below, (0.5, 0), (0, -18), "axes fraction", "offset points", ha="center", va="top",
        fontsize=8.5,
      )  # fmt: skip
  return figure


def draw_ranking(
  image: Num[np.ndarray, "h w c"],
  names: Sequence[str],
  probabilities: Sequence[float],
  *,
  title: str = "",
) -> Figure:
  """Draws an image, and beside it a bar for each of the most likely classes.

  Args:
    image: uint8, or floats in [0, 255]; 1 or 3 channels; any size.
    names: of the classes, most likely first.
    probabilities: of the classes.
    title: of the figure; the first name by default.
  """
  figure = Figure(figsize=(7.4, max(3.0, 0.42 * len(names) + 1.3)), dpi=110)
  left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
  figure.subplots_adjust(left=0.03, right=0.95, top=0.84, bottom=0.06, wspace=0.12)
  write_title(figure, title or shorten(names[0], 60), "")
  left.set(xticks=[], yticks=[])
  left.set_anchor("N")
  _draw_image(left, image)
  places = np.arange(len(names))
  colors = [RIGHT] + ["#9DB9CC"] * (len(names) - 1)
  right.barh(places, probabilities, height=0.36, color=colors)
  right.set(xlim=(0, 1.13), ylim=(len(names) - 0.5, -0.8), xticks=[], yticks=[])
  right.spines[["top", "right", "bottom"]].set_visible(False)
  right.spines["left"].set_color("#bbbbbb")
  for place, name, chance in zip(places, names, probabilities, strict=True):
    right.text(0.012, place - 0.24, shorten(name, 40), fontsize=9, va="bottom")
    right.text(chance + 0.015, place, f"{chance:.1%}", fontsize=8.5, va="center")
  return figure


def draw_confusion(
  matrix: Integer[np.ndarray, "k k"],
  class_names: Sequence[str] = (),
  *,
  title: str = "Confusion matrix",
) -> Figure:
  """Draws a confusion matrix: row i, column j is the fraction of class i predicted as class j.

  Cells show counts up to 20 classes; axes show class names up to 60.
  """
  classes = len(matrix)
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  side = float(np.clip(0.42 * classes, 3.2, 9.0))
  figure = Figure(figsize=(side + 2.2, side + 1.7), dpi=110, layout="constrained")
  ax = figure.subplots()
  image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
  if classes <= 20:
    _write_counts(ax, matrix, shares)
  _label_classes(ax, [shorten(name_of(i, class_names), 18) for i in range(classes)])
  bar = figure.colorbar(image, ax=ax, shrink=0.6, pad=0.02, format="{x:.0%}")
  bar.set_label("fraction of the row", fontsize=9)
  bar.ax.tick_params(labelsize=8)
  bar.outline.set_visible(False)  # pyrefly: ignore[not-callable]
  right, total = int(np.trace(matrix)), int(matrix.sum())
  ax.set_title(f"{title}: {right} of {total} correct", loc="left", weight="bold", pad=10)
  return figure


def _write_counts(
  ax: Axes, matrix: Integer[np.ndarray, "k k"], shares: Shaped[np.ndarray, "k k"]
) -> None:
  for row, column in zip(*np.nonzero(matrix), strict=True):
    color = "white" if shares[row, column] > 0.5 else "black"
    count = str(matrix[row, column])
    ax.text(column, row, count, ha="center", va="center", color=color, fontsize=8)


def _label_classes(ax: Axes, names: Sequence[str]) -> None:
  ax.set_xlabel("predicted", fontsize=10)
  ax.set_ylabel("label", fontsize=10)
  for spine in ax.spines.values():
    spine.set_visible(False)
  ax.tick_params(length=0, labelsize=8)
  if len(names) > 60:
    return
  upright = max(map(len, names)) <= 3
  ax.set_xticks(range(len(names)), names, rotation=0 if upright else 90)
  ax.set_yticks(range(len(names)), names)


def _cell_size(images: Num[np.ndarray, "b h w c"]) -> float:
  """Returns the side of a cell in inches; larger for larger images."""
  return 1.45 if max(images.shape[1:3]) < SMALL else 2.0


def _grid(count: int, cell: float) -> tuple[Figure, list[Axes]]:
  """Lays out `count` square cells of `cell` inches, each with two lines of text below."""
  if not count:
    raise ValueError("images: none; expected at least one")
  columns = min(count, 8 if cell < 2 and count > 12 else 6)
  rows = -(-count // columns)
  text, margin, head = 0.42, 0.25, 0.75  # inches
  width = max(columns * cell, 4.2) + 2 * margin
  height = rows * (cell + text) + head + margin
  figure = Figure(figsize=(width, height), dpi=110)
  grid = figure.subplots(rows, columns, squeeze=False)
  side = (width - columns * cell) / 2 / width
  figure.subplots_adjust(
    left=side,
    right=1 - side,
    bottom=(margin + text) / height,
    top=1 - head / height,
    wspace=0.14,
    hspace=(text + 0.1) / cell,
  )
  axes = list(grid.flat)
  for ax in axes:
    ax.set(xticks=[], yticks=[])
  for ax in axes[count:]:
    ax.remove()
  return figure, axes[:count]


def _write_legend(figure: Figure) -> None:
  width, height = figure.get_size_inches()
  for inches, text, color in ((1.1, "✓ correct", RIGHT), (0.3, "✗ wrong", WRONG)):
    figure.text(
      1 - inches / width,
      1 - 0.2 / height,
      text,
      ha="right",
      va="top",
      fontsize=9.5,
      color=color,
      weight="bold",
    )


def _draw_image(ax: Axes, image: Num[np.ndarray, "h w c"], frame: str = "#bbbbbb") -> None:
  pixels = _to_uint8(image)
  small = max(pixels.shape[:2]) < SMALL
  if pixels.shape[-1] == 1:
    pixels = np.repeat(pixels, 3, axis=-1)
  ax.imshow(pixels, interpolation="nearest" if small else "auto")
  for spine in ax.spines.values():
    spine.set(color=frame, linewidth=1.0 if frame == "#bbbbbb" else 3.0)


def _to_uint8(image: Num[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
  return np.clip(np.round(np.asarray(image, np.float32)), 0, 255).astype(np.uint8)


def _describe(label: Any, class_names: Sequence[str], length: int) -> str:
  """Returns the class, or the two largest of a row of weights, in lines of `length` characters."""
  weights = np.asarray(label)
  if weights.ndim == 0:
    return shorten(name_of(int(weights), class_names), length)
  heaviest = [int(i) for i in np.argsort(-weights, kind="stable")[:2] if weights[i] > 0]
  if not heaviest:
    return "no label"
  if len(heaviest) == 1 or np.all(weights[weights > 0] == 1):
    return "\n".join(shorten(name_of(i, class_names), length) for i in heaviest)
  total = float(weights.sum())
  return "\n".join(
    f"{weights[i] / total:.0%} {shorten(name_of(i, class_names), length - 4)}" for i in heaviest
  )
