"""Figures of object detection: ground truth and predicted boxes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures.canvas import Image, Images

COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
DARK = ("#0072B2",)  # with white text
STYLES = ("-", "--", ":")
CELL = 3.2  # inches
LABEL = 0.17  # height of a name in inches

Batch = Mapping[str, Any]
Boxes = Float[np.ndarray, "n 4"]  # left, top, right, bottom in pixels
Labels = Int[np.ndarray, " n"]


def draw_targets(batch: Batch, class_names: Sequence[str] = ()) -> Figure:
  """Draws the first 8 images of a detection batch with their true boxes, without padding."""
  rows = real_rows(batch)[:8]
  columns = min(4, max(len(rows), 1))
  figure, axes = grid(-(-len(rows) // columns), columns, "Training batch", batch["image"])
  for ax, row in zip(axes.flat, rows, strict=False):
    _draw_targets(ax, batch, row, class_names)
  return figure


def draw_predictions(
  batch: Batch, predictions: Batch, class_names: Sequence[str] = (), *, threshold: float
) -> Figure:
  """Draws the first 4 images twice: with true boxes, and with those that score `threshold` or more.

  Predictions are `boxes_xyxy` [b q 4], in pixels of the batch's `original_size` if it has one,
  `labels` [b q] and `scores` [b q].
  """
  figure, cells = pairs(batch, "Truth and predictions")
  for row, truth, predicted in cells:
    count, image = _draw_targets(truth, batch, row, class_names), image_of(batch, row)
    truth.set_title(f"truth: {count}", fontsize=8.5, loc="left")
    found, boxes, names = confident(batch, predictions, row, class_names, threshold)
    show(predicted, image)
    draw_boxes(predicted, boxes, names, np.asarray(predictions["labels"][row])[found])
    scores = np.asarray(predictions["scores"][row])
    best = f"; highest {scores.max():.0%}" if not names and scores.size else ""
    title = f"{len(names)} predicted at {threshold:.0%} or more{best}"
    predicted.set_title(title, fontsize=8.5, loc="left")
  return figure


def confident(
  batch: Batch, predictions: Batch, row: int, class_names: Sequence[str], threshold: float
) -> tuple[Labels, Boxes, list[str]]:
  """Returns the queries that score `threshold` or more, the highest last; boxes and captions."""
  scores, labels = (np.asarray(predictions[name][row]) for name in ("scores", "labels"))
  found = np.flatnonzero((scores >= threshold) & (scores > 0))  # 0: padding
  found = found[np.argsort(scores[found])]
  scale = to_shown(batch, row, image_of(batch, row))
  boxes = np.asarray(predictions["boxes_xyxy"][row], np.float64)[found] * scale
  return found, boxes, [f"{name_of(labels[i], class_names)} {scores[i]:.0%}" for i in found]


def pairs(batch: Batch, title: str) -> tuple[Figure, list[tuple[int, Axes, Axes]]]:
  """Returns a figure, and the first 4 rows, each with axes for the truth and for predictions."""
  rows = real_rows(batch)[:4]
  columns = 2 if len(rows) < 2 else 4  # two images side by side
  figure, axes = grid(-(-2 * len(rows) // columns), columns, title, batch["image"])
  cells = axes.ravel()
  return figure, list(zip(rows, cells[::2], cells[1::2], strict=False))


def _draw_targets(ax: Axes, batch: Batch, row: int, class_names: Sequence[str]) -> int:
  image = image_of(batch, row)
  real = np.asarray(batch["is_target"][row], bool)
  boxes = np.asarray(batch["boxes_cxcywh"][row], np.float64)[real] * np.tile(image.shape[1::-1], 2)
  low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
  labels = np.asarray(batch["labels"][row])[real]
  show(ax, image)
  names = [name_of(i, class_names) for i in labels]
  draw_boxes(ax, np.concatenate([low, high], axis=1), names, labels)
  return len(labels)


def real_rows(batch: Batch) -> list[int]:
  """Returns the indices of the examples that are not padding."""
  return np.flatnonzero(np.asarray(batch.get("mask", np.ones(len(batch["image"]))), bool)).tolist()


def image_of(batch: Batch, row: int) -> UInt8[np.ndarray, "h w c"]:
  """Returns an image without its padding."""
  image = np.asarray(batch["image"][row])
  height, width = np.asarray(batch["image_size"][row] if "image_size" in batch else image.shape[:2])
  return np.clip(image[:height, :width], 0, 255).astype(np.uint8)


def to_shown(batch: Batch, row: int, image: Image) -> Float[np.ndarray, " 4"]:
  """Returns the factors from predicted boxes to pixels of the shown image."""
  if "original_size" not in batch:
    return np.ones(4)
  return np.tile(image.shape[1::-1] / np.asarray(batch["original_size"][row], np.float64)[::-1], 2)


def grid(rows: int, columns: int, title: str, images: Images) -> tuple[Figure, np.ndarray]:
  """Returns a figure with a title and its empty axes [rows columns], as high as the images."""
  rows, aspect = max(rows, 1), float(np.clip(images.shape[1] / images.shape[2], 0.4, 1.6))
  size = (CELL * columns, (CELL * aspect + 0.3) * rows + 0.5)
  figure = Figure(figsize=size, dpi=110, layout="compressed")
  figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
  axes = figure.subplots(rows, columns, squeeze=False)
  for ax in axes.flat:
    ax.set_axis_off()
  return figure, axes


def show(ax: Axes, image: Image) -> None:
  """Draws an image, without interpolation if it is small."""
  ax.imshow(image, interpolation="nearest" if max(image.shape[:2]) < 100 else "antialiased")
  ax.set_anchor("NW")


def draw_boxes(ax: Axes, boxes_xyxy: Boxes, names: Sequence[str], labels: Labels) -> None:
  """Draws boxes with their names, which do not overlap, in the color and style of their class."""
  outline = patheffects.withStroke(linewidth=3.2, foreground="black", alpha=0.55)
  figure, place = ax.get_figure(root=True), ax.get_gridspec()
  rows = figure.get_figheight() / place.nrows if figure and place else CELL
  line = abs(np.subtract(*ax.get_ylim())) * LABEL / rows  # height of a name, in pixels
  taken: list[tuple[float, float, float]] = []
  for (left, top, right, bottom), name, label in zip(boxes_xyxy, names, labels, strict=True):
    color = COLORS[label % len(COLORS)]
    style = STYLES[label // len(COLORS) % len(STYLES)]
    box = Rectangle((left, top), right - left, bottom - top, fill=False, ec=color, ls=style, lw=1.8)
    box.set_path_effects([outline])
    ax.add_patch(box)
    if name:
      frame = {"boxstyle": "square,pad=0.15", "fc": color, "ec": "none", "alpha": 0.85}
      text_color = "white" if color in DARK else "black"
      bottom = max(top, line)
      right = left + 0.5 * line * len(name)
      while any(abs(bottom - y) < line and left < x2 and x1 < right for x1, x2, y in taken):
        bottom += line
      taken.append((left, right, bottom))
      ax.text(left, bottom, name, va="bottom", fontsize=8, color=text_color, bbox=frame)


def draw_detections(
  image: Image, boxes_xyxy: Boxes, captions: Sequence[str], labels: Labels, title: str
) -> Figure:
  """Draws one image with captioned boxes, given by falling score."""
  figure, axes = grid(1, 1, title, image[None])
  figure.set_size_inches(7, 0.5 + 7 * image.shape[0] / image.shape[1])
  show(axes[0, 0], image)
  draw_boxes(axes[0, 0], boxes_xyxy[::-1], captions[::-1], labels[::-1])  # highest score on top
  return figure
