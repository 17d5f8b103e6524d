"""Pictures of panoptic segmentation: pixels in the colour of their segment, truth beside find."""

from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import Int
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.ops.names import name_of
from vit_jax_zoo.visualize import detection as draw

Segments: TypeAlias = tuple[Int[np.ndarray, "_ _"], Sequence[int] | Int[np.ndarray, " _"]]
"""The number of the segment at every pixel, negative where there is none; segments' class ids."""

_OPACITY = 0.55


def draw_segments(
  truths: Sequence[Segments],
  finds: Sequence[Segments],
  images: Sequence[np.ndarray],
  class_names: Sequence[str] = (),
  *,
  title: str = "True and predicted segments",
) -> Figure:
  """Draws every image with its true segments, and with those that were found.

  Args:
    truths: of each image.
    finds: likewise.
    images: uint8 [h w 3], of any sizes.
    class_names: by class id; ids by default.
    title: of the figure.
  """
  columns = 2 if len(images) < 2 else 4  # two images side by side
  figure, axes = draw.grid(-(-2 * len(images) // columns), columns, title)
  cells = iter(axes.flat)
  for image, truth, find in zip(images, truths, finds, strict=True):
    for (segment_map, labels), what in ((truth, "truth"), (find, "found")):
      count = len(np.unique(segment_map[segment_map >= 0]))
      ax = next(cells)
      draw.show(ax, paint_segments(image, segment_map))
      _write_names(ax, segment_map, [name_of(label, class_names) for label in labels])
      ax.set_title(f"{what}: {count}", fontsize=8.5, loc="left")
  return figure


def paint_segments(image: np.ndarray, segment_map: Int[np.ndarray, "h w"]) -> np.ndarray:
  """Returns the image in the map's size, tinted by segment; as it is where there is none."""
  image = cv2.resize(image, segment_map.shape[::-1], interpolation=cv2.INTER_LINEAR)
  tints = np.asarray(colormaps["tab20"](np.arange(20) * 7 % 20))[:, :3] * 255
  tinted = (1 - _OPACITY) * image + _OPACITY * tints[segment_map % len(tints)]
  return np.where(segment_map[..., None] < 0, image, tinted).astype(np.uint8)


def _write_names(ax: Axes, segment_map: Int[np.ndarray, "h w"], names: Sequence[str]) -> None:
  """Writes each segment's name where most of it lies."""
  outline: list[patheffects.AbstractPathEffect] = [
    patheffects.withStroke(linewidth=2, foreground="black")
  ]
  for index, name in enumerate(names):
    rows, columns = np.nonzero(segment_map == index)
    if not len(rows):
      continue
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    ax.text(
      columns[middle], rows[middle], name, color="white", fontsize=7, ha="center", va="center",
      path_effects=outline, clip_on=True,
    )  # fmt: skip
