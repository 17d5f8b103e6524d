"""Titles and rendering shared by all figures."""

import warnings

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def render(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
  """Renders a figure to pixels, with class names as plain text.

  "$" starts no formula, and characters missing in the font are drawn as boxes without a warning.
  """
  canvas = FigureCanvasAgg(figure)
  for text in figure.findobj(Text):
    if isinstance(text, Text):
      text.set_parse_math(False)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
    canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


QUIET = "#555555"
MARGIN = 0.3  # inches


def write_title(figure: Figure, title: str, subtitle: str) -> None:
  """Writes a title and a smaller subtitle at the upper left, in 0.7 inches of free space."""
  width, height = figure.get_size_inches()
  left = MARGIN / width
  figure.text(left, 1 - 0.16 / height, title, ha="left", va="top", fontsize=13, weight="bold")
  figure.text(left, 1 - 0.42 / height, subtitle, ha="left", va="top", fontsize=9.5, color=QUIET)
