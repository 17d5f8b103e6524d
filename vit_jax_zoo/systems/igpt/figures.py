"""Figures of image grids and of image completions, without `pyplot`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Integer, Num, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.figures.canvas import MARGIN, write_title

MISSING = (236, 236, 240)
"""Colour of pixels after the prefix."""
GAP = 0.06  # inches between pictures
HEAD = 0.95  # inches above the grid


def draw_completions(
  images: UInt8[np.ndarray, "b h w 3"],
  given: Int[np.ndarray, " b"] | Integer[np.ndarray, " b"],
  completions: UInt8[np.ndarray, "b s h w 3"],
  *,
  title: str = "Completions",
  max_images: int = 12,
) -> Figure:
  """Draws a row for each image: the prefix, the completions and the original.

  Args:
    images: the originals.
    given: number of pixels of each prefix, in raster order.
    completions: several of each image.
    title: of the figure.
    max_images: maximum number of images.
  """
  shown = min(len(images), max_images)
  count = completions.shape[1]
  rows = [[keep_pixels(images[i], int(given[i])), *completions[i], images[i]] for i in range(shown)]
  figure, axes = _grid(shown, count + 2, images.shape[1:3], separate=(1, count + 1))
  draws = "one draw" if count == 1 else f"{count} draws"
  words = f"one image, {draws}" if shown == 1 else f"{shown} images, {draws} of each"
  write_title(figure, title, words)
  for row, pictures in zip(axes, rows, strict=True):
    for ax, picture in zip(row, pictures, strict=True):
      _show(ax, picture)
  names = ("given", "completed by the model", "original")
  for column, name in zip((0, 1, count + 1), names, strict=True):
    axes[0][column].annotate(
      name, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=8.5, annotation_clip=False
    )
  return figure


def draw_images(
  images: Num[np.ndarray, "b h w 3"],
  *,
  title: str = "Samples",
  max_images: int = 64,
  columns: int | None = None,
) -> Figure:
  """Draws a grid of images.

  Args:
    images: uint8, or floats in [0, 255].
    title: of the figure.
    max_images: maximum number of images.
    columns: number of images in a row; None: a square grid.
  """
  shown = min(len(images), max_images)
  if not shown:
    raise ValueError("images: none; expected at least one")
  columns = columns or max(4, int(np.ceil(np.sqrt(shown))))
  figure, axes = _grid(-(-shown // columns), columns, images.shape[1:3])
  height, width = images.shape[1:3]
  write_title(figure, title, f"{shown} of {len(images)} images, {width} × {height} pixels")
  for i, ax in enumerate(ax for row in axes for ax in row):
    if i < shown:
      _show(ax, np.clip(np.rint(images[i]), 0, 255).astype(np.uint8))
    else:
      ax.remove()
  return figure


def keep_pixels(image: UInt8[np.ndarray, "h w 3"], count: int) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the image with all but its first `count` pixels blanked."""
  pixels = image.reshape(-1, 3).copy()
  pixels[count:] = MISSING
  return pixels.reshape(image.shape)


def _grid(
  rows: int, columns: int, size: tuple[int, int], separate: Sequence[int] = ()
) -> tuple[Figure, list[list[Axes]]]:
  """Returns axes for images of one size, with a wider gap before the columns in `separate`."""
  side = float(np.clip(max(size) / 32, 0.62, 1.3))
  height = side * size[0] / max(size)
  width = side * size[1] / max(size)
  wide = 0.22
  across = columns * (width + GAP) - GAP + wide * len(separate)
  figure_size = (max(across + 2 * MARGIN, 4.6), rows * (height + GAP) - GAP + HEAD + MARGIN)
  figure = Figure(figsize=figure_size, dpi=110)
  axes = []
  for row in range(rows):
    axes.append([])
    for column in range(columns):
      left = MARGIN + column * (width + GAP) + wide * sum(column >= c for c in separate)
      bottom = figure_size[1] - HEAD - height - row * (height + GAP)
      box = (left, bottom, width, height) / np.tile(figure_size, 2)
      axes[-1].append(figure.add_axes(tuple(box)))
  return figure, axes


def _show(ax: Axes, image: UInt8[np.ndarray, "h w 3"]) -> None:
  ax.imshow(image, interpolation="nearest")
  ax.set(xticks=[], yticks=[])
  for spine in ax.spines.values():
    spine.set_visible(False)
