"""Figure of image completions."""

import numpy as np
from jaxtyping import Integer, UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.figures.attention import draw_mosaic
from vit_jax_zoo.figures.canvas import MARGIN, add_axes, write_title

MISSING = (236, 236, 240)  # colour of pixels after the prefix
MAX_COMPLETED = 12  # maximum number of images


def draw_completions(
  images: UInt8[np.ndarray, "b h w 3"],
  given: Integer[np.ndarray, " b"],
  completions: UInt8[np.ndarray, "b s h w 3"],
) -> Figure:
  """Draws a row for each image: the prefix of `given` pixels, the completions and the original."""
  shown, count = min(len(images), MAX_COMPLETED), completions.shape[1]
  prefixes = [keep_pixels(images[i], int(given[i])) for i in range(shown)]
  tiles = np.stack([[prefixes[i], *completions[i], images[i]] for i in range(shown)])
  sides = np.array(images.shape[1:3])
  height, width = sides / sides.max() * np.clip(sides.max() / 32, 0.7, 1.3) * tiles.shape[:2]
  figure = Figure(figsize=(max(width + 2 * MARGIN, 4.6), height + 0.95 + MARGIN), dpi=110)
  draws = "one draw" if count == 1 else f"{count} draws"
  words = f"one image, {draws}" if shown == 1 else f"{shown} images, {draws} of each"
  write_title(figure, "Completions", words)
  ax = add_axes(figure, MARGIN, MARGIN, width, height)
  draw_mosaic(ax, tiles / 255)
  ax.xaxis.tick_top()
  ax.tick_params(length=0)
  names = ["given", *(f"draw {i + 1}" for i in range(count)), "original"]
  ax.set_xticklabels(names, fontsize=8.5)
  return figure


def keep_pixels(image: UInt8[np.ndarray, "h w 3"], count: int) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the image with all but its first `count` pixels blanked."""
  pixels = image.reshape(-1, 3).copy()
  pixels[count:] = MISSING
  return pixels.reshape(image.shape)
