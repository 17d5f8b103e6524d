"""Figures of image grids and of image completions."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Integer, Num, UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.figures.canvas import MARGIN, add_axes, show_image, write_title

MISSING = (236, 236, 240)  # colour of pixels after the prefix
GAP = 0.06  # inches between pictures
HEAD = 0.95  # inches above the grid
MAX_COMPLETED, MAX_SAMPLES = 12, 64  # maximum numbers of images in a figure


def draw_completions(
  images: UInt8[np.ndarray, "b h w 3"],
  given: Int[np.ndarray, " b"] | Integer[np.ndarray, " b"],
  completions: UInt8[np.ndarray, "b s h w 3"],
) -> Figure:
  """Draws a row for each image: the prefix of `given` pixels, the completions and the original."""
  shown = min(len(images), MAX_COMPLETED)
  count = completions.shape[1]
  rows = [[keep_pixels(images[i], int(given[i])), *completions[i], images[i]] for i in range(shown)]
  figure, axes = _grid(shown, count + 2, images.shape[1:3], separate=(1, count + 1))
  draws = "one draw" if count == 1 else f"{count} draws"
  words = f"one image, {draws}" if shown == 1 else f"{shown} images, {draws} of each"
  write_title(figure, "Completions", words)
  for ax, picture in zip(axes.flat, itertools.chain(*rows), strict=True):
    show_image(ax, picture)
  names = ("given", "completed by the model", "original")
  for column, name in zip((0, 1, count + 1), names, strict=True):
    position = ((0, 1), (0, 5), "axes fraction", "offset points")
    axes[0, column].annotate(name, *position, fontsize=8.5, annotation_clip=False)
  return figure


def draw_images(
  images: Num[np.ndarray, "b h w 3"], *, title: str = "Samples", columns: int | None = None
) -> Figure:
  """Draws the first images, in [0, 255], in rows of `columns`; None: a square grid."""
  shown = min(len(images), MAX_SAMPLES)
  if not shown:
    raise ValueError("images: none; expected at least one")
  columns = columns or max(4, int(np.ceil(np.sqrt(shown))))
  figure, axes = _grid(-(-shown // columns), columns, images.shape[1:3])
  height, width = images.shape[1:3]
  write_title(figure, title, f"{shown} of {len(images)} images, {width} × {height} pixels")
  for ax, image in zip(axes.flat, images[:shown], strict=False):
    show_image(ax, image)
  for ax in axes.flat[shown:]:
    ax.remove()
  return figure


def keep_pixels(image: UInt8[np.ndarray, "h w 3"], count: int) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the image with all but its first `count` pixels blanked."""
  pixels = image.reshape(-1, 3).copy()
  pixels[count:] = MISSING
  return pixels.reshape(image.shape)


def _grid(
  rows: int, columns: int, size: tuple[int, int], separate: Sequence[int] = ()
) -> tuple[Figure, np.ndarray]:
  side = float(np.clip(max(size) / 32, 0.62, 1.3))
  height, width = side * size[0] / max(size), side * size[1] / max(size)
  wide = 0.22
  across = columns * (width + GAP) - GAP + wide * len(separate)
  top = rows * (height + GAP) - GAP + MARGIN
  figure = Figure(figsize=(max(across + 2 * MARGIN, 4.6), top + HEAD), dpi=110)
  axes = np.empty((rows, columns), object)
  for row, column in np.ndindex(rows, columns):
    left = MARGIN + column * (width + GAP) + wide * sum(column >= c for c in separate)
    axes[row, column] = add_axes(figure, left, top - height - row * (height + GAP), width, height)
  return figure, axes
