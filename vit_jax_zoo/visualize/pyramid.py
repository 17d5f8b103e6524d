"""Where the levels of a transformed pyramid look."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num
from matplotlib.figure import Figure

_CELL = 2.4  # inches


def draw_levels(
  images: Num[np.ndarray, "b h w c"],
  maps: Sequence[Float[np.ndarray, "b _ _"]],
  titles: Sequence[str],
  places: Float[np.ndarray, "b 2"],
) -> Figure:
  """Draws images with one place marked in each, and beside them where each level looks from there.

  Args:
    images: uint8, or floats in [0, 255].
    maps: weights over each level's positions; each is scaled to its own maximum.
    titles: of the maps.
    places: that are looked from, in shares of height and width.
  """
  height, width = images.shape[1:3]
  cell = _CELL * min(height / width, 2.0)
  size = (_CELL * (len(maps) + 1), cell * len(images) + 0.35)
  figure = Figure(figsize=size, dpi=110)
  grid = figure.subplots(len(images), len(maps) + 1, squeeze=False)
  figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.35 / size[1], wspace=0.04, hspace=0.04)
  for row, axes in enumerate(grid):
    axes[0].imshow(np.clip(images[row], 0, 255).astype(np.uint8), interpolation="nearest")
    y, x = places[row] * (height, width) - 0.5
    axes[0].plot(x, y, "o", mfc="none", mec="k", mew=3, ms=10)
    axes[0].plot(x, y, "o", mfc="none", mec="w", ms=10)
    for ax, weights in zip(axes[1:], maps, strict=True):
      ax.imshow(weights[row], cmap="viridis", vmin=0, interpolation="nearest")
    for ax in axes:
      ax.set_axis_off()
  for ax, title in zip(grid[0], ("from the ring", *titles), strict=True):
    ax.set_title(title, fontsize=9)
  return figure
