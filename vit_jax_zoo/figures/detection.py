"""Pictures of detection: training images with their boxes, predictions beside the truth.

Classes differ in colour, from Okabe and Ito's palette that every kind of colour blindness tells
apart, and, since there are more classes than colours, in line style; and every box has its name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vit_jax_zoo.errors import name_of

COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
DARK = ("#0072B2",)  # of these, what white text is easier to read on
STYLES = ("-", "--", ":")
CELL = 3.2  # inches


def draw_targets(
  batch: Mapping[str, Any],
  class_names: Sequence[str] = (),
  *,
  title: str = "Training batch",
  max_images: int = 8,
) -> Figure:
  """Draws images with their true boxes, each without its padding.

  Args:
    batch: as the detection task has it.
    class_names: by class id; ids by default.
    title: of the figure.
    max_images: draws the first so many.
  """
  rows = real_rows(batch)[:max_images]
  columns = min(4, max(len(rows), 1))
  figure, axes = grid(-(-len(rows) // columns), columns, title)
  for ax, row in zip(axes.flat, rows, strict=False):
    image = image_of(batch, row)
    show(ax, image)
    boxes, labels = _targets(batch, row, image)
    draw_boxes(ax, boxes, [name_of(i, class_names) for i in labels], labels)
  return figure


def draw_predictions(
  batch: Mapping[str, Any],
  predictions: Mapping[str, Any],
  class_names: Sequence[str] = (),
  *,
  threshold: float = 0.7,
  title: str = "Truth and predictions",
  max_images: int = 4,
) -> Figure:
  """Draws every image twice: with its true boxes, and with what was found in it.

  Args:
    batch: as the detection task has it.
    predictions: `boxes_xyxy` [b q 4], in pixels of the batch's `original_size` if it has one,
      `labels` [b q] and `scores` [b q].
    class_names: by class id; ids by default.
    threshold: shows predictions that are at least as sure.
    title: of the figure.
    max_images: draws the first so many.
  """
  rows = real_rows(batch)[:max_images]
  columns = 2 if len(rows) < 2 else 4  # two images side by side
  figure, axes = grid(-(-2 * len(rows) // columns), columns, title)
  for index, row in enumerate(rows):
    image = image_of(batch, row)
    truth, found = axes.flat[2 * index], axes.flat[2 * index + 1]
    boxes, labels = _targets(batch, row, image)
    show(truth, image)
    draw_boxes(truth, boxes, [name_of(i, class_names) for i in labels], labels)
    truth.set_title(f"truth: {len(labels)}", fontsize=8.5, loc="left")
    scores = np.asarray(predictions["scores"][row])
    sure = np.flatnonzero(scores >= threshold)
    sure = sure[np.argsort(scores[sure])]  # the surest on top
    labels = np.asarray(predictions["labels"][row])[sure]
    boxes = np.asarray(predictions["boxes_xyxy"][row])[sure] * to_shown(batch, row, image)
    names = [
      f"{name_of(i, class_names)} {score:.0%}"
      for i, score in zip(labels, scores[sure], strict=True)
    ]
    show(found, image)
    draw_boxes(found, boxes, names, labels)
    best = f"; surest {scores.max():.0%}" if not len(sure) and scores.size else ""
    found.set_title(
      f"found at {threshold:.0%} or more: {len(sure)}{best}", fontsize=8.5, loc="left"
    )
  return figure


def real_rows(batch: Mapping[str, Any]) -> list[int]:
  """Returns which rows of a batch are images, and not padding altogether."""
  real = np.asarray(batch.get("mask", np.ones(len(batch["image"]))), bool)
  return np.flatnonzero(real).tolist()


def image_of(batch: Mapping[str, Any], row: int) -> Num[np.ndarray, "h w c"]:
  """Returns an image without its padding, uint8."""
  image = np.asarray(batch["image"][row])
  if "image_size" in batch:
    height, width = np.asarray(batch["image_size"][row])
    image = image[:height, :width]
  return np.clip(image, 0, 255).astype(np.uint8)


def _targets(
  batch: Mapping[str, Any], row: int, image: Num[np.ndarray, "h w c"]
) -> tuple[Float[np.ndarray, "t 4"], Int[np.ndarray, " t"]]:
  """Returns corners in pixels of the shown image, and class ids."""
  real = np.asarray(batch["is_target"][row], bool)
  boxes = np.asarray(batch["boxes_cxcywh"][row], np.float64)[real]
  boxes = boxes * np.tile(image.shape[1::-1], 2)
  low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
  return np.concatenate([low, high], axis=1), np.asarray(batch["labels"][row])[real]


def to_shown(
  batch: Mapping[str, Any], row: int, image: Num[np.ndarray, "h w c"]
) -> Float[np.ndarray, " 4"]:
  """Returns what takes predicted corners to pixels of the shown image."""
  if "original_size" not in batch:
    return np.ones(4)
  original = np.asarray(batch["original_size"][row], np.float64)
  return np.tile(image.shape[1::-1] / original[::-1], 2)


def grid(rows: int, columns: int, title: str) -> tuple[Figure, np.ndarray]:
  """Returns a figure with a title, and its empty axes [rows columns]."""
  rows = max(rows, 1)
  figure = Figure(figsize=(CELL * columns, CELL * rows + 0.5), dpi=110, layout="constrained")
  figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
  axes = figure.subplots(rows, columns, squeeze=False)
  for ax in axes.flat:
    ax.set_axis_off()
  return figure, axes


def show(ax: Axes, image: Num[np.ndarray, "h w c"]) -> None:
  """Draws an image: small ones pixel by pixel."""
  interpolation = "nearest" if max(image.shape[:2]) < 100 else "antialiased"
  ax.imshow(image, interpolation=interpolation)
  ax.set_anchor("NW")


def draw_boxes(
  ax: Axes,
  boxes_xyxy: Float[np.ndarray, "n 4"],
  names: Sequence[str],
  labels: Int[np.ndarray, " n"],
) -> None:
  """Draws boxes with their names, in the colour and line style of their class."""
  outline: list[patheffects.AbstractPathEffect] = [
    patheffects.withStroke(linewidth=3.2, foreground="black", alpha=0.55)
  ]
  for (left, top, right, bottom), name, label in zip(boxes_xyxy, names, labels, strict=True):
    color = COLORS[label % len(COLORS)]
    style = STYLES[label // len(COLORS) % len(STYLES)]
    box = Rectangle((left, top), right - left, bottom - top, fill=False, ec=color, ls=style, lw=1.8)
    box.set_path_effects(outline)
    ax.add_patch(box)
    ax.annotate(
      name, (left, top), (1, -1), textcoords="offset points", va="top", fontsize=7,
      color="white" if color in DARK else "black",
      bbox={"boxstyle": "square,pad=0.15", "fc": color, "ec": "none", "alpha": 0.85},
      annotation_clip=False,
    )  # fmt: skip
