"""Box masks on the host: pasting into images, evaluation, figures."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib import colors, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.figures.canvas import Image
from vit_jax_zoo.figures.detection import COLORS
from vit_jax_zoo.metrics.base import Arrays, Size
from vit_jax_zoo.metrics.detection import InstanceEvaluator, encode_masks

_OPACITY = 0.5
Masks = Bool[np.ndarray, "n h w"]


def paste_masks(
  masks: Float[np.ndarray, "n m m"],
  boxes_xyxy: Float[np.ndarray, "n 4"],
  image_size: Size,
  *,
  convention: str = "exact",
) -> Masks:
  """Returns each box's mask: pixels with a probability above one half ("exact": or of one half).

  A mask covers its box, in pixels, interpolated between pixel centres. Conventions: "exact" samples
  the mask at pixel centres (Detectron2). "detectron" expands boxes by one mask pixel of zeros, then
  to whole pixels; "torchvision" does the same with inclusive right and bottom.
  """
  is_exact = convention == "exact"
  place = _place_exactly if is_exact else _place_rounded
  pasted = np.zeros((len(masks), *image_size), bool)
  for mask, box, canvas in zip(masks, boxes_xyxy.astype(np.float64), pasted, strict=True):
    if not np.isfinite(box).all():
      continue
    if convention == "detectron":
      box = box - np.array([0, 0, 1, 1])
    padded = mask if is_exact else np.pad(mask, 1)
    rows, by_row = place(box[1], box[3], len(padded), image_size[0])
    columns, by_column = place(box[0], box[2], len(padded), image_size[1])
    values = by_row @ padded @ by_column.T
    canvas[np.ix_(rows, columns)] = values >= 0.5 if is_exact else values > 0.5
  return pasted


def _place_exactly(
  low: float, high: float, side: int, limit: int
) -> tuple[Int[np.ndarray, " p"], Float[np.ndarray, "p side"]]:
  """Returns an axis's pixels, of `limit`, in a mask, and the matrix that interpolates it there."""
  if high <= low:
    return np.arange(0), np.zeros((0, side))
  border = 0.5 * (high - low) / side  # the interpolated edge extends half a mask pixel beyond
  first, last = np.clip([np.floor(low - border), np.ceil(high + border)], 0, limit).astype(int)
  pixels = np.arange(first, last)
  return pixels, _interpolation((pixels + 0.5 - low) / (high - low) * side - 0.5, side)


def _place_rounded(
  low: float, high: float, side: int, limit: int
) -> tuple[Int[np.ndarray, " p"], Float[np.ndarray, "p side"]]:
  """Like `_place_exactly`, the box expanded to whole pixels; `side` includes the zero border."""
  half, center = 0.5 * (high - low) * side / (side - 2), 0.5 * (low + high)
  first, last = int(center - half), int(center + half)
  length = max(last - first + 1, 1)
  pixels = np.arange(max(first, 0), max(min(first + length, limit), 0))
  at = (pixels - first + 0.5) * side / length - 0.5
  return pixels, _interpolation(np.clip(at, 0, side - 1), side)


def _interpolation(at: Float[np.ndarray, " p"], side: int) -> Float[np.ndarray, "p side"]:
  """Returns the matrix of linear interpolation at the given positions, 0 beyond the ends."""
  return np.maximum(1 - np.abs(at[:, None] - np.arange(side)[None]), 0)


@dataclasses.dataclass(eq=False)
class BoxMaskEvaluator(InstanceEvaluator):
  """COCO's metrics of boxes and of `box_masks` [b q m m]; `is_object` [b q] is False in padding."""

  paste_convention: str = "exact"  # of `paste_masks`

  def found_masks(self, batch: Arrays, predictions: Arrays, row: int, size: Size) -> list[Any]:
    del batch
    real = np.asarray(predictions["is_object"][row], bool)
    masks, boxes = (
      np.asarray(predictions[key][row], np.float64)[real] for key in ("box_masks", "boxes_xyxy")
    )
    found = iter(encode_masks(paste_masks(masks, boxes, size, convention=self.paste_convention)))
    empty = encode_masks(np.zeros((1, *size), bool))[0]
    return [next(found) if is_object else empty for is_object in real]


def draw_masks(
  batch: Arrays, predictions: Arrays, class_names: Sequence[str] = (), *, threshold: float
) -> Figure:
  """Draws the first 4 images twice: with true `masks` and with a detector's `box_masks`."""
  figure, cells = draw.pairs(batch, "True and predicted masks")
  for row, truth, predicted in cells:
    image = draw.image_of(batch, row)
    targets = np.asarray(batch["is_target"][row], bool)
    masks = np.asarray(batch["masks"][row], bool)[targets][:, : image.shape[0], : image.shape[1]]
    names = [name_of(i, class_names) for i in np.asarray(batch["labels"][row])[targets]]
    _show_masks(truth, image, masks, names, f"truth: {len(names)}")
    found, boxes, names = draw.confident(batch, predictions, row, class_names, threshold)
    masks = np.asarray(predictions["box_masks"][row], np.float64)[found]
    masks = paste_masks(masks, boxes, image.shape[:2])
    title = f"{len(names)} predicted at {threshold:.0%} or more"
    _show_masks(predicted, image, masks, names, title)
  return figure


def draw_predicted_masks(image: Image, masks: Masks, names: Sequence[str]) -> Figure:
  """Draws one image with captioned masks over it."""
  figure, axes = draw.grid(1, 1, "", image[None])
  figure.set_size_inches(2 * draw.CELL, 0.3 + 2 * draw.CELL * image.shape[0] / image.shape[1])
  _show_masks(axes[0, 0], image, masks, names, f"{len(names)} predicted")
  return figure


def _show_masks(ax: Axes, image: Image, masks: Masks, names: Sequence[str], title: str) -> None:
  painted = image.astype(np.float64) / 255
  for index, mask in enumerate(masks):
    color = np.array(colors.to_rgb(COLORS[index % len(COLORS)]))
    painted[mask] = (1 - _OPACITY) * painted[mask] + _OPACITY * color
  draw.show(ax, painted)
  ax.set_title(title, fontsize=8.5, loc="left")
  for index, (mask, name) in enumerate(zip(masks, names, strict=True)):
    rows, columns = np.nonzero(mask)
    if len(rows):
      ax.contour(mask, levels=[0.5], colors=[COLORS[index % len(COLORS)]], linewidths=1.4)
      text = ax.text(columns.mean(), rows.min(), name, fontsize=8, color="white", ha="center")
      text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])
