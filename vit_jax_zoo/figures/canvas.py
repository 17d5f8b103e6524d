"""Titles, axes, images and rendering shared by all figures."""

import warnings
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Num, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.text import Text

# Okabe and Ito's palette, safe for colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
QUIET = "#555555"
MARGIN = 0.3  # inches
SMALL = 64  # pixels; smaller images are drawn without interpolation
HEAT, OPACITY = "viridis", 0.55  # of heat maps

Image = Num[np.ndarray, "h w c"]  # in [0, 255], with 1 or 3 channels
Images = Num[np.ndarray, "b h w c"]


def render(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
  """Renders a figure to pixels: "$" starts no formula, missing glyphs give no warning."""
  canvas = FigureCanvasAgg(figure)
  for text in figure.findobj(Text):
    if isinstance(text, Text):
      text.set_parse_math(False)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
    canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_title(figure: Figure, title: str, subtitle: str) -> None:
  """Writes a title and a smaller subtitle at the upper left, in 0.7 inches of free space."""
  width, height = figure.get_size_inches()
  left = MARGIN / width
  figure.text(left, 1 - 0.16 / height, title, ha="left", va="top", fontsize=13, weight="bold")
  figure.text(left, 1 - 0.42 / height, subtitle, ha="left", va="top", fontsize=9.5, color=QUIET)


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
  """Adds axes; position and size in inches, from the lower left corner."""
  scale = np.tile(figure.get_size_inches(), 2)
  return figure.add_axes(tuple(np.array([left, bottom, width, height]) / scale))


def show_image(ax: Axes, image: Image, interpolation: str = "auto") -> None:
  """Draws an image, without ticks and frame."""
  pixels = np.clip(np.rint(np.asarray(image, np.float32)), 0, 255).astype(np.uint8)
  pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
  ax.imshow(pixels, interpolation="nearest" if max(pixels.shape[:2]) < SMALL else interpolation)
  hide_frame(ax)


def heat_map(image: Image, values: Float[np.ndarray, "gh gw"]) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the image in gray under a colour for each value, in [0, 1]."""
  method = cv2.INTER_NEAREST if max(image.shape[:2]) < SMALL else cv2.INTER_CUBIC
  scale = cv2.resize(np.asarray(values, np.float32), image.shape[1::-1], interpolation=method)
  gray = 40 + 0.84 * np.asarray(image, np.float32).mean(axis=-1, keepdims=True)  # black is visible
  color = 255 * colormaps[HEAT](np.clip(scale, 0, 1))[..., :3]
  return np.clip(np.rint((1 - OPACITY) * gray + OPACITY * color), 0, 255).astype(np.uint8)


def add_color_bar(figure: Figure, label: str, ticks: tuple[str, str], **place: Any) -> None:
  """Draws the colours of `heat_map` with the lowest and highest value, in `cax` or beside `ax`."""
  bar = figure.colorbar(ScalarMappable(cmap=HEAT), alpha=0.5 + OPACITY / 2, **place)
  bar.set_ticks([0, 1], labels=ticks)
  bar.set_label(label, fontsize=9, color=QUIET, labelpad=-16)
  bar.ax.tick_params(labelsize=8.5, length=0)
  bar.outline.set_visible(False)  # pyrefly: ignore[not-callable]


def hide_frame(ax: Axes) -> None:
  """Removes ticks and spines."""
  ax.set(xticks=[], yticks=[])
  ax.spines[:].set_visible(False)


def chart(size: tuple[float, float], title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
  """Returns a figure of this size in inches, and its axes, with a title and labels."""
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  ax = figure.subplots(subplot_kw={"axisbelow": True})
  ax.set(xlabel=xlabel, ylabel=ylabel)
  ax.set_title(title, loc="left", weight="bold")
  ax.spines[["top", "right"]].set_visible(False)
  return figure, ax
