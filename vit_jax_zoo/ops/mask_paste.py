"""Pasting of box masks into images; numpy, on the host."""

import numpy as np
from jaxtyping import Bool, Float, Int


def paste_masks(
  masks: Float[np.ndarray, "n m m"],
  boxes_xyxy: Float[np.ndarray, "n 4"],
  image_size: tuple[int, int],
  *,
  convention: str = "exact",
) -> Bool[np.ndarray, "n h w"]:
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
  """The same, with the box expanded to whole pixels; `side` includes the border of zeros."""
  half, center = 0.5 * (high - low) * side / (side - 2), 0.5 * (low + high)
  first, last = int(center - half), int(center + half)
  length = max(last - first + 1, 1)
  pixels = np.arange(max(first, 0), max(min(first + length, limit), 0))
  at = (pixels - first + 0.5) * side / length - 0.5
  return pixels, _interpolation(np.clip(at, 0, side - 1), side)


def _interpolation(at: Float[np.ndarray, " p"], side: int) -> Float[np.ndarray, "p side"]:
  """Returns the matrix of linear interpolation at the given positions, 0 beyond the ends."""
  return np.maximum(1 - np.abs(at[:, None] - np.arange(side)[None]), 0)
