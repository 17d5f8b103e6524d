"""Pictures of instance masks: each object in a colour of its own, with its class and score."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from matplotlib import colors, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.ops.mask_paste import paste_masks

_OPACITY = 0.5


def draw_masks(
  batch: Mapping[str, Any],
  predictions: Mapping[str, Any],
  class_names: Sequence[str] = (),
  *,
  threshold: float = 0.7,
  max_images: int = 4,
) -> Figure:
  """Draws every image twice: with its true masks, and with those that were found.

  Args:
    batch: as `tasks.instance_detection` has it, with `masks`.
    predictions: as that task gives them, with `box_masks`.
    class_names: by class id; ids by default.
    threshold: shows finds that are at least as sure.
    max_images: draws the first so many.
  """
  rows = draw.real_rows(batch)[:max_images]
  columns = 2 if len(rows) < 2 else 4  # two images side by side
  figure, axes = draw.grid(-(-2 * len(rows) // columns), columns, "True and predicted masks")
  cells = iter(axes.flat)
  for row in rows:
    image = draw.image_of(batch, row)
    targets = np.asarray(batch["is_target"][row], bool)
    masks = np.asarray(batch["masks"][row], bool)[targets][:, : image.shape[0], : image.shape[1]]
    names = [name_of(i, class_names) for i in np.asarray(batch["labels"][row])[targets]]
    _show(next(cells), image, masks, names, f"truth: {len(names)}")
    scores = np.asarray(predictions["scores"][row])
    sure = np.flatnonzero(np.asarray(predictions["is_object"][row]) & (scores >= threshold))
    boxes = np.asarray(predictions["boxes_xyxy"][row], np.float64)[sure]
    masks = paste_masks(
      np.asarray(predictions["box_masks"][row], np.float64)[sure],
      boxes * draw.to_shown(batch, row, image),
      (image.shape[0], image.shape[1]),
    )
    labels = np.asarray(predictions["labels"][row])
    names = [f"{name_of(labels[i], class_names)} {scores[i]:.0%}" for i in sure]
    _show(next(cells), image, masks, names, f"found at {threshold:.0%} or more: {len(names)}")
  return figure


def draw_found_masks(
  image: np.ndarray, masks: Bool[np.ndarray, "n h w"], names: Sequence[str]
) -> Figure:
  """Draws one picture with masks over it.

  Args:
    image: uint8 [h w 3].
    masks: of its size.
    names: what is written on each of them.
  """
  height = 2 * draw.CELL * image.shape[0] / image.shape[1]
  figure = Figure(figsize=(2 * draw.CELL, height + 0.3), dpi=110, layout="constrained")
  ax = figure.subplots()
  ax.set_axis_off()
  _show(ax, image, masks, names, f"found: {len(names)}")
  return figure


def _show(
  ax: Axes,
  image: np.ndarray,
  masks: Bool[np.ndarray, "n h w"],
  names: Sequence[str],
  title: str,
) -> None:
  painted = image.astype(np.float64) / 255
  for index, mask in enumerate(masks):
    color = np.array(colors.to_rgb(draw.COLORS[index % len(draw.COLORS)]))
    painted[mask] = (1 - _OPACITY) * painted[mask] + _OPACITY * color
  draw.show(ax, painted)
  ax.set_title(title, fontsize=8.5, loc="left")
  for index, (mask, name) in enumerate(zip(masks, names, strict=True)):
    rows, columns = np.nonzero(mask)
    if not len(rows):
      continue
    ax.contour(mask, levels=[0.5], colors=[draw.COLORS[index % len(draw.COLORS)]], linewidths=1.4)
    text = ax.text(columns.mean(), rows.min(), name, fontsize=8, color="white", ha="center")
    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])
