"""Pictures of instance masks: each object in a colour of its own, with its class and score."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colors, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.ops.mask_paste import paste_masks
from vit_jax_zoo.visualize.detection import COLORS

_CELL = 3.2  # inches
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
  real = np.asarray(batch.get("mask", np.ones(len(batch["image"]))), bool)
  rows = np.flatnonzero(real)[:max_images].tolist()
  columns = 4 if len(rows) > 1 else 2
  lines = max(-(-2 * len(rows) // columns), 1)
  figure = Figure(figsize=(_CELL * columns, _CELL * lines + 0.5), dpi=110, layout="constrained")
  figure.suptitle("True and predicted masks", x=0.01, ha="left", fontsize=12, weight="bold")
  axes = figure.subplots(lines, columns, squeeze=False).flat
  for ax in axes:
    ax.set_axis_off()
  cells = iter(figure.axes)
  for row in rows:
    image = _image(batch, row)
    targets = np.asarray(batch["is_target"][row], bool)
    masks = np.asarray(batch["masks"][row], bool)[targets][:, : image.shape[0], : image.shape[1]]
    names = [_name(i, class_names) for i in np.asarray(batch["labels"][row])[targets]]
    _show(next(cells), image, masks, names, f"truth: {len(names)}")
    scores = np.asarray(predictions["scores"][row])
    sure = np.flatnonzero(np.asarray(predictions["is_object"][row]) & (scores >= threshold))
    masks = paste_masks(
      np.asarray(predictions["box_masks"][row], np.float64)[sure],
      np.asarray(predictions["boxes_xyxy"][row], np.float64)[sure] * _to_shown(batch, row, image),
      (image.shape[0], image.shape[1]),
    )
    labels = np.asarray(predictions["labels"][row])[sure]
    names = [
      f"{_name(i, class_names)} {score:.0%}" for i, score in zip(labels, scores[sure], strict=True)
    ]
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
  height = 2 * _CELL * image.shape[0] / image.shape[1]
  figure = Figure(figsize=(2 * _CELL, height + 0.3), dpi=110, layout="constrained")
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
    color = np.array(colors.to_rgb(COLORS[index % len(COLORS)]))
    painted[mask] = (1 - _OPACITY) * painted[mask] + _OPACITY * color
  ax.imshow(painted, interpolation="nearest" if max(image.shape[:2]) < 100 else "antialiased")
  ax.set_title(title, fontsize=8.5, loc="left")
  for index, (mask, name) in enumerate(zip(masks, names, strict=True)):
    rows, columns = np.nonzero(mask)
    if not len(rows):
      continue
    ax.contour(mask, levels=[0.5], colors=[COLORS[index % len(COLORS)]], linewidths=1.4)
    text = ax.text(columns.mean(), rows.min(), name, fontsize=8, color="white", ha="center")
    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])


def _image(batch: Mapping[str, Any], row: int) -> np.ndarray:
  image = np.clip(np.asarray(batch["image"][row]), 0, 255).astype(np.uint8)
  if "image_size" in batch:
    height, width = np.asarray(batch["image_size"][row])
    image = image[:height, :width]
  return image


def _to_shown(batch: Mapping[str, Any], row: int, image: np.ndarray) -> Float[np.ndarray, " 4"]:
  """Returns what takes predicted corners to pixels of the shown image."""
  if "original_size" not in batch:
    return np.ones(4)
  original = np.asarray(batch["original_size"][row], np.float64)
  return np.tile(np.array(image.shape[1::-1]) / original[::-1], 2)


def _name(index: int | np.integer, class_names: Sequence[str]) -> str:
  return class_names[int(index)] if index < len(class_names) else str(index)
