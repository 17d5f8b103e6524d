"""Pictures of a first layer: its filters one by one, or their principal components."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from vit_jax_zoo.visualize.attention import draw_mosaic
from vit_jax_zoo.visualize.title import write_title

COLUMNS = 7  # of the ViT paper's figure 7, which has 28 components


def principal_filters(
  kernel: Float[np.ndarray, "kh kw c n"], count: int = 28
) -> tuple[Float[np.ndarray, "m kh kw c"], Float[np.ndarray, " m"]]:
  """Returns the principal components of filters, figure 7, left, of the ViT paper.

  Each of the n filters is a point in the space of patches; the components are the directions along
  which these points spread most. A component's sign means nothing: its largest entry is made
  positive.

  Args:
    kernel: of the first layer.
    count: how many, at most: there are no more than kh * kw * c, nor than n.

  Returns:
    The components, unit vectors, the widest first; and each one's share of the variance.
  """
  points = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T
  _, singular, directions = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
  variance = singular**2
  kept = directions[:count]
  largest = np.take_along_axis(kept, np.abs(kept).argmax(axis=1)[:, None], axis=1)
  kept = kept * np.where(largest < 0, -1.0, 1.0)
  shares = variance[:count] / max(float(variance.sum()), 1e-300)
  return kept.reshape(-1, *kernel.shape[:3]).astype(np.float32), shares.astype(np.float32)


def draw_filters(
  kernel: Float[np.ndarray, "kh kw c n"], *, principal: bool = False, max_filters: int = 63
) -> Figure:
  """Draws a first layer: gray is zero, each tile is scaled to its own largest entry.

  Args:
    kernel: filters of 3 channels are shown in their colours, others by their channels' mean.
    principal: draws the principal components, 28 as in the paper, in place of the filters.
    max_filters: draws the first so many.
  """
  side = f"{kernel.shape[0]} × {kernel.shape[1]}"
  if principal:
    filters, shares = principal_filters(kernel)
    title = "Components of the patch embedding"
    said = f"the first {len(filters)}, {side} pixels, {shares.sum():.0%} of the filters' variance"
  else:
    filters = np.moveaxis(np.asarray(kernel, np.float32), -1, 0)[:max_filters]
    title, said = (
      "Filters of the first layer",
      f"{len(filters)} of {kernel.shape[-1]}, {side} pixels",
    )
  if filters.shape[-1] != 3:
    filters = filters.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
  largest = np.maximum(np.abs(filters).max(axis=(1, 2, 3), keepdims=True), 1e-12)
  tiles = 0.5 + 0.5 * filters / largest
  columns = min(COLUMNS if principal or len(tiles) <= 28 else 9, len(tiles))
  rows = -(-len(tiles) // columns)
  blank = np.ones((rows * columns - len(tiles), *tiles.shape[1:]), np.float32)
  tiles = np.concatenate([tiles, blank]).reshape(rows, columns, *tiles.shape[1:])
  width, height = max(0.62 * columns + 0.6, 4.6), 0.62 * rows + 0.95
  figure = Figure(figsize=(width, height), dpi=110)
  ax = figure.add_axes((0.3 / width, 0.2 / height, 0.62 * columns / width, 0.62 * rows / height))
  draw_mosaic(ax, tiles)
  write_title(figure, title, said)
  return figure
