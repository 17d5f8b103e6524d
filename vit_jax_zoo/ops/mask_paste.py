"""Pasting of box masks into images; numpy, on the host."""

import numpy as np
from jaxtyping import Bool, Float


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
  pasted = np.zeros((len(masks), *image_size), bool)
  for mask, box, canvas in zip(masks, boxes_xyxy.astype(np.float64), pasted, strict=True):
    if convention == "exact":
      _paste_exactly(mask, box, canvas)
    else:
      inclusive = box - np.array([0, 0, 1, 1]) if convention == "detectron" else box
      _paste_rounded(mask, inclusive, canvas)
  return pasted


def _paste_exactly(
  mask: Float[np.ndarray, "m m"], box: Float[np.ndarray, " 4"], canvas: Bool[np.ndarray, "h w"]
) -> None:
  matrices, spans = [], []
  for axis, limit in ((1, canvas.shape[0]), (0, canvas.shape[1])):
    low, high = box[axis], box[axis + 2]
    # The interpolated edge extends half a mask pixel beyond the box.
    border = 0.5 * (high - low) / len(mask)
    if not np.isfinite([low, high]).all() or high <= low:
      return
    first = int(np.clip(np.floor(low - border), 0, limit))
    last = int(np.clip(np.ceil(high + border), 0, limit))
    at = (np.arange(first, last) + 0.5 - low) / (high - low) * len(mask) - 0.5
    matrices.append(_interpolation(at, len(mask)))
    spans.append(slice(first, last))
  canvas[spans[0], spans[1]] = matrices[0] @ mask @ matrices[1].T >= 0.5


def _paste_rounded(
  mask: Float[np.ndarray, "m m"], box: Float[np.ndarray, " 4"], canvas: Bool[np.ndarray, "h w"]
) -> None:
  if not np.isfinite(box).all():
    return
  side = len(mask) + 2
  padded = np.pad(mask, 1)
  low, high = box[:2], box[2:]
  half = 0.5 * (high - low) * side / len(mask)
  center = 0.5 * (low + high)
  first, last = np.trunc(center - half).astype(int), np.trunc(center + half).astype(int)
  matrices, spans = [], []
  for axis, limit in ((1, canvas.shape[0]), (0, canvas.shape[1])):
    length = max(last[axis] - first[axis] + 1, 1)
    span = np.arange(max(first[axis], 0), max(min(first[axis] + length, limit), 0))
    at = (span - first[axis] + 0.5) * side / length - 0.5
    matrices.append(_interpolation(np.clip(at, 0, side - 1), side))
    spans.append(span)
  canvas[np.ix_(spans[0], spans[1])] = matrices[0] @ padded @ matrices[1].T > 0.5


def _interpolation(at: Float[np.ndarray, " p"], side: int) -> Float[np.ndarray, "p side"]:
  """Returns the matrix of linear interpolation at the given positions, 0 beyond the ends."""
  return np.maximum(1 - np.abs(at[:, None] - np.arange(side)[None]), 0)
