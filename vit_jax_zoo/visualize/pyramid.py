"""Where the levels of a transformed pyramid look."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num
from matplotlib.figure import Figure

_CELL = 2.4  # inches


def draw_levels(
  image: Num[np.ndarray, "h w c"],
  maps: Sequence[Float[np.ndarray, "_ _"]],
  titles: Sequence[str],
  place: tuple[float, float],
) -> Figure:
  """Draws an image with one place marked, and where each level looks from there.

  Args:
    image: uint8, or floats in [0, 255].
    maps: weights over each level's positions; each is scaled to its own maximum.
    titles: of the maps.
    place: that is looked from, in shares of height and width.
  """
  size = (_CELL * (len(maps) + 1), _CELL + 0.35)
  figure = Figure(figsize=size, dpi=110)
  axes = figure.subplots(1, len(maps) + 1, squeeze=False)[0]
  figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.35 / size[1], wspace=0.04)
  height, width = image.shape[:2]
  axes[0].imshow(np.clip(image, 0, 255).astype(np.uint8), interpolation="nearest")
  axes[0].plot(place[1] * width - 0.5, place[0] * height - 0.5, "o", mfc="none", mec="w", ms=10)
  axes[0].set_title("from the ring", fontsize=9)
  for ax, weights, title in zip(axes[1:], maps, titles, strict=True):
    ax.imshow(weights, cmap="viridis", vmin=0, interpolation="nearest")
    ax.set_title(title, fontsize=9)
  for ax in axes:
    ax.set_axis_off()
  return figure
